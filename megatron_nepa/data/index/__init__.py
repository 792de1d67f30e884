"""What samples exist: folders, archives, labels, mask pairs, and the index that records them."""
