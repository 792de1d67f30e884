"""SwiGLU on the packed gate and up projection."""
