"""How a run ends: signals, time limits, lost and hanging ranks, exit statuses."""
