"""LayerNorm of every query and key head, and 2-D RoPE, in place."""
