"""Parameter groups and the learning rate of each at every step.

Pre-training has two groups with one rate. Fine-tuning gives every layer its own: the run's rate times
``rate ** power``, with a power that grows from the head to the patch embedding
(:class:`~megatron_nepa.config.LayerDecayConfig`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_nepa.config import LayerDecayConfig, OptimizerConfig, RunConfig
from megatron_nepa.training.engine.average_copy import ComputesWithAverage
from megatron_nepa.training.engine.schedule import warmup_decay

HEAD = "head"


@dataclass(frozen=True)
class Layer:
    """What the parameters of one layer have in common.

    Attributes:
        name: "all", "layer 3" or "head".
        power: of the layer decay; 0 is not decayed.
    """

    name: str
    power: int


class LearningRates:
    """Groups the trainable parameters of a run and gives every group its learning rate.

    Args:
        run: learning rate, warm-up, weight decay.
        total_steps: optimizer steps of the whole run.
        layer_decay: None treats all layers alike.
    """

    def __init__(self, run: RunConfig, total_steps: int, layer_decay: LayerDecayConfig | None = None) -> None:
        self.run = run
        self.total_steps = total_steps
        self.layer_decay = layer_decay
        self.warmup_steps = round(run.optimizer.warmup_ratio * total_steps)
        self._layers: dict[str, Layer] = {}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters of ``model`` as groups for an optimizer, each with "name" and "weight_decay".

        Biases, norms, LayerScale, the mask token and (unless ``decay_bos_token``) the BOS token are vectors and are not
        decayed. A model that computes with the average of its trunk has groups of the trunk alone, so that the average
        is joined without the rest.
        """
        optimizer = self.run.optimizer
        groups: dict[str, dict[str, Any]] = {}
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            layer = self._layer(name)
            if isinstance(model, ComputesWithAverage) and not name.startswith("trunk."):
                layer = Layer(HEAD, 0)
            decays = _decays(name, param, optimizer)
            kind = "decay" if decays else "no_decay"
            group = kind if layer.name == "all" else f"{layer.name}, {kind}"
            weight_decay = optimizer.weight_decay if decays else 0.0
            entry = groups.setdefault(group, {"name": group, "params": [], "weight_decay": weight_decay})
            entry["params"].append(param)
            self._layers[group] = layer
        return sorted(groups.values(), key=lambda group: group["name"])

    def at(self, step: int) -> dict[str, float]:
        """Learning rate of every group of :meth:`groups` after ``step`` completed steps."""
        return {group: self._rate(layer, step) for group, layer in self._layers.items()}

    def scale(self, power: int, step: int) -> float:
        """The factor ``rate ** power`` of the layer decay after ``step`` completed steps."""
        config = self.layer_decay
        if config is None:
            return 1.0
        rate = config.rate
        if config.rate_end is not None:
            progress = step / self.total_steps
            if config.ramp == "cosine":
                progress = 0.5 * (1 - math.cos(math.pi * progress))
            rate += (config.rate_end - rate) * progress
        return float(rate**power)

    def _rate(self, layer: Layer, step: int) -> float:
        config, optimizer = self.layer_decay, self.run.optimizer
        warmup = self.warmup_steps
        if config is not None and config.layerwise_warmup:
            # the top layer has next to none, the deepest nearly the whole
            warmup = max(1, warmup - round(warmup * config.rate**layer.power))
        peak = self.run.learning_rate * self.scale(layer.power, step)
        if layer.name == HEAD and config is not None and config.head_lr is not None:
            peak = config.head_lr
        return warmup_decay(step, self.total_steps, warmup, peak, optimizer.min_lr, optimizer.decay)

    def _layer(self, name: str) -> Layer:
        config = self.layer_decay
        if config is None:
            return Layer("all", 0)
        num_layers = self.run.model.num_layers
        # in the release the last block is not decayed, in BEiT and MAE the head alone
        shift = 0 if config.convention == "beit" else 1
        block = re.match(r"trunk\.blocks\.(\d+)\.", name)
        if block:
            number = int(block.group(1))
            return Layer(f"layer {number + 1:02d}", num_layers - number - shift)
        if name.startswith("trunk.embedding."):
            return Layer("layer 00", num_layers + 1 - shift)
        if name.startswith("fc_norm.") and config.convention == "release":
            return Layer("pooled norm", 0)
        return Layer(HEAD, 0)


def _decays(name: str, param: nn.Parameter, optimizer: OptimizerConfig) -> bool:
    return optimizer.decay_bos_token if name.endswith("bos_token") else param.ndim > 1
