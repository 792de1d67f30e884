"""A look inside a trained trunk: attention maps and similarities of embeddings (paper section 5)."""
