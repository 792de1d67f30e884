"""To and from other formats, and comparisons between them."""
