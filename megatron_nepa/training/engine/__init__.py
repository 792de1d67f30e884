"""What DeepSpeed is given: its config, the optimizer, learning rates and the average."""
