"""What every training loader of one rank is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_nepa.config import RunConfig
from megatron_nepa.data.sampling.order import ORDER_VERSION
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.parallel.topology import Topology


@dataclass(frozen=True)
class Feed:
    """Which samples a rank's loader delivers, from where on, and to what.

    Attributes:
        share: the samples of the run that this rank loads.
        seed: of the run; every draw is keyed by it.
        device: where images are decoded, if it can, and delivered.
        dtype: dtype of the delivered images.
        consumed_samples: samples of the steps already taken, a multiple of the global batch.
        bad_image_log: JSON-lines file that substituted images are appended to; None keeps no record.
        order: version of the order that the run was begun with.
    """

    share: Share
    seed: int
    device: torch.device
    dtype: torch.dtype
    consumed_samples: int = 0
    bad_image_log: Path | None = None
    order: int = ORDER_VERSION

    @classmethod
    def of(
        cls,
        run: RunConfig,
        topology: Topology,
        dtype: torch.dtype,
        consumed_samples: int,
        bad_image_log: Path,
        order: int,
    ) -> Feed:
        """The feed of the rank whose place is ``topology``."""
        share = Share.of(run, topology)
        return cls(share, run.seed, topology.device, dtype, consumed_samples, bad_image_log, order)
