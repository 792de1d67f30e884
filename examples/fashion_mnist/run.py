"""Does NEPA pre-training help on real photographs, on a small machine? Fashion-MNIST, one command.

    python examples/fashion_mnist/run.py

Pre-trains a small NEPA on the 60,000 training photographs without their labels; fine-tunes it on 1 %, 10 % and 100 % of
the labels; and trains the same network from scratch on the same labels for as many steps (more where there are more
labels): three seeds each, evaluated on the 10,000 test photographs. Writes results.json, table.md and accuracy.png to
--output_dir. The same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from examples.fashion_mnist.data import DEBIAN_FOLDER, PERCENTS, SIDE, prepare  # noqa: E402
from megatron_nepa.config import ConfigError, require  # noqa: E402
from megatron_nepa.terminal import tool  # noqa: E402
from megatron_nepa.training.reporting.metrics_file import read_metrics  # noqa: E402

SEEDS = (0, 1, 2)
STEPS = (300, 1500, 4000)  # of a fine-tuning or training, for each of PERCENTS
NETWORK = {
    "model.image_size": SIDE,
    "model.patch_size": 7,
    "model.hidden_size": 96,
    "model.num_layers": 4,
    "model.num_heads": 3,
    "model.mlp_hidden_size": 256,
    # the clothes are centred, so that it matters where a patch lies: RoPE alone tells distances
    "model.position_embedding": "learned",
    "model.bos_token": "false",
    # with the usual 0.02 and LayerScale the branches of so narrow a network start near 0: it learns more slowly
    "model.init_std": 0.05,
    "model.layer_scale_init": "none",
    "dtype": "fp32",
    "data.num_threads": 1,
    "data.horizontal_flip": "false",
    "stall_timeout": 0,
}
GLOBAL_BATCH_SIZE = 128  # of pre-training
PRETRAINING = {
    "recipe": "quickstart",
    "data.crop_scale_min": 1,
    "global_batch_size": GLOBAL_BATCH_SIZE,
    "optimizer.base_lr": 4e-3,  # 2e-3 after scaling by the batch
    "optimizer.warmup_ratio": 0.1,
    "optimizer.ema_decay": 0,
    "save_every": 500,
    "keep_last": 1,
    "log_every": 20,
}
FINETUNING = {  # and training from scratch
    "recipe": "imagenet_ft_b",
    "data.crop_scale_min": 0.9,
    "model.causal": "false",
    "model.drop_path": 0,
    "model.freeze_patch_embedding": "false",
    "head.pooling": "mean",
    "layer_decay.rate_end": "none",
    "global_batch_size": 64,
    "micro_batch_size": 64,
    "optimizer.base_lr": 12e-3,  # 3e-3 after scaling by the batch
    "optimizer.warmup_ratio": 0.1,
    "optimizer.ema_decay": 0,
    "augmentation.rand_augment": "none",
    "augmentation.random_erasing": 0,
    "augmentation.mixup": 0,
    "augmentation.cutmix": 0,
    "evaluation.every": 1_000_000,  # at the end alone
    "evaluation.batch_size": 250,
    "evaluation.resize_size": SIDE,
    "save_every": 1_000_000,
    "keep_last": 1,
    "log_every": 50,
}
# with the learning rate, the best of four settings each, at 1 % of the labels on 5,000 held-out training photographs
FROM_PRETRAINED = {"layer_decay.rate": 0.65, "init_weights": "raw"}
FROM_SCRATCH = {"layer_decay.rate": 1}


@dataclass(frozen=True)
class Training:
    """One run of fine-tuning, or of training from scratch."""

    percent: int
    seed: int
    pretrained: bool

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{'pretrained' if self.pretrained else 'scratch'}_{self.percent:03}_seed{self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, pre-train, fine-tune, report."""
    options = parse_arguments(arguments)
    require(options.jobs >= 1, f"--jobs is {options.jobs}; it must be at least 1.")
    # the scripts run in the project's folder
    options.data, options.output_dir = options.data.resolve(), options.output_dir.resolve()
    started = time.monotonic()
    prepare(options.source, options.data)
    pretrained = options.output_dir / "pretrained"
    pretrain(options, pretrained)
    trainings = [Training(percent, seed, start) for percent in PERCENTS for seed in SEEDS for start in (True, False)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda training: finetune(options, training, pretrained), trainings)
        accuracies = list(tqdm(results, total=len(trainings), desc="fine-tuning", unit=" runs"))
    from examples.fashion_mnist.report import write_report  # brings torch and matplotlib

    write_report(
        [(t.percent, t.pretrained, accuracy) for t, accuracy in zip(trainings, accuracies, strict=True)],
        options.output_dir,
        minutes=(time.monotonic() - started) / 60,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, default=DEBIAN_FOLDER, help=f"the data set's idx files ({DEBIAN_FOLDER})"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/fashion_mnist/data"), help="where JPEG files are kept")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/fashion_mnist"), help="runs and results")
    parser.add_argument("--pretrain_epochs", type=float, default=18, help="passes over the 60,000 photographs (18)")
    steps = f"of 64 images, of a training on {', '.join(map(str, PERCENTS))} %% of the labels {STEPS}"
    parser.add_argument("--steps", type=int, nargs=len(PERCENTS), default=STEPS, help=steps)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"trainings at a time, one core each ({cores})")
    return parser.parse_args(arguments)


def pretrain(options: argparse.Namespace, folder: Path) -> None:
    """Pre-train on all photographs, one process a core (a power of two); a finished run is left as it is."""
    ranks = 2 ** (min(options.jobs, 16).bit_length() - 1)
    flags = {
        **NETWORK,
        **PRETRAINING,
        "epochs": options.pretrain_epochs,
        "micro_batch_size": GLOBAL_BATCH_SIZE // ranks,
        "data": options.data / "train.index",
        "output_dir": folder,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    run_script([*launcher, "pretrain_nepa.py"], flags, console=True)


def finetune(options: argparse.Namespace, training: Training, pretrained: Path) -> float:
    """Train a classifier, unless it was trained before; its accuracy on the test photographs."""
    folder = options.output_dir / training.name
    flags = {
        **NETWORK,
        **FINETUNING,
        **(FROM_PRETRAINED if training.pretrained else FROM_SCRATCH),
        "steps": options.steps[PERCENTS.index(training.percent)],
        "seed": training.seed,
        "data": options.data / ("train.index" if training.percent == 100 else f"train_{training.percent}.index"),
        "validation_data": options.data / "test.index",
        "output_dir": folder,
    }
    if training.pretrained:
        flags["init_from"] = pretrained
    metrics = folder / "metrics.jsonl"
    if not (metrics.is_file() and "val_top1" in read_metrics(metrics)[-1]):
        run_script(["examples/finetune_classification.py"], flags, console=False)
    return float(read_metrics(metrics)[-1]["val_top1"])


def run_script(script: list[str], flags: dict[str, object], console: bool) -> None:
    """Run a training script on one core a process.

    Raises:
        ConfigError: where it fails, with the last line that it said.
    """
    command = [sys.executable, *script, *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    output = None if console else subprocess.PIPE
    done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=output, stderr=output, text=True, check=False)
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()
        raise ConfigError(f"{script[-1]} ended with status {done.returncode}: {said[-1] if said else 'see above'}")


if __name__ == "__main__":
    with tool("fashion_mnist"):
        main()
