"""Checks of an installation: what runs here, how, and what to do about what does not."""
