"""The whole model through the Triton kernels, in the interpreter, and through FlashAttention-2's stand-in."""

from dataclasses import replace

import pytest
import torch

from megatron_nepa.config import ModelConfig, NepaObjective, ParallelConfig
from megatron_nepa.kernels.attention.flash import flash_attention_2
from megatron_nepa.kernels.dispatch import Kernels, select_kernels
from megatron_nepa.models.build import Build
from megatron_nepa.objectives.nepa import NepaForPretraining
from tests.kernels import flash_attn_stub

PAPER = ModelConfig(
    image_size=12,
    patch_size=4,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    mlp_hidden_size=40,
    drop_path=0.3,
)
RELEASE = replace(
    PAPER, position_embedding="none", bos_token=True, qk_norm="affine", rope_rescale=2.0, layer_scale_init=None
)


def build(config, kernels, dtype=torch.float32, checkpointing="none"):
    parallel = ParallelConfig(activation_checkpointing=checkpointing)
    model = NepaForPretraining(config, build=Build(parallel, kernels=kernels))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # at its initial 1e-5 nothing inside a branch would show
            parameter.data.uniform_(0.3, 0.7, generator=generator)
        elif "q_norm" in name or "k_norm" in name:
            parameter.data.normal_(generator=generator)
    return model.to(dtype).train()


def step(model, dtype=torch.float32):
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    output = model(images, torch.arange(2))
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.loss.detach(), tuple(output.metrics.values()), gradients


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])
def test_triton_equals_reference(config, checkpointing):
    loss, health, gradients = step(build(config, select_kernels("triton", "cpu"), checkpointing=checkpointing))
    expected_loss, expected_health, expected = step(build(config, Kernels()))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(health, expected_health, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), f"{name}: {error:.1e} of {gradient.norm():.1e}"


def test_triton_without_the_stop_gradient():
    def gradients(kernels):
        model = build(PAPER, kernels)
        model.objective = NepaObjective(stop_gradient=False)
        return step(model)[2]

    expected = gradients(Kernels())
    for name, gradient in gradients(select_kernels("triton", "cpu")).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_equals_sdpa(monkeypatch, causal):
    calls = flash_attn_stub.install(monkeypatch)
    config = replace(PAPER, hidden_size=128, causal=causal)
    flash = Kernels(attention=flash_attention_2(deterministic=False))
    loss, _, gradients = step(build(config, flash, torch.bfloat16), torch.bfloat16)
    expected_loss, _, expected = step(build(config, Kernels(), torch.bfloat16), torch.bfloat16)
    assert len(calls) == config.num_layers
    assert all(call == {"causal": causal, "deterministic": False} for call in calls)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_torch_compile_finds_no_graph_break(checkpointing):
    kernels = select_kernels("triton", "cpu")
    block = build(replace(RELEASE, drop_path=0.0), kernels, checkpointing=checkpointing).trunk.blocks[0]
    config = block.attention
    stream, normed = torch.randn(20, 64), torch.randn(20, 64, requires_grad=True)
    weight, bias, angles = torch.ones(64), torch.zeros(64), torch.randn(10, config.head_size // 2)
    arguments = (stream, normed, weight, bias, angles, torch.ones(2), None, None, 2, 10)

    def gradient(function):
        total, following = function(*arguments)
        return torch.autograd.grad(total.sin().sum() + following.cos().sum(), normed)[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(block), rtol=1e-5, atol=1e-6)
