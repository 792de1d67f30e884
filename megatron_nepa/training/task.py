"""What the training loop asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.learning_rates import LearningRates


class Loader(Protocol):
    """Micro-batches of one rank, forever."""

    num_bad_images: int

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None:
        """Free whatever decodes."""


class Evaluator(Protocol):
    """Measures a model now and then while it is trained.

    Attributes:
        every: steps between two evaluations; one is always made at the end.
        prefix: of the results' names in the log, such as "val_".
        best: the result, larger being better, by which the best checkpoint is kept; None keeps none.
    """

    every: int
    prefix: str
    best: str | None

    def evaluate(self, model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Results by name, equal on all ranks, of a model in evaluation mode; every rank calls it.

        It draws nothing from a random stream. None where ``interrupted`` (a collective, called between batches) said
        so.
        """


class Task(Protocol):
    """What the loop asks of a task.

    Attributes:
        metric_names: of the scalars that :meth:`forward` returns.
        num_images: of the training data, or None where it is endless.
        data_fingerprint: equal for equal training data, or None where there are no files.
        flops_per_image: model FLOPs of one training step on one image.
        evaluator: measures the model while it is trained, or None.
        classes: names of what the head tells apart, by number; () where there are none. Checkpoints hold them.
        reset_head: whether a head in ``run.init_from`` that does not fit the model's is left out.
    """

    metric_names: tuple[str, ...]
    num_images: int | None
    data_fingerprint: str | None
    flops_per_image: float
    evaluator: Evaluator | None
    classes: tuple[str, ...]
    reset_head: bool

    def build_model(self, kernels: Kernels) -> nn.Module:
        """The freshly initialised fp32 model."""

    def build_loader(self, consumed_samples: int, bad_image_log: Path) -> Loader:
        """The data from sample ``consumed_samples`` on."""

    def learning_rates(self, total_steps: int) -> LearningRates:
        """The parameter groups and their schedule."""

    def forward(self, engine: TrainingEngine, batch: Any) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch, and its metrics as a detached fp32 tensor [len(metric_names)]."""

    def health(self) -> Tensor | None:
        """Flat fp32 device tensor about the last micro-batch, or None."""

    def read_health(self, flat: Tensor) -> dict[str, float]:
        """The log's numbers from :meth:`health`'s tensor on the host."""
