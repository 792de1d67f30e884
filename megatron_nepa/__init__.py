"""megatron_nepa: NEPA pre-training of causal Vision Transformers at scale."""

__version__ = "0.1.0"
