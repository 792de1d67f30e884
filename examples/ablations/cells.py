"""What the study trains: pre-trainings, and the accuracies that are measured from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.fashion_mnist.run import (
    FINETUNING,
    FROM_PRETRAINED,
    FROM_SCRATCH,
    GLOBAL_BATCH_SIZE,
    NETWORK,
    PRETRAINING,
)

Flags = dict[str, object]
Use = Literal["fine-tuning", "probe"]  # of a trunk
Split = Literal["test", "held_out"]  # the 10,000 test photographs; 5,000 training photographs without use otherwise
FINETUNING_RATE = 12e-3  # before scaling by the batch; so are those of pre-training
PRETRAINING_RATE = 4e-3

# the trunk is that of examples/fashion_mnist for all objectives; decoder and predictor are as narrow and shallow beside
# it as their papers' beside ViT-B
_SAME_TRUNK: Flags = {"model.rope": "true", "model.mlp": "swiglu", "model.qk_norm": "plain"}
OBJECTIVES: dict[str, Flags] = {
    "nepa": {},
    "mae": {
        **_SAME_TRUNK,
        "recipe": "mae_b",
        "model.causal": "false",
        "objective.decoder_hidden_size": 64,
        "objective.decoder_layers": 2,
        "objective.decoder_heads": 2,
        "objective.decoder_mlp_hidden_size": 176,
    },
    "jepa": {
        **_SAME_TRUNK,
        "recipe": "jepa_b",
        "model.causal": "false",
        "optimizer.ema_decay": 0.996,
        "objective.predictor_hidden_size": 48,
        "objective.predictor_num_layers": 2,
        "objective.predictor_num_heads": 3,
    },
    "aim": {**_SAME_TRUNK, "recipe": "aim_b"},
}
PROBING: Flags = {  # a linear layer on the frozen trunk, on the photographs that fine-tuning sees
    "recipe": "quickstart_probe",
    "trunk.weights": "raw",
    **{name: FINETUNING[name] for name in ("data.crop_scale_min", "global_batch_size", "micro_batch_size")},
    **{name: FINETUNING[name] for name in FINETUNING if name.startswith(("evaluation.", "save_", "keep_", "log_"))},
    **{name: NETWORK[name] for name in ("data.num_threads", "data.horizontal_flip", "dtype", "stall_timeout")},
}
# I-JEPA's encoder is the average of the one that is trained
_WEIGHTS = {"jepa": "ema"}


def frozen(flags: Flags) -> tuple[tuple[str, object], ...]:
    """Flags as a value that can be compared and hashed."""
    return tuple(sorted(flags.items()))


def batch_size(flags: Flags) -> int:
    """Photographs of a step of the training that the flags make."""
    return int(str(flags["global_batch_size"]))


def peak_rate(flags: Flags) -> float:
    """The highest learning rate of that training, after scaling by the batch."""
    return float(str(flags["optimizer.base_lr"])) * batch_size(flags) / 256


def key_of(value: object) -> str:
    """Twelve characters that name settings: equal for equal ones, on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Pretraining:
    """One pre-training on the 60,000 photographs without their labels.

    Attributes:
        objective: a key of OBJECTIVES.
        changes: flags that differ from the study's.
        steps: of 128 photographs.
        seed: of weights, order and draws.
    """

    objective: str
    changes: tuple[tuple[str, object], ...]
    steps: int
    seed: int

    @property
    def flags(self) -> Flags:
        """All flags but those that say where its data and output lie."""
        return {
            **NETWORK,
            **PRETRAINING,
            **OBJECTIVES[self.objective],
            "log_every": 1,
            "save_every": 1000,
            "micro_batch_size": GLOBAL_BATCH_SIZE,
            **dict(self.changes),
            "steps": self.steps,
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """Its name in the results."""
        return key_of(self.flags)

    @property
    def learning_rate(self) -> float:
        """At its peak, after scaling by the batch."""
        return peak_rate(self.flags)


@dataclass(frozen=True)
class Cell:
    """One accuracy with 10 % of the labels: a fine-tuning, from a pre-training or from scratch, or a linear probe.

    Attributes:
        start: the pre-training, or None: from scratch.
        steps: of fine-tuning or of the probe, of 64 photographs.
        seed: of the head's weights, order and draws.
        changes: flags that differ from the study's fine-tuning or probe.
        split: photographs that are classified at the end.
        percent: of the training labels.
        use: whether the trunk is fine-tuned, or frozen under a linear layer.
    """

    start: Pretraining | None
    steps: int
    seed: int
    changes: tuple[tuple[str, object], ...] = field(default=())
    split: Split = "test"
    percent: int = 10
    use: Use = "fine-tuning"

    @property
    def flags(self) -> Flags:
        """All flags but those that say where its data, weights and output lie."""
        flags = {**NETWORK, **FINETUNING}
        if self.use == "probe":
            flags = PROBING
        elif self.start is not None:  # the checkpoint says what its network is
            flags = {name: value for name, value in flags.items() if name not in NETWORK or "model." not in name}
            flags |= {"model.causal": "false", "model.drop_path": 0}
            flags |= FROM_PRETRAINED | {"init_weights": _WEIGHTS.get(self.start.objective, "raw")}
        else:
            flags |= FROM_SCRATCH
        return {
            **flags,
            **dict(self.changes),
            "steps": self.steps,
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """Its name in the results."""
        start = self.start.key if self.start is not None else None
        return key_of([start, self.flags, self.split, self.percent])

    @property
    def learning_rate(self) -> float:
        """At its peak, after scaling by the batch: of the pre-training or, from scratch, of its own."""
        return peak_rate(self.flags) if self.start is None else self.start.learning_rate

    @property
    def pretrained(self) -> Pretraining:
        """The pre-training of a cell that has one."""
        assert self.start is not None
        return self.start

    def data(self, folder: Path) -> Flags:
        """The flags that say where its data lies."""
        return {"data": folder / f"train_{self.percent}.index", "validation_data": folder / f"{self.split}.index"}
