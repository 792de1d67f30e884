"""How the losses of samples make the loss of each source of a mixture."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.mixing import Mixing
from megatron_nepa.data.transfer import to_device


class SourceWeights:
    """How the loss of each sample of a mixture counts in that of its source.

    Args:
        mixture: the sources.
        feed: which samples this rank loads, and where they go.
    """

    def __init__(self, mixture: Mixture, feed: Feed) -> None:
        self._mixing, self._share, self._device = Mixing.of(mixture, feed.seed), feed.share, feed.device
        self._names = [source.name for source in mixture.sources]

    def of(self, micro_batch: int) -> dict[str, Tensor]:
        """By source of the step, fp32 [micro_batch_size] on the device; the same names on every rank."""
        share = self._share
        first = share.first_sample(micro_batch)
        start = share.step_of(first) * share.global_batch_size
        source_of, _ = self._mixing.place(np.arange(start, start + share.global_batch_size))
        count = np.bincount(source_of, minlength=len(self._names))
        mine = source_of[first - start :][: share.micro_batch_size]
        per_sample = share.global_batch_size / share.micro_batch_size  # micro-batches of the step, over all replicas
        shown = np.flatnonzero(count)
        weights = np.where(mine == shown[:, None], per_sample / count[shown, None], 0.0).astype(np.float32)
        moved = to_device(weights, self._device)
        return {self._names[source]: moved[i] for i, source in enumerate(shown.tolist())}
