"""Run the pre-training script inside a test: on forked ranks, so that nothing is imported twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data as photographs

from megatron_nepa.config import SHORT_NAMES
from megatron_nepa.config.modes import TRAINING

TINY = [
    "--model.image_size=56",
    "--model.hidden_size=32",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--model.mlp_hidden_size=48",
    "--model.layer_scale_init=0.5",
    "--model.drop_path=0.2",
    "--objective.mask_ratio=0.2",
    "--global_batch_size=8",
    "--micro_batch_size=4",
    "--dtype=fp32",
    "--data.num_threads=1",
]


def make_images(folder: Path, count: int = 20) -> Path:
    """A flat folder of JPEG crops of a photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    photograph = photographs.astronaut()
    for i in range(count):
        top, left = np.random.default_rng(i).integers(0, 512 - 96, 2)
        Image.fromarray(photograph[top : top + 96, left : left + 96]).save(folder / f"{i:03}.jpg", quality=90)
    return folder


def pretrain(arguments: list[str], fault: Callable[[], None] | None = None) -> str | None:
    """Call the script's main function on this rank.

    Args:
        arguments: flags.
        fault: called first, to break something.

    Returns:
        None, or "ConfigError: ..." and the like for an error that a user would see.
    """
    from pretrain_nepa import main

    if fault is not None:
        fault()
    return call_script(main, arguments)


def call_script(main: Callable[[list[str]], None], arguments: list[str]) -> str | None:
    """Call a training script's main function: None, or "ConfigError: ..." for an error that a user would see."""
    from megatron_nepa.config import ConfigError
    from megatron_nepa.training.stopping.errors import RankTrainingError, RunStopped, TrainingError

    try:
        main(arguments)
    except (ConfigError, TrainingError, RankTrainingError, RunStopped) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_training(flags: list[str]) -> list[str]:
    """A run's flags without those that an evaluation of it alone has no use for."""
    names = {short: name for name, short in SHORT_NAMES.items()}

    def serves_training(flag: str) -> bool:
        name = flag.removeprefix("--").partition("=")[0]
        name = names.get(name, name)
        return name in TRAINING or name.partition(".")[0] in TRAINING

    return [flag for flag in flags if not serves_training(flag)]


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


def kill_in_step(step: int) -> None:
    """Make the engine die in the middle of optimizer step number ``step``, counted from 1."""
    from megatron_nepa.training.engine.engine import TrainingEngine

    real, calls = TrainingEngine.step, [0]

    def dying(self: TrainingEngine, learning_rate: float) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise Killed
        return real(self, learning_rate)

    TrainingEngine.step = dying  # type: ignore[method-assign]


def signal_in_step(step: int) -> None:
    """Send this process SIGTERM during optimizer step number ``step``."""
    from megatron_nepa.training.engine.engine import TrainingEngine

    real, calls = TrainingEngine.step, [0]

    def signalled(self: TrainingEngine, learning_rate: float) -> Any:
        calls[0] += 1
        if calls[0] == step:
            signal.raise_signal(signal.SIGTERM)
        return real(self, learning_rate)

    TrainingEngine.step = signalled  # type: ignore[method-assign]


def poison_from_step(step: int) -> None:
    """Make every gradient from optimizer step number ``step`` on non-finite, through the images."""
    import torch

    from megatron_nepa.tasks.pretraining import PretrainingTask

    real, calls = PretrainingTask.forward, [0]

    def poisoned(self: PretrainingTask, engine: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] > (step - 1) * engine.accumulation_steps:
            batch.images.fill_(torch.nan)
        return real(self, engine, batch)

    PretrainingTask.forward = poisoned  # type: ignore[method-assign]
