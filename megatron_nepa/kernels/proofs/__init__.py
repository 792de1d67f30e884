"""What is shown of the kernels without a GPU: cases, bytes, machine code."""
