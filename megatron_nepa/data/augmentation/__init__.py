"""What training does to decoded images, every draw keyed by (seed, k)."""
