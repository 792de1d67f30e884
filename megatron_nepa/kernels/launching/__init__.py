"""How Triton kernels are launched, interpreted and timed."""
