"""A training step timed against its parts and against another implementation."""
