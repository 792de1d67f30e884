"""For ``torch.hub.load(CHECKOUT, "nepa", PATH, source="local")``."""

dependencies = ["torch", "safetensors", "numpy"]

from megatron_nepa.library.loading import load as nepa  # noqa: E402, F401
