"""peft's LoRA on an exported folder, as docs/use_elsewhere.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from megatron_nepa.export.huggingface import write_huggingface
from megatron_nepa.export.run_facts import RunFacts
from tests.export.models import EXAMPLES, difference, random_weights, some_images

peft = pytest.importorskip("peft", reason="peft is not installed (extra lora)")


def test_lora_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = random_weights(EXAMPLES["nepa_b"])
    write_huggingface(weights, RunFacts(), tmp_path / "model")

    def load() -> torch.nn.Module:
        return AutoModelForImageClassification.from_pretrained(tmp_path / "model", trust_remote_code=True, num_labels=3)

    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(load(), adapters)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * weights.model.num_layers + 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images, labels = some_images(weights.model), torch.tensor([0, 2])
    losses = []
    for _ in range(10):
        loss = model(pixel_values=images, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    wanted = model(pixel_values=images).logits
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert difference(again(pixel_values=images).logits, wanted) < 1e-6
    assert difference(again.merge_and_unload()(pixel_values=images).logits, wanted) < 1e-5
