"""Benchmarks that a user runs on their own machine; each prints what it measured and on which device."""
