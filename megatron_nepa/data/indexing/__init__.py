"""Builds an index once: list, verify, pack into shards."""
