"""The model against golden tensors of the authors' release (skipped where the folder of golden tensors is absent)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_nepa.checkpoint.release_format import from_release, to_release
from megatron_nepa.config import ConfigError, ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.nepa import NepaForPretraining
from megatron_nepa.parallel.topology import TensorGroup

FOLDER = Path(os.environ.get("NEPA_PARITY_DIR", Path(__file__).parents[2] / "../shared/parity"))
CASES = ["pretrain_gelu_qkaffine_causal", "pretrain_swiglu_qkplain_causal"]

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no golden tensors of the release in {FOLDER}; set NEPA_PARITY_DIR to their folder"
)


def load_case(name: str) -> tuple[NepaForPretraining, dict[str, torch.Tensor], ModelConfig]:
    meta = json.loads((FOLDER / "meta.json").read_text())[name]
    config = ModelConfig(
        image_size=meta["image_size"],
        patch_size=meta["patch_size"],
        hidden_size=meta["hidden_size"],
        num_layers=meta["num_hidden_layers"],
        num_heads=meta["num_attention_heads"],
        mlp="swiglu" if meta.get("use_gated_mlp") else "gelu",
        mlp_hidden_size=meta["intermediate_size"],
        qk_norm="affine" if meta.get("qk_norm_affine") else "plain",
        position_embedding="none",
        bos_token=True,
    )
    golden = load_file(FOLDER / f"{name}.safetensors")
    model = NepaForPretraining(config, ObjectiveConfig(), ParallelConfig(), 0, TensorGroup(), Kernels()).eval()
    released = {key.removeprefix("sd."): value for key, value in golden.items() if key.startswith("sd.")}
    model.load_state_dict(from_release(released, config))
    return model, golden, config


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_reproduce_the_release(name: str) -> None:
    model, golden, config = load_case(name)
    streams: list[torch.Tensor] = []
    for block in model.trunk.blocks:
        block.register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0]))

    output = model(golden["in.pixel_values"], torch.arange(2))
    output.loss.backward()

    period = config.sequence_length
    assert len(streams) == config.num_layers
    for i, stream in enumerate(streams):
        torch.testing.assert_close(stream.view(2, period, -1), golden[f"out.hidden_{i}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.target.view(2, period, -1), golden["out.input_embedding"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        output.prediction.view(2, period, -1), golden["out.last_hidden_state"], atol=1e-5, rtol=0
    )
    assert abs(output.loss.item() - golden["out.loss"].item()) <= 1e-7

    gradients = to_release({key: param.grad for key, param in model.named_parameters()}, config)
    expected = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        assert (gradients[key] - value).norm() <= 1e-5 * value.norm().clamp_min(1e-12), key


def test_a_key_that_does_not_fit_is_named() -> None:
    model, _, config = load_case(CASES[0])
    released = to_release(model.state_dict(), config)
    released["vit_nepa.extra"] = released.pop("vit_nepa.layernorm.bias")
    with pytest.raises(ConfigError, match=r"vit_nepa\.layernorm\.bias.*vit_nepa\.extra"):
        from_release(released, config)


@pytest.mark.parametrize("name", CASES)
def test_conversion_is_lossless(name: str) -> None:
    model, golden, config = load_case(name)
    back = to_release(model.state_dict(), config)
    for key, value in back.items():
        assert torch.equal(value, golden[f"sd.{key}"]), key
