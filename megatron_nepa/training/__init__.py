"""The training engine, its loop, and what a run reports about itself."""
