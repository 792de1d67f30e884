"""The batches of each task."""
