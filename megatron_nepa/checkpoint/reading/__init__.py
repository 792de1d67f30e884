"""Reads training state and weights from whatever holds them."""
