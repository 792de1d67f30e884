"""What a trunk attends to and predicts on one image, as arrays over its patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megatron_nepa.analysis.attention import AttentionRecorder
from megatron_nepa.analysis.images import Pixels, to_tensor
from megatron_nepa.analysis.queries import Patch
from megatron_nepa.checkpoint.reading.modules import build_module
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.config import require
from megatron_nepa.kernels.dispatch import Kernels

Array = NDArray[np.float32]
Heads = Literal["mean", "max", "each"]


@dataclass(frozen=True)
class Maps:
    """What a trunk does with one image of R x C patches, for Q query patches. Patch t predicts patch t + 1.

    Attributes:
        queries: the query patches, (y, x).
        causal: whether a patch saw only itself and the tokens before it.
        bos_token: whether a BOS token stands before the patches.
        attention: probability that each query puts on each patch, [layers, heads, Q, R, C]; 0 where it cannot see.
        attention_to_bos: what it puts on the BOS token instead, [layers, heads, Q]; 0 without one.
        similarity: cosine of the embedding that each query predicts and every patch's input embedding, [Q, R, C].
        next_cosine: cosine of every patch's input embedding and its prediction from the patch before, [R, C]; NaN for
            the first patch where no BOS token predicts it.
        repeat_cosine: the same had the patch before simply been repeated, [R, C]; NaN for the first patch.
    """

    queries: tuple[Patch, ...]
    causal: bool
    bos_token: bool
    attention: Array
    attention_to_bos: Array
    similarity: Array
    next_cosine: Array
    repeat_cosine: Array

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (R, C) of the image."""
        rows, columns = self.next_cosine.shape
        return rows, columns

    def visible(self, query: int) -> NDArray[np.bool_]:
        """The patches that a query sees, [R, C]."""
        rows, columns = self.grid
        y, x = self.queries[query]
        order = np.arange(rows * columns).reshape(rows, columns)
        return order <= order[y, x] if self.causal else np.ones_like(order, dtype=bool)

    def next_patch(self, query: int) -> Patch:
        """The patch that a query predicts."""
        y, x = self.queries[query]
        return divmod(y * self.grid[1] + x + 1, self.grid[1])

    def relative_attention(self, layers: Sequence[int], heads: Heads) -> Array:
        """Attention as it is drawn: in multiples of uniform attention over the tokens that the query sees.

        Args:
            layers: blocks whose mean is taken, counted from 0.
            heads: their ``mean``, the ``max`` of each patch, or ``each`` for itself.

        Returns:
            [Q, 1 or heads, R, C]; NaN for patches that the query cannot see.
        """
        attention = _reduce(self.attention, layers, heads)  # [Q, K, R, C]
        visible = np.stack([self.visible(query) for query in range(len(self.queries))])[:, None]  # [Q, 1, R, C]
        num_tokens = visible.sum((2, 3), keepdims=True) + self.bos_token
        return np.where(visible, attention * num_tokens, np.nan).astype(np.float32)

    def bos_share(self, layers: Sequence[int], heads: Heads) -> Array:
        """The attention to the BOS token that :meth:`relative_attention` leaves out, 0 to 1, [Q, 1 or heads]."""
        return _reduce(self.attention_to_bos, layers, heads)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every field as an array, for an npz file."""
        return {name: np.asarray(getattr(self, name)) for name in self.__dataclass_fields__}


def _reduce(values: Array, layers: Sequence[int], heads: Heads) -> Array:
    """[layers, heads, Q, ...] to [Q, 1 or heads, ...]: the mean of the layers, then of the heads what is asked."""
    result: Array = values[list(layers)].mean(0)
    if heads != "each":
        result = getattr(result, heads)(0, keepdims=True)
    return result.swapaxes(0, 1)


@torch.no_grad()
def compute_maps(weights: Weights, pixels: Pixels, queries: Sequence[Patch], bidirectional: bool = False) -> Maps:
    """Run a trunk on an image, in fp32, and keep what its query patches do.

    Args:
        weights: of any checkpoint; only the trunk is used.
        pixels: the image, [H, W, 3], whole patches.
        queries: (y, x) of the query patches, which must have a next one.
        bidirectional: let every patch see the whole image, though the checkpoint's config says causal.

    Raises:
        ConfigError: where the weights are no trunk of their config, or what they compute is not finite.
    """
    model = replace(weights.model, causal=False) if bidirectional else weights.model
    rows, columns = pixels.shape[0] // model.patch_size, pixels.shape[1] // model.patch_size
    num_prefix = int(model.bos_token)
    places = [y * columns + x for y, x in queries]
    recorder = AttentionRecorder([num_prefix + place for place in places])
    trunk = build_module(replace(weights, model=model), "none", replace(Kernels(), attention=recorder))
    output = trunk(to_tensor(pixels), torch.zeros(1, dtype=torch.int64))
    embedding, prediction = output.embedding, output.output
    finite = bool(torch.isfinite(prediction).all() and torch.isfinite(embedding).all())
    require(finite, f"the {weights.origin} compute embeddings that are not finite: there is nothing to show.")

    attention = torch.cat(recorder.probabilities)  # [layers, heads, Q, T]
    target = embedding[num_prefix:]  # z of every patch, [patches, D]
    unknown = target.new_full((1,), torch.nan)
    # BOS predicts the first patch; without it nothing does
    next_cosine = cosine_similarity(prediction[:-1], embedding[1:])
    repeat_cosine = torch.cat((unknown, cosine_similarity(target[:-1], target[1:])))
    predicted = prediction[num_prefix:][places]  # [Q, D]

    def on_grid(values: Tensor) -> Array:
        return values.unflatten(-1, (rows, columns)).numpy()

    return Maps(
        queries=tuple(queries),
        causal=model.causal,
        bos_token=model.bos_token,
        attention=on_grid(attention[..., num_prefix:]),
        attention_to_bos=attention[..., :num_prefix].sum(-1).numpy(),
        similarity=on_grid(cosine_similarity(predicted[:, None], target[None], dim=-1)),
        next_cosine=on_grid(next_cosine if num_prefix else torch.cat((unknown, next_cosine))),
        repeat_cosine=on_grid(repeat_cosine),
    )
