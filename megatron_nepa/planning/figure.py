"""Throughput against the number of GPUs, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from megatron_nepa.config import ConfigError, PretrainingConfig, require
from megatron_nepa.files import whole_or_absent
from megatron_nepa.planning.cluster import Gpu
from megatron_nepa.planning.plan import Plan, find_plans
from megatron_nepa.training.reporting.plot_style import BLUE, GREY, ORANGE, STYLE

GPU_COUNTS = tuple(8 * 2**i for i in range(10))  # 8 to 4,096


def scaling(run: PretrainingConfig, gpu: Gpu) -> list[Plan]:
    """The best plan that fits for 8 to 4,096 GPUs; numbers for which there is none are left out."""
    best = []
    for count in GPU_COUNTS:
        try:
            plans = find_plans(run, count, gpu)
        except ConfigError:  # the global batch has fewer images than replicas
            continue
        best += plans[:1] if plans[0].fits else []
    return best


def draw_scaling(run: PretrainingConfig, gpu: Gpu, path: Path) -> None:
    """Draw images/s and MFU of the best plans from 8 to 4,096 GPUs as a PNG.

    Raises:
        ConfigError: where no number of GPUs has a plan that fits, or ``path`` cannot be written.
    """
    plans = scaling(run, gpu)
    require(bool(plans), f"no plan of {run.recipe} fits into {gpu.memory_bytes / 1e9:.0f} GB on 8 to 4,096 GPUs.")
    counts = [plan.layout.gpus for plan in plans]
    rates = [plan.images_per_second for plan in plans]
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(8, 6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        ideal = [rates[0] / counts[0] * count for count in counts]
        top.plot(counts, ideal, color=GREY, linewidth=1.2, linestyle="--", label=f"linear from {counts[0]} GPUs")
        top.plot(counts, rates, color=BLUE, linewidth=2, marker="o", label="best plan (TP size, x micro-batch)")
        doubtful = [(plan.layout.gpus, plan.images_per_second) for plan in plans if plan.host_bound]
        if doubtful:
            hollow = {"linestyle": "none", "marker": "o", "markerfacecolor": "white", "markeredgecolor": BLUE}
            label = "too hopeful: the host launches kernels more slowly than they run"
            top.plot(*zip(*doubtful, strict=True), **hollow, label=label)  # type: ignore[arg-type]
        for plan in plans:
            layout = plan.layout
            name = f"TP {layout.tensor_parallel_size}\nx{layout.micro_batch_size}"
            point = (layout.gpus, plan.images_per_second)
            top.annotate(name, point, xytext=(0, -12), textcoords="offset points", va="top", ha="center", fontsize=8)
        title = f"{run.recipe} on {gpu.name}: predicted images/s, {run.global_batch_size:,} images a step"
        top.set(title=title, ylabel="images/s", xscale="log", yscale="log")
        top.margins(y=0.18)
        top.legend(loc="upper left")
        top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bottom.plot(counts, [plan.mfu for plan in plans], color=ORANGE, linewidth=2, marker="o")
        bottom.set(ylabel="MFU", xlabel="GPUs", ylim=(0, None))
        bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bottom.set_xticks(counts, [f"{count:,}" for count in counts])
        bottom.xaxis.set_minor_locator(NullLocator())
        try:
            with whole_or_absent(path) as partial:
                figure.savefig(partial, format="png", dpi=150)
        except OSError as error:
            raise ConfigError(f"--plot {path} cannot be written: {error.strerror or error}.") from error
