"""NEPA pre-training as a task of the shared loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_nepa.config import PretrainingConfig
from megatron_nepa.data.loaders.pretraining import Batch, PretrainingLoader, SyntheticLoader, build_index
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.nepa import NepaForPretraining, PretrainingOutput
from megatron_nepa.models.trunk import DTYPES
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.reporting.flops import train_flops
from megatron_nepa.training.reporting.health import embedding_health, read_health
from megatron_nepa.training.task import Task

if TYPE_CHECKING:
    from megatron_nepa.tasks.pretraining_probe import PretrainingProbe


class PretrainingTask(Task):
    """Next-embedding prediction on unlabelled images.

    Args:
        run: the config.
        topology: this rank's place.

    Raises:
        ConfigError: for a data folder, or labelled images of the probe, that cannot serve the run.
    """

    def __init__(self, run: PretrainingConfig, topology: Topology) -> None:
        self.run = run
        self.topology = topology
        self.index = build_index(run.data, verbose=topology.is_main)
        self.num_images = None if self.index is None else len(self.index)
        self.data_fingerprint = None if self.index is None else self.index.fingerprint()
        self.flops_per_image = float(train_flops(run.model))
        self.evaluator: PretrainingProbe | None = None
        if run.probe.every > 0:
            from megatron_nepa.tasks.pretraining_probe import PretrainingProbe  # brings DALI and timm

            self.evaluator = PretrainingProbe(run, topology)
        self._output: PretrainingOutput | None = None

    def build_model(self, kernels: Kernels) -> nn.Module:
        """The model, drawn from the run's seed."""
        run = self.run
        build = Build.of(run, self.topology.tensor, kernels)
        return NepaForPretraining(run.model, run.objective, build)

    def build_loader(
        self, consumed_samples: int, bad_image_log: Path, order: int
    ) -> PretrainingLoader | SyntheticLoader:
        """This rank's micro-batches from sample ``consumed_samples`` on."""
        run = self.run
        feed = Feed.of(run, self.topology, DTYPES[run.dtype], consumed_samples, bad_image_log, order)
        if self.index is None:
            return SyntheticLoader(run.model.image_size, feed)
        return PretrainingLoader(self.index, run.data, run.model.image_size, feed)

    def learning_rates(self, total_steps: int) -> LearningRates:
        """One rate for all layers."""
        return LearningRates(self.run, total_steps)

    def forward(self, engine: TrainingEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch."""
        output: PretrainingOutput = engine.forward(batch.images, batch.sample_index)
        self._output = output
        _, prediction_norm, target_norm = output.health
        norms = {"prediction_norm": prediction_norm, "target_norm": target_norm}
        return output.loss, {"loss": output.loss.detach(), **norms}

    def health(self) -> Tensor | None:
        """Spread of this rank's last targets and predictions: a collapse shows here, not in the loss."""
        if self._output is None:
            return None
        prediction = self._output.prediction
        target = self._output.target[: prediction.shape[0]]  # without the halo row
        return torch.cat((embedding_health(target), embedding_health(prediction)))

    def read_health(self, flat: Tensor) -> dict[str, float]:
        """The log's health figures from :meth:`health`'s tensor on the host."""
        target, prediction = (read_health(half) for half in flat.chunk(2))
        return {
            "target_std": target.std,
            "target_effective_rank": target.effective_rank,
            "target_mean_direction": target.mean_direction,
            "prediction_std": prediction.std,
            "prediction_effective_rank": prediction.effective_rank,
        }
