"""What a trunk is pre-trained to do: one file an objective."""
