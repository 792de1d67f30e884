"""Whether two checkpoints are the same model: their outputs on sample images, whatever their formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_nepa.checkpoint.conversion.huggingface_folder import is_huggingface, read_huggingface
from megatron_nepa.checkpoint.conversion.release_folder import is_release, read_release
from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN, fold_layer_scale
from megatron_nepa.checkpoint.reading.modules import build_module
from megatron_nepa.checkpoint.reading.weights import Choice, Weights, read_consolidated, read_weights
from megatron_nepa.config import ModelConfig, require
from megatron_nepa.data.index.builtin import photograph_files
from megatron_nepa.objectives.nepa import NepaForPretraining

_NUM_IMAGES = 4

Output = Literal["logit", "feature", "embedding"]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images, in fp32 and evaluation mode.

    Attributes:
        origins: what was compared.
        output: what was compared: "logit" where both are classifiers, "feature" where one is of another objective than
            NEPA's, else "embedding" (predicted ones).
        largest_difference: largest difference of any element.
        largest_value: largest element of the first model's, to judge it by.
        losses: next-embedding loss of each trunk; None where one is of another objective.
        tensors: largest difference of each tensor that both hold in one shape: of trunk, tokens, positions, head, and
            the buffers.
        mismatches: what else differs, in words: tensors of one side alone, other shapes, other dtypes.
        left_out: what an objective added to one side's trunk, in words, which is not compared.
    """

    origins: tuple[str, str]
    output: Output
    largest_difference: float
    largest_value: float
    losses: tuple[float, float] | None
    tensors: dict[str, float]
    mismatches: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def differences(self, tolerance: float) -> list[str]:
        """Everything that makes the two differ, in words; empty where they are the same within ``tolerance``."""
        found = [*self.mismatches]
        found += [f"{name} by {value:.3g}" for name, value in self.tensors.items() if not value <= tolerance]
        loss = 0.0 if self.losses is None else abs(self.losses[0] - self.losses[1])
        found += [f"the losses by {loss:.3g}"] if not loss <= tolerance else []
        if not self.largest_difference <= tolerance:
            found.append(
                f"{'an' if self.output == 'embedding' else 'a'} {self.output} by {self.largest_difference:.3g}"
            )
        return found


def compare(first: Path, second: Path, choice: Choice | None = None) -> Comparison:
    """Compare the tensors of two models of this project's or the release's format, and their outputs on photographs.

    Where one has LayerScale and the other has none, it is folded into the first one's layers to compare.

    Args:
        first: a checkpoint, an OUTPUT_DIR or the folder of a released model.
        second: the one to compare it with, likewise.
        choice: average or raw weights, where there are both; None takes the average where there is one.

    Raises:
        ConfigError: where one cannot be read, or their images or classes do not compare.
    """
    models = [read_any(path, choice) for path in (first, second)]
    a, b = (weights.model for weights in models)
    require(
        (a.image_size, a.patch_size, a.hidden_size) == (b.image_size, b.patch_size, b.hidden_size),
        f"{first} and {second} have no embeddings in common: image_size, patch_size, hidden_size are "
        f"{a.image_size}, {a.patch_size}, {a.hidden_size} and {b.image_size}, {b.patch_size}, {b.hidden_size}.",
    )
    structure = ("num_layers", "num_heads", "mlp", "mlp_hidden_size", "rope", "causal")
    differing = [
        f"{name} {getattr(a, name)} and {getattr(b, name)}"
        for name in structure
        if getattr(a, name) != getattr(b, name)
    ]
    require(not differing, f"{first} and {second} are other models, whatever their outputs: {'; '.join(differing)}.")
    for path, weights in zip((first, second), models, strict=True):
        require(
            any(name.startswith("trunk.") for name in weights.tensors),
            f"{path} holds no trunk, like a linear probe's checkpoint: there is nothing to compare.",
        )
    images = _sample_images(a)
    (embedding, loss), (other_embedding, other_loss) = (_run(weights, images) for weights in models)
    # a BOS token's output stands in the first place of each sample, if only one has it
    patches, other_patches = (x[:, -a.num_patches :] for x in (embedding, other_embedding))
    is_nepa = all(weights.objective in (None, "nepa") for weights in models)
    output: Output = "embedding" if is_nepa else "feature"
    ours, theirs = patches, other_patches
    if all("classifier.weight" in weights.tensors for weights in models):
        output = "logit"
        ours, theirs = (_logits(weights, images) for weights in models)
        require(
            ours.shape == theirs.shape,
            f"{first} tells {ours.shape[1]} classes apart and {second} {theirs.shape[1]}: there is nothing to compare.",
        )
    return Comparison(
        (models[0].origin, models[1].origin),
        output,
        (ours - theirs).abs().max().item(),
        ours.abs().max().item(),
        (loss, other_loss) if is_nepa else None,
        *_compare_tensors(*models),
    )


def read_any(path: Path, choice: Choice | None = None) -> Weights:
    """The weights of a checkpoint of this project's or the release's format, of a folder for transformers, or of a
    consolidated file.

    Raises:
        ConfigError: where ``path`` is none of them, or is damaged.
    """
    if path.is_file():  # holds one kind of weights, whatever the choice
        return read_consolidated(path)
    if is_huggingface(path):
        return read_huggingface(path)
    return read_release(path, choice)[0] if is_release(path) else read_weights(path, choice)


def _compare_tensors(first: Weights, second: Weights) -> tuple[dict[str, float], tuple[str, ...], tuple[str, ...]]:
    sides = []
    has_scale = [weights.model.layer_scale_init is not None for weights in (first, second)]
    for weights, scaled in zip((first, second), has_scale, strict=True):
        folds = scaled and not all(has_scale)
        tensors = fold_layer_scale(weights.tensors, weights.model)[0] if folds else weights.tensors
        sides.append({**tensors, **weights.buffers})
    ours, theirs = sides
    left_out = []
    for name, weights, side, other in (("A", first, ours, theirs), ("B", second, theirs, ours)):
        for module, count in weights.modules_of_the_objective().items():
            if not any(tensor.startswith(f"{module}.") for tensor in other):
                left_out.append(f"{module}.* ({count} tensors) of {name}'s objective, {weights.objective}")
                for tensor in [tensor for tensor in side if tensor.startswith(f"{module}.")]:
                    del side[tensor]
    mismatches = [f"{name} is in A alone" for name in sorted(ours.keys() - theirs.keys())]
    mismatches += [f"{name} is in B alone" for name in sorted(theirs.keys() - ours.keys())]
    differences = {}
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            mismatches.append(f"{name} is {tuple(a.shape)} in A and {tuple(b.shape)} in B")
            continue
        differences[name] = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        dtypes = [str(side.dtypes.get(name, value.dtype)) for side, value in ((first, a), (second, b))]
        if dtypes[0] != dtypes[1]:
            mismatches.append(f"{name} is stored as {dtypes[0]} in A and {dtypes[1]} in B")
    return differences, tuple(mismatches), tuple(left_out)


@torch.no_grad()
def _run(weights: Weights, images: Tensor) -> tuple[Tensor, float]:
    model = NepaForPretraining(weights.model).eval()
    trunk = {name: value for name, value in weights.tensors.items() if name.startswith("trunk.") and name != MASK_TOKEN}
    model.load_state_dict(trunk)
    output = model(images, torch.arange(images.shape[0]))
    return output.embeddings["prediction"].unflatten(0, (images.shape[0], -1)), output.loss.item()


@torch.no_grad()
def _logits(weights: Weights, images: Tensor) -> Tensor:
    model = build_module(weights, "classes")
    logits: Tensor = model(images, torch.arange(images.shape[0]))
    return logits


def _sample_images(model: ModelConfig) -> Tensor:
    """Photographs in [-1, 1], fp32 [4, 3, H, W]."""
    files = list(photograph_files())[:_NUM_IMAGES]
    size = (model.image_size, model.image_size)
    pixels = [np.asarray(Image.open(path).convert("RGB").resize(size), np.float32) for path in files]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
