"""Bias, LayerScale, DropPath, residual sum and the next LayerNorm."""
