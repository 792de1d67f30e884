"""Writing a self-contained folder that Hugging Face transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_nepa.checkpoint.conversion.huggingface_config import MODELING_FILE, model_to_huggingface
from megatron_nepa.checkpoint.conversion.huggingface_folder import CONFIG_FILE
from megatron_nepa.checkpoint.conversion.release_config import label_names
from megatron_nepa.checkpoint.format.huggingface_names import TOKENS, huggingface_names
from megatron_nepa.checkpoint.format.release_names import MASK_TOKEN
from megatron_nepa.checkpoint.format.renaming import rename
from megatron_nepa.checkpoint.format.safetensors_file import write_safetensors
from megatron_nepa.checkpoint.reading.tensor_files import MODEL_FILE
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.checkpoint.saving.checkpoints_folder import beside
from megatron_nepa.config import require
from megatron_nepa.export.model_card import model_card
from megatron_nepa.export.preprocessor import PREPROCESSOR_FILE, evaluation_preprocessor, segmentation_preprocessor
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.models.segmenter import tapped_blocks

_HEADS = ("fc_norm", "classifier")
# the tensor that has a row for every class, and the class of modeling_nepa.py that it makes the model
_CLASSIFIERS = {
    "classifier.weight": "NepaForImageClassification",
    "decoder.head.classifier.weight": "NepaForSemanticSegmentation",
}


def write_huggingface(weights: Weights, facts: RunFacts, folder: Path) -> list[str]:
    """Write config.json, the model's source, weights, preprocessor and model card; all of it or nothing.

    Args:
        weights: of a trunk, a classifier or a segmenter.
        facts: of their run.
        folder: that must not exist.

    Returns:
        What a user should know of the conversion.

    Raises:
        ConfigError: where ``folder`` exists, or there is no trunk.
    """
    require(not folder.exists(), f"{folder} exists: choose another name for the result.")
    weights, left_out = exportable(weights, (*_HEADS, "decoder"))
    model, tensors = weights.model, {**weights.tensors, **weights.buffers}
    head = next((name for name in _CLASSIFIERS if name in tensors), "")
    classes = tensors[head].shape[0] if head else 0
    pooling = "mean" if "fc_norm.weight" in tensors else "last"
    config: dict[str, Any] = model_to_huggingface(model, _CLASSIFIERS.get(head, "NepaModel"))
    config |= {"pooling": pooling, "use_mask_token": MASK_TOKEN in tensors}
    if classes:
        config |= label_names(facts.classes, classes)
    is_segmenter = _CLASSIFIERS.get(head) == "NepaForSemanticSegmentation"
    if is_segmenter:  # as a backbone, the stages that the heads read; where blocks are few, one may be read twice
        config["out_indices"] = sorted({block + 1 for block in tapped_blocks(model.num_layers)})
    shown = segmentation_preprocessor if is_segmenter else evaluation_preprocessor
    state = rename(tensors, huggingface_names(model, tensors))
    for name, value in state.items():
        if name.endswith(TOKENS):
            state[name] = value.reshape(1, -1, model.hidden_size)

    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, values in (
        (CONFIG_FILE, config),
        (PREPROCESSOR_FILE, shown(model, facts.run)),
    ):
        (partial / file).write_text(json.dumps(values, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), partial / MODELING_FILE)
    (partial / "README.md").write_text(model_card(weights, facts, pooling))
    # the parts of a fused tensor share its memory, which safetensors refuses
    write_safetensors({name: value.clone() for name, value in state.items()}, partial / MODEL_FILE, {"format": "pt"})
    partial.rename(folder)
    notes = [] if not left_out else [f"left out, transformers has no such head: {', '.join(left_out)}"]
    return [*notes, *([] if facts.classes or not classes else ["the classes have no names: LABEL_0 and so on"])]


def exportable(weights: Weights, heads: tuple[str, ...] = _HEADS) -> tuple[Weights, list[str]]:
    """The part of a model that a format has a place for, and the modules that are left out.

    Args:
        weights: of any task.
        heads: modules beside the trunk that the format holds.

    Raises:
        ConfigError: for a checkpoint without a trunk.
    """
    modules = {name.partition(".")[0] for name in weights.tensors}
    require(
        "trunk" in modules,
        "the checkpoint holds no trunk, like a linear probe's: convert the trunk's own checkpoint.",
    )
    held = ("trunk", *heads)
    kept, buffers = (
        {name: value for name, value in state.items() if name.partition(".")[0] in held}
        for state in (weights.tensors, weights.buffers)
    )
    left_out = sorted(f"{module}.*" for module in modules - set(held))
    return Weights(weights.model, kept, weights.origin, buffers), left_out
