"""The Python blocks of docs/use_elsewhere.md run, one after the other; one with a title needs another framework."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.export.timm_folder import write_timm
from tests.export.models import EXAMPLES, Example, random_weights

PAGE = Path(__file__).parents[2] / "docs/use_elsewhere.md"


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    weights = random_weights(Example(replace(EXAMPLES["quickstart"].model, num_layers=4), ""))
    monkeypatch.chdir(tmp_path)
    write_huggingface(weights, RunFacts(), Path("quickstart_hf"))
    write_timm(weights, RunFacts(), Path("quickstart_timm"))
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 60.0, 50.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 96, dtype=torch.uint8),
    }
    names = {"image": Image.new("RGB", (80, 60)), "images": [torch.rand(3, 64, 96)], "targets": [target]}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(
            compile(block.replace("min_size=800, max_size=1333", "min_size=64, max_size=96"), str(PAGE), "exec"), names
        )
    assert {"output", "upernet", "maps", "whole", "losses"} <= names.keys()
