"""Parameter groups, the weight average, and the choice of Adam."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch

from megatron_nepa.config import ModelConfig, NepaObjective, OptimizerConfig, RunConfig
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.training.engine.ema import ExponentialMovingAverage
from megatron_nepa.training.engine.learning_rates import LearningRates
from megatron_nepa.training.engine.optimizer import build_optimizer, optimizer_extensions
from tests.distributed.cases import MODEL


def grouped_names(model_config: ModelConfig, config: OptimizerConfig) -> dict[str, set[str]]:
    objective = NepaObjective(mask_ratio=0.4)
    model = NepaForPretraining(model_config, objective)
    name_of = {id(param): name for name, param in model.named_parameters()}
    groups = LearningRates(RunConfig(model=model_config, optimizer=config, steps=1), total_steps=1).groups(model)
    return {group["name"]: {name_of[id(param)] for param in group["params"]} for group in groups}


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = grouped_names(MODEL, OptimizerConfig())
    block = "trunk.blocks.0."
    assert groups["decay"] == {
        "trunk.embedding.weight",
        "trunk.embedding.positions",
        *(f"trunk.blocks.{i}.attention.{part}.weight" for i in (0, 1) for part in ("qkv", "out")),
        *(f"trunk.blocks.{i}.feed_forward.{part}.weight" for i in (0, 1) for part in ("up", "down")),
    }
    for name in ("attention.qkv.bias", "layer_scale1", "norm1.weight", "attention.q_norm", "feed_forward.down.bias"):
        assert block + name in groups["no_decay"]
    assert {"trunk.embedding.bos_token", "trunk.embedding.mask_token", "trunk.norm.weight"} <= groups["no_decay"]


def test_the_release_decays_its_bos_token() -> None:
    assert "trunk.embedding.bos_token" in grouped_names(MODEL, OptimizerConfig(decay_bos_token=True))["decay"]


def test_a_frozen_patch_embedding_is_not_optimised() -> None:
    groups = grouped_names(replace(MODEL, freeze_patch_embedding=True), OptimizerConfig())
    assert not {"trunk.embedding.weight", "trunk.embedding.bias"} & (groups["decay"] | groups["no_decay"])


def test_the_cpu_optimizer_is_torchs_fused_adamw() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([{"params": [param]}], OptimizerConfig(beta2=0.9), torch.device("cpu"), offload=False)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_equals_its_definition(warmup: bool) -> None:
    masters = [torch.randn(7), torch.randn(3)]
    config = OptimizerConfig(ema_decay=0.9, ema_warmup=warmup).average_decay
    average = ExponentialMovingAverage(masters, config)
    expected = copy.deepcopy(masters)
    initial_share = 1.0
    for step in range(1, 20):
        for master in masters:
            master.add_(torch.randn_like(master))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = [decay * e + (1 - decay) * m for e, m in zip(expected, masters, strict=True)]
        initial_share *= decay
        assert config.initial_share(step) == pytest.approx(initial_share, abs=1e-6)
    torch.testing.assert_close(average.tensors, expected)


@pytest.mark.parametrize("offload", [False, True])
def test_an_extension_that_cannot_be_built(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc DeepSpeed raises an exception of its own: torch's AdamW serves, and under offload one sentence."""
    from megatron_nepa.training.engine import extensions

    class Builder:
        def load(self, verbose: bool) -> None:
            raise OSError("CUDA_HOME environment variable is not set.\nPlease set it.")

    class Accelerator:
        def create_op_builder(self, name: str) -> Builder:
            return Builder()

    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", Accelerator)
    monkeypatch.setattr(extensions, "on_all_ranks", lambda topology, work: [None, work()])
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unused")
    cuda = torch.device("cuda")
    reason = extensions.build_extensions(optimizer_extensions(cuda, offload), None)  # type: ignore[arg-type]
    assert reason == "CUDA_HOME environment variable is not set. Please set it."
    if not offload:
        groups = [{"params": [torch.nn.Parameter(torch.ones(3))]}]
        optimizer = build_optimizer(groups, OptimizerConfig(), cuda, offload, built=False)
        assert type(optimizer) is torch.optim.AdamW
