"""Writes checkpoints whole or not at all, in the foreground or behind training."""
