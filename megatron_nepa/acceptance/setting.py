"""What the parts are told: the device, and sizes that it takes in the time that there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nepa.benchmarks.results_page import Entry
from megatron_nepa.benchmarks.suite import ENTRIES
from megatron_nepa.config import ModelConfig, PretrainingConfig
from megatron_nepa.recipes import PRETRAINING_RECIPES

if TYPE_CHECKING:
    from megatron_nepa.acceptance.device_calls import Cuda

TOY = ModelConfig(image_size=56, hidden_size=64, num_heads=2, num_layers=2, mlp_hidden_size=96)
# the flags of a run that a CPU takes in seconds
TOY_FLAGS = (
    *("--model.image_size=56", "--model.hidden_size=64", "--model.num_layers=2", "--model.num_heads=2"),
    *("--model.mlp_hidden_size=96", "--model.layer_scale_init=0.5", "--data=synthetic", "--log_every=1"),
    *("--global_batch_size=8", "--micro_batch_size=4", "--optimizer.base_lr=0.02"),
)
_BY_NAME = {entry.name: entry for entry in ENTRIES}


@dataclass(frozen=True)
class Speed:
    """A model whose steps are timed.

    Attributes:
        title: in the report.
        recipe: of the model.
        peer_recipe: the release's, which the step in transformers computes as well.
        micro_batches: that are tried, up to the first that does not fit.
        entry: of the results page; empty for none.
    """

    title: str
    recipe: PretrainingConfig
    peer_recipe: PretrainingConfig
    micro_batches: tuple[int, ...]
    entry: str = ""


@dataclass(frozen=True)
class Setting:
    """A device and its sizes.

    Attributes:
        calls: to the device.
        work: folder for runs and their curves, kept while a report is continued.
        kernel_models: whose shapes the kernels are judged at, by title.
        kernel_batch: samples of those.
        run_flags: of the run that part 2 trains.
        run_steps: its optimizer steps.
        speeds: models whose steps part 3 times.
        kernel_entries: of the results page, by the title of the speed whose kernels they time.
        engine_entries: that part 3 has ``tools/benchmark.py`` measure.
        timed_steps: of each timing.
        decoded_images: in a batch of part 4.
        least_kernel_share: of the bandwidth of a copy, below which a kernel is slow.
        least_plan_share: of the planner's MFU, below which a step is slow.
    """

    calls: Cuda
    work: Path
    kernel_models: dict[str, ModelConfig]
    kernel_batch: int
    run_flags: tuple[str, ...]
    run_steps: int
    speeds: tuple[Speed, ...]
    kernel_entries: dict[str, str]
    engine_entries: tuple[Entry, ...]
    timed_steps: int
    decoded_images: int
    least_kernel_share: float
    least_plan_share: float


def setting(work: Path, rehearsal: bool) -> Setting:
    """Full sizes on a GPU, toy sizes elsewhere."""
    from megatron_nepa.acceptance.device_calls import device_calls  # brings torch

    calls = device_calls(rehearsal)
    return _full(calls, work) if calls.device.type == "cuda" else _toy(calls, work)


def _full(calls: Cuda, work: Path) -> Setting:
    recipes = {name: recipe() for name, recipe in PRETRAINING_RECIPES.items()}
    titles = {"B": "nepa_b", "L": "nepa_l", "7B": "nepa_7b", "L of the release": "nepa_l_release"}
    return Setting(
        calls=calls,
        work=work,
        kernel_models={title: recipes[name].model for title, name in titles.items()},
        kernel_batch=8,
        run_flags=(
            *("--recipe=nepa_b", "--data=synthetic", "--dtype=bf16", "--log_every=1"),
            *("--global_batch_size=128", "--micro_batch_size=16"),
        ),
        run_steps=20,
        speeds=(
            Speed("B", recipes["nepa_b"], recipes["nepa_b_release"], (64, 128, 256), "gpu_b_plain"),
            Speed("L", recipes["nepa_l"], recipes["nepa_l_release"], (32, 64, 128), "gpu_l_plain"),
        ),
        kernel_entries={"B": "gpu_kernels_b", "L": "gpu_kernels_l"},
        engine_entries=tuple(_BY_NAME[name] for name in ("gpu_b", "gpu_l", "gpu_b_compile", "gpu_l_compile")),
        timed_steps=10,
        decoded_images=128,
        least_kernel_share=0.6,
        least_plan_share=2 / 3,
    )


def _toy(calls: Cuda, work: Path) -> Setting:
    recipe = replace(PRETRAINING_RECIPES["quickstart"](), model=replace(TOY, bos_token=True, position_embedding="none"))
    command = ("train", "--ds_config", "ds_configs/zero2.json", "--micro_batch_size", "2", "--rounds", "1")
    return Setting(
        calls=calls,
        work=work,
        kernel_models={"toy": TOY},
        kernel_batch=2,
        run_flags=(*TOY_FLAGS, "--dtype=fp32"),
        run_steps=4,
        speeds=(Speed("toy", recipe, recipe, (2, 4)),),
        kernel_entries={"toy": ""},
        engine_entries=(Entry("toy", "quickstart", "cpu", (*command, "--timed_steps", "1", "--no_ceiling")),),
        timed_steps=2,
        decoded_images=8,
        # a CPU is no measure: what is slower than this was slowed down on purpose
        least_kernel_share=1e-5,
        least_plan_share=1e-5,
    )
