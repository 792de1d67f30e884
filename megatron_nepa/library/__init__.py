"""Trained models in anyone's program: :func:`megatron_nepa.load`."""
