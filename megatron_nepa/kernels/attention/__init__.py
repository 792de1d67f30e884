"""Scaled dot-product attention: the back-ends and the choice among them."""
