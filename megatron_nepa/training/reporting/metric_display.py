"""How people see the numbers that a run logs: name in metrics.jsonl, unit, place on the console and in the plots.

Where the numbers come from: a step's own from :mod:`megatron_nepa.training.step`, a task's from its ``forward``. One
that is not in the table is still logged, after those that are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

from megatron_nepa.terminal import percent


def _short(value: float) -> str:
    """At least three digits, without an exponent for the sizes that occur."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def describe_result(name: str, value: float) -> str:
    """A result of an evaluation as consoles show it: a loss as a number, everything else as a share."""
    return f"{name} {f'{value:.4f}' if name.endswith('loss') else percent(value)}"


_BY_SOURCE = "/"  # between the name of a metric and that of the source of a mixture that it is of
_MOST_SOURCES = 4  # on the console; metrics.jsonl and the plots have all


T = TypeVar("T")


def by_source(metric: str, values: Mapping[str, T]) -> dict[str, T]:
    """Values of the sources of a mixture, by their names in the log, such as "loss/photos.index"."""
    return {f"{metric}{_BY_SOURCE}{source}": value for source, value in values.items()}


def sources_of(row: Iterable[str], metric: str) -> list[str]:
    """The sources that a row, or several, has a metric of."""
    return [name.removeprefix(metric + _BY_SOURCE) for name in row if name.startswith(metric + _BY_SOURCE)]


def console_of_sources(row: Mapping[str, float]) -> list[str]:
    """The parts of a step's line that are of the sources of a mixture: loss and passes of each."""
    parts = []
    sources = sources_of(row, "epoch")
    for source in sources if len(sources) <= _MOST_SOURCES else []:
        loss, epoch = row.get(f"loss{_BY_SOURCE}{source}"), row[f"epoch{_BY_SOURCE}{source}"]
        parts.append(f"{source} {'none' if loss is None else f'{loss:.4f}'} (pass {epoch:.2f})")
    return parts


class Metric(NamedTuple):
    """One number of a row of metrics.jsonl.

    Attributes:
        name: the key of its value in a row.
        unit: of the value; the label of its plot's y axis.
        console: its part of the line that a step prints; None leaves it out.
        panel: title of its plot; "" draws none.
        curve: its name among the plot's curves.
        figure: file of the plot, without ".png".
    """

    name: str
    unit: str
    console: Callable[[float], str] | None = None
    panel: str = ""
    curve: str = ""
    figure: Literal["health", "evaluation"] = "health"

    @property
    def is_average(self) -> bool:
        """Whether it was measured on the weight average, the same having been measured on the raw weights."""
        return "_ema_" in self.name


def _of_both(name: str, unit: str, panel: str, console: str = "") -> tuple[Metric, Metric]:
    """A share that an evaluation measures on the raw weights and on their average; ``console`` names it there."""
    shown = (lambda value: f"{console} {percent(value)}", lambda value: f"EMA {console} {percent(value)}")
    raw, average = shown if console else (None, None)
    return (
        Metric(name, unit, raw, panel, "raw weights", "evaluation"),
        Metric(name.replace("_", "_ema_", 1), unit, average, panel, "their average", "evaluation"),
    )


METRICS = (
    Metric("step", "optimizer steps"),
    Metric("epoch", "passes over the images"),
    Metric("samples", "images"),
    Metric("loss", "of the objective", lambda value: f"loss {value:.4f}"),
    Metric(
        "grad_norm",
        "global L2 norm, before clipping",
        lambda value: f"grad {_short(value)}",
        panel="Gradient norm",
        curve="gradient",
    ),
    Metric("lr", "largest of all groups", lambda value: f"lr {value:.1e}"),
    Metric("step_ms", "milliseconds"),
    Metric("samples_per_second", "images of the whole run", lambda value: f"{_short(value)} img/s"),
    Metric("tflops_per_device", "1e12 model FLOPs a second", lambda value: f"{_short(value)} TFLOP/s"),
    Metric("mfu", "share of the device's peak", lambda value: f"MFU {value:.1%}"),
    Metric("data_wait_ms", "milliseconds", lambda value: f"data {value:.0f} ms"),
    Metric("memory_gb", "1e9 bytes", lambda value: f"{value:.1f} GB"),
    Metric("skipped_steps", "steps whose gradient was not finite", lambda value: f"skipped {value:.0f}" * bool(value)),
    Metric("bad_images", "of this rank that could not be decoded"),
    Metric(
        "target_effective_rank",
        "directions in use",
        lambda value: f"eff. rank {value:.1f}",
        panel="Effective rank",
        curve="target",
    ),
    Metric("prediction_effective_rank", "directions in use", panel="Effective rank", curve="prediction"),
    Metric("target_std", "0 = collapsed, 1 = isotropic", panel="Spread of directions", curve="target"),
    Metric("prediction_std", "0 = collapsed, 1 = isotropic", panel="Spread of directions", curve="prediction"),
    Metric(
        "encoding_effective_rank",
        "directions in use",
        lambda value: f"eff. rank {value:.1f}",
        panel="Effective rank",
        curve="the trunk's output",
    ),
    Metric("encoding_std", "0 = collapsed, 1 = isotropic", panel="Spread of directions", curve="the trunk's output"),
    Metric("encoding_mean_direction", "0 = directions cancel, 1 = all are the same"),
    Metric("target_mean_direction", "0 = directions cancel, 1 = all are the same"),
    Metric("prediction_mean_direction", "0 = directions cancel, 1 = all are the same"),
    Metric("target_norm", "mean L2 norm", panel="Embedding norm", curve="target"),
    Metric("prediction_norm", "mean L2 norm", panel="Embedding norm", curve="prediction"),
    *_of_both("val_top1", "share of the images", "Top-1 accuracy", "top-1"),
    *_of_both("val_top5", "share of the images", "Top-5 accuracy"),
    *_of_both("val_loss", "cross-entropy", "Validation loss"),
    *_of_both("val_mean_iou", "mean over classes", "mIoU", "mIoU"),
    *_of_both("probe_knn_top1", "top-1 accuracy", "Probe: nearest neighbours", "kNN"),
    *_of_both("probe_linear_top1", "top-1 accuracy", "Probe: linear", "linear"),
)
