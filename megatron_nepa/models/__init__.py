"""The NEPA model: it builds parallel layers and fused operations, and knows nothing of process groups."""
