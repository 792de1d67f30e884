"""The README.md of an exported folder, made from the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_nepa import __version__
from megatron_nepa.checkpoint.reading.weights import Weights
from megatron_nepa.export.run_facts import RunFacts

_PAPER = "https://sihanxu.github.io/nepa"
_RELEASE = "https://github.com/SihanXU/nepa"
_USE = """```python
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("PATH")
model = {auto}.from_pretrained("PATH", trust_remote_code=True).eval()
inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
{use}
```"""
_FEATURES = """output = model(**inputs, output_hidden_states=True)
output.pooler_output       # [1, {width}], one embedding of the image: {pooling}
output.last_hidden_state   # [1, tokens, {width}], the {tokens}
output.hidden_states       # the residual stream before the first and after every block, without a LayerNorm"""
_CLASSES = """logits = model(**inputs).logits
model.config.id2label[logits.argmax(-1).item()]"""
_MASKS = """logits = model(**inputs).logits   # [1, classes, {side}, {side}], of the image squashed to one window
masks = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(480, 640)])"""
_TRUST = """`PATH` is this folder. The model's class is not part of transformers: it lies beside the weights in
`modeling_nepa.py`, and `trust_remote_code=True` lets transformers run that file on your machine. Read it before you do;
it imports torch and transformers alone. Without the argument nothing of it is run, and the model is not loaded. The
weights are safetensors, which run nothing."""


def model_card(weights: Weights, facts: RunFacts, pooling: str) -> str:
    """Markdown with the metadata that a model hub reads.

    Args:
        weights: what is exported.
        facts: of its run.
        pooling: what stands for an image, "last" or "mean".
    """
    model = weights.model
    task, auto, use = "image-feature-extraction", "AutoModel", ""
    if "classifier.weight" in weights.tensors:
        task, auto, use = "image-classification", "AutoModelForImageClassification", _CLASSES
    elif "decoder.head.classifier.weight" in weights.tensors:
        task, auto, use = "image-segmentation", "AutoModelForSemanticSegmentation", _MASKS.format(side=model.image_size)
    recipe = facts.run.get("recipe")
    parameters = sum(value.numel() for value in weights.tensors.values())
    shape = (
        f"{model.num_layers} blocks of width {model.hidden_size}, {model.num_heads} heads, {model.mlp} of width "
        f"{model.mlp_hidden_size}, patches of {model.patch_size} x {model.patch_size} pixels, images of "
        f"{model.image_size} x {model.image_size}; {parameters:,} parameters; "
        f"{'causal' if model.causal else 'bidirectional'} attention"
    )
    if not use:
        tokens = "BOS token and the patches" if model.bos_token else "patches"
        pooled = "the last token's" if pooling == "last" else "the mean of the patches'"
        use = _FEATURES.format(width=model.hidden_size, pooling=pooled, tokens=tokens)
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- nepa\n- vision\n- custom_code\n---",
        f"# NEPA vision transformer{f': {recipe}' if recipe else ''}",
        f"A Vision Transformer trained by next-embedding predictive autoregression ({_PAPER}): {shape}.",
        f"## Use\n\n{_USE.format(auto=auto, use=use)}\n\n{_TRUST}",
        f"## Training\n\n{_training(weights, facts)}",
        f"## Results\n\n{_results(facts)}",
        f"## Licence and provenance\n\n{_licence(facts)}",
    ]
    return "\n\n".join(sections) + "\n"


def _training(weights: Weights, facts: RunFacts) -> str:
    rows = {"weights": weights.origin if not facts.run else weights.origin.partition(" of ")[0]}
    run = facts.run
    if run:
        path = (run.get("data") or {}).get("path")
        optimizer = run.get("optimizer") or {}
        rows |= {
            "recipe": run["recipe"],
            "data": _basename(path) if path else "the photographs that come with the training code",
            "steps": f"{facts.step}, {facts.samples:,} images seen",
            "batch": run["global_batch_size"],
            "optimizer": f"{optimizer.get('name')}, base learning rate {optimizer.get('base_lr')} for a batch of 256",
            "precision": run["dtype"],
            "seed": run["seed"],
        }
        if run.get("init_from"):
            rows["started from"] = _basename(run["init_from"])
    if facts.versions:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    rows["exported by"] = f"megatron_nepa {__version__}"
    return _table(("", ""), [(name, str(value)) for name, value in rows.items()])


def _results(facts: RunFacts) -> str:
    if not facts.results:
        return "None was recorded beside this checkpoint."
    rows = []
    for settings, measured in facts.results:
        how = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        rows += [(name, f"{value:.6g}", how) for name, value in measured.items()]
    return _table(("measured", "value", "on what"), rows)


def _licence(facts: RunFacts) -> str:
    code = "`modeling_nepa.py` is part of megatron_nepa, under the Apache License 2.0."
    if facts.is_release:
        return (
            f"{code} The weights were converted from a model that the authors of NEPA released ({_RELEASE}); the "
            "licence that they were published under goes on to hold. Name it here before you publish them again."
        )
    start = facts.run.get("init_from")
    derived = f" They were trained on from `{_basename(start)}`, whose licence binds them too." if start else ""
    return (
        f"{code} The weights' licence is for those who trained them to give, and depends on the images that they were "
        f"trained on: name it here before you publish them.{derived}"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _basename(path: Any) -> str:
    """A path's last part: the rest is of the machine that trained."""
    return str(path).rstrip("/").rpartition("/")[2]
