"""Pre-training as a task of the shared loop."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import DataConfig, PretrainingConfig
from megatron_nepa.data.decoding.timed_settings import Decoded
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.mixture_grammar import BLOCK
from megatron_nepa.data.loaders.pretraining import Batch, PretrainingLoader, SyntheticLoader
from megatron_nepa.data.loaders.sources import build_sources
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.mixing import passes
from megatron_nepa.data.sampling.mixture_state import continued, state_of
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.objectives.flops import pretraining_flops
from megatron_nepa.objectives.objective import PretrainingOutput
from megatron_nepa.parallel.topology import Topology
from megatron_nepa.terminal import counted
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.reporting.health import embedding_health, health_size, read_health
from megatron_nepa.training.reporting.metric_display import by_source
from megatron_nepa.training.task import Task

if TYPE_CHECKING:
    from megatron_nepa.tasks.pretraining_probe import PretrainingProbe


class PretrainingTask(Task):
    """A trunk and its objective on unlabelled images.

    Args:
        run: the config.
        topology: this rank's place.

    Raises:
        ConfigError: for a data folder, or labelled images of the probe, that cannot serve the run.
    """

    def __init__(self, run: PretrainingConfig, topology: Topology) -> None:
        self.run = run
        self.topology = topology
        self.index = build_sources(run.data, verbose=topology.is_main)
        self.num_images = None if self.index is None else len(self.index)
        self.data_fingerprint = None if self.index is None else self.index.fingerprint()
        self.reads_remote = self.index is not None and self.index.is_remote
        self.flops_per_image = float(pretraining_flops(run))
        self.evaluator: PretrainingProbe | None = None
        if run.probe.every > 0:
            from megatron_nepa.tasks.pretraining_probe import PretrainingProbe  # brings DALI and timm

            self.evaluator = PretrainingProbe(run, topology)
        self._output: PretrainingOutput | None = None

    def build_model(self, kernels: Kernels) -> nn.Module:
        """The model, drawn from the run's seed."""
        build = Build.of(self.run, self.topology.tensor, kernels)
        return build_objective(self.run.model, self.run.objective, build)

    def data_state(self, progress: Progress, total_steps: int) -> tuple[Progress, list[str]]:
        """A mixture goes on with the sources and shares of the checkpoint, or from there with others."""
        if not isinstance(self.index, Mixture):
            return super().data_state(progress, total_steps)
        self.index, changes = continued(self.index, progress.mixture, progress.samples, self.run.seed)
        end = passes(self.index, self.run.seed, total_steps * self.run.global_batch_size)
        lines = [
            f"{source.name}: {source.per_block / BLOCK:.2%} of the samples, {counted(len(source.index), 'image')}, "
            f"{end[source.name]:.2f} passes by the end"
            for source in self.index.sources
        ]
        if changes:
            lines.append(f"warning: the data change at sample {progress.samples}: {'; '.join(changes)}")
        return replace(progress, mixture=state_of(self.index)), lines

    def passes(self, samples: int) -> dict[str, float]:
        """Also by source: an epoch of a mixture is as many samples as all of its sources have images."""
        own: dict[str, float] = {}
        if isinstance(self.index, Mixture):
            own = by_source("epoch", passes(self.index, self.run.seed, samples))
        return super().passes(samples) | own

    def build_loader(self, feed: Feed, data: DataConfig) -> PretrainingLoader | SyntheticLoader:
        """This rank's micro-batches."""
        run = self.run
        if self.index is None:
            return SyntheticLoader(run.model.image_size, feed)
        return PretrainingLoader(self.index, data, run.model.image_size, feed)

    def decoded(self) -> Decoded | None:
        """Random crops, unless images are synthetic."""
        if self.index is None:
            return None
        run = self.run
        return Decoded(self.index, run.model.image_size, self.topology.device, run.data.crop_scale_min)

    def learning_rates(self, total_steps: int) -> LearningRates:
        """One rate for all layers."""
        return LearningRates(self.run, total_steps)

    def forward(self, engine: TrainingEngine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch."""
        # of a mixture also the loss of each sample, where the objective has such
        more = (True,) if batch.source_weights and engine.module.by_sample else ()
        output: PretrainingOutput = engine.forward(batch.images, batch.sample_index, batch.step, *more)
        self._output = output
        return output.loss, {"loss": output.loss.detach(), **output.metrics, **_loss_by_source(output, batch)}

    def health(self) -> Tensor | None:
        """Spread of this rank's last embeddings: a collapse shows here, not in the loss."""
        if self._output is None or not self._output.embeddings:
            return None
        return torch.cat([embedding_health(rows) for rows in self._output.embeddings.values()])

    def read_health(self, flat: Tensor) -> dict[str, float]:
        """The log's health figures from :meth:`health`'s tensor on the host."""
        assert self._output is not None
        found: dict[str, float] = {}
        for name, rows in self._output.embeddings.items():
            own, flat = flat[: health_size(rows)], flat[health_size(rows) :]
            spread = read_health(own)
            found |= {
                f"{name}_std": spread.std,
                f"{name}_effective_rank": spread.effective_rank,
                f"{name}_mean_direction": spread.mean_direction,
            }
        return found


def _loss_by_source(output: PretrainingOutput, batch: Batch) -> dict[str, Tensor]:
    losses = output.sample_loss
    if losses is None:
        return {}
    # where rather than times: a loss that is not finite is its own source's alone
    sums = {name: torch.where(each > 0, each * losses, 0.0).sum() for name, each in batch.source_weights.items()}
    return by_source("loss", sums)
