"""Planning a run on a cluster that this code has not seen: memory, collectives, time."""
