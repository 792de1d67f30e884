"""What the training loop asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from megatron_nepa.checkpoint.saving.checkpoints_folder import Progress
from megatron_nepa.config import DataConfig
from megatron_nepa.data.decoding.timed_settings import Decoded
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates


class Loader(Protocol):
    """Micro-batches of one rank, forever."""

    @property
    def num_bad_images(self) -> int:
        """Images of this rank that could not be decoded."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None:
        """Free whatever decodes."""


class Evaluator(Protocol):
    """Measures a model now and then while it is trained."""

    @property
    def every(self) -> int:
        """Steps between two evaluations; one is always made at the end."""

    @property
    def prefix(self) -> str:
        """Of the results' names in the log, such as "val_"."""

    @property
    def best(self) -> str | None:
        """The result, larger being better, by which the best checkpoint is kept; None keeps none."""

    @property
    def at_start(self) -> bool:
        """Whether the weights that the run starts from are measured too, as step 0."""

    def decode_all(self, interrupted: Callable[[], bool]) -> None:
        """Decode this rank's share of what :meth:`evaluate` shows, once; ``interrupted`` is asked between batches.

        Raises:
            RankConfigError: an image that cannot be decoded, by name.
        """

    def evaluate(self, model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Results by name, equal on all ranks, of a model in evaluation mode; every rank calls it.

        It draws nothing from a random stream. None where ``interrupted`` (a collective, called between batches) said
        so.
        """


class Task(ABC):
    """What the loop asks of a task; what most tasks have no use for has a default.

    Attributes:
        num_images: of the training data, or None where it is endless.
        data_fingerprint: equal for equal training data, by source where there are several; None where there are no
            files.
        flops_per_image: model FLOPs of one training step on one image.
        evaluator: measures the model while it is trained, or None.
        classes: names of what the head tells apart, by number; () where there are none. Checkpoints hold them.
        reset_head: whether a head in ``run.init_from`` that does not fit the model's is left out.
        reads_remote: whether the images lie behind URLs, whose source may be lost.
    """

    num_images: int | None
    data_fingerprint: str | dict[str, str] | None
    flops_per_image: float
    evaluator: Evaluator | None = None
    classes: tuple[str, ...] = ()
    reset_head: bool = False
    reads_remote: bool = False

    @abstractmethod
    def build_model(self, kernels: Kernels) -> nn.Module:
        """The freshly initialised fp32 model."""

    def data_state(self, progress: Progress, total_steps: int) -> tuple[Progress, list[str]]:
        """Where the data of the run go on from ``progress``, and what the console says of it; called once, before
        :meth:`build_loader`.

        Raises:
            ConfigError: data that cannot go on from there.
        """
        changed = progress.mixture is not None
        said = ["warning: the checkpoint's run drew from a mixture, this one draws from one set"] if changed else []
        return replace(progress, mixture=None), said

    def passes(self, samples: int) -> dict[str, float]:
        """Passes over the training data after that many samples of the run, by their names in the log."""
        return {} if self.num_images is None else {"epoch": samples / self.num_images}

    @abstractmethod
    def build_loader(self, feed: Feed, data: DataConfig) -> Loader:
        """This rank's micro-batches, read and decoded as ``data`` says."""

    @abstractmethod
    def learning_rates(self, total_steps: int) -> LearningRates:
        """The parameter groups and their schedule."""

    @abstractmethod
    def forward(self, engine: TrainingEngine, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and what the log shows of it by name: detached fp32 scalars on the device.

        The loss is among them, as "loss"; how each is shown: :mod:`~megatron_nepa.training.reporting.metric_display`.
        """

    def decoded(self) -> Decoded | None:
        """What its loader decodes, on which a decoder's settings are timed; None where it decodes nothing."""
        return None

    def evaluation_settings(self) -> dict[str, Any]:
        """What the evaluator's results depend on besides the model's weights, as JSON values by name."""
        return {}

    def health(self) -> Tensor | None:
        """Flat fp32 device tensor about the last micro-batch, or None."""
        return None

    def read_health(self, flat: Tensor) -> dict[str, float]:
        """The log's numbers from :meth:`health`'s tensor on the host."""
        return {}
