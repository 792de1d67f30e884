"""What a checkpoint holds and how its tensors are named, here and in the release."""
