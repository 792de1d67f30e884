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
from megatron_nepa.checkpoint.saving.store import beside
from megatron_nepa.config import require
from megatron_nepa.export.model_card import model_card
from megatron_nepa.export.preprocessor import PREPROCESSOR_FILE, evaluation_preprocessor
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.models.segmenter import tapped_blocks

_HEADS = ("fc_norm", "classifier")


def write_huggingface(weights: Weights, facts: RunFacts, folder: Path) -> list[str]:
    """Write config.json, the model's source, weights, preprocessor and model card; all of it or nothing.

    Args:
        weights: of a trunk, a classifier, or a segmenter, of which the trunk alone is written, as a backbone.
        facts: of their run.
        folder: that must not exist.

    Returns:
        What a user should know of the conversion.

    Raises:
        ConfigError: where ``folder`` exists, or there is no trunk.
    """
    require(not folder.exists(), f"{folder} exists: choose another name for the result.")
    weights, left_out = exportable(weights)
    model, tensors = weights.model, weights.tensors
    classes = tensors["classifier.weight"].shape[0] if "classifier.weight" in tensors else 0
    pooling = "mean" if "fc_norm.weight" in tensors else "last"
    architecture = "NepaForImageClassification" if classes else "NepaBackbone" if left_out else "NepaModel"
    config: dict[str, Any] = model_to_huggingface(model, architecture)
    config |= {"pooling": pooling, "use_mask_token": MASK_TOKEN in tensors}
    if classes:
        config |= label_names(facts.classes, classes)
    if left_out:  # the stages that the segmenter's heads read; where blocks are few, one may be read twice
        config["out_indices"] = sorted({block + 1 for block in tapped_blocks(model.num_layers)})
    state = rename(tensors, huggingface_names(model, tensors))
    for name, value in state.items():
        if name.endswith(TOKENS):
            state[name] = value.reshape(1, -1, model.hidden_size)

    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, values in (
        (CONFIG_FILE, config),
        (PREPROCESSOR_FILE, evaluation_preprocessor(model, facts.run)),
    ):
        (partial / file).write_text(json.dumps(values, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), partial / MODELING_FILE)
    (partial / "README.md").write_text(model_card(weights, facts, pooling))
    # the parts of a fused tensor share its memory, which safetensors refuses
    write_safetensors({name: value.clone() for name, value in state.items()}, partial / MODEL_FILE, {"format": "pt"})
    partial.rename(folder)
    notes = [] if not left_out else [f"left out, a backbone has no such head: {', '.join(left_out)}"]
    return [*notes, *([] if facts.classes or not classes else ["the classes have no names: LABEL_0 and so on"])]


def exportable(weights: Weights) -> tuple[Weights, list[str]]:
    """The part of a model that other frameworks have a place for, and the modules that are left out.

    Raises:
        ConfigError: for a checkpoint without a trunk.
    """
    modules = {name.partition(".")[0] for name in weights.tensors}
    require(
        "trunk" in modules,
        "the checkpoint holds no trunk, like a linear probe's: convert the trunk's own checkpoint.",
    )
    left_out = sorted(f"{module}.*" for module in modules - {"trunk", *_HEADS})
    kept = {name: value for name, value in weights.tensors.items() if name.partition(".")[0] in ("trunk", *_HEADS)}
    return Weights(weights.model, kept, weights.origin), left_out
