"""The model against golden tensors of the authors' release (skipped where the folder of golden tensors is absent)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nepa.checkpoint.conversion.release_config import model_from_release
from megatron_nepa.checkpoint.conversion.release_folder import read_release, write_release
from megatron_nepa.checkpoint.format.release_names import from_release, to_release
from megatron_nepa.checkpoint.reading.weights import read_weights, write_weights
from megatron_nepa.config import ConfigError, ModelConfig
from megatron_nepa.objectives.nepa import NepaForPretraining

FOLDER = Path(os.environ.get("NEPA_PARITY_DIR", Path(__file__).parents[2] / "../shared/parity"))
CASES = ["pretrain_gelu_qkaffine_causal", "pretrain_swiglu_qkplain_causal"]

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no golden tensors of the release in {FOLDER}; set NEPA_PARITY_DIR to their folder"
)


def load_case(name: str) -> tuple[NepaForPretraining, dict[str, torch.Tensor], ModelConfig]:
    meta = json.loads((FOLDER / "meta.json").read_text())[name]
    config = model_from_release(meta)
    golden = load_file(FOLDER / f"{name}.safetensors")
    model = NepaForPretraining(config).eval()
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
    torch.testing.assert_close(
        output.embeddings["target"].view(2, period, -1), golden["out.input_embedding"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        output.embeddings["prediction"].view(2, period, -1), golden["out.last_hidden_state"], atol=1e-5, rtol=0
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


@pytest.mark.parametrize("name", [*CASES, "cls_bidir_pool"])
def test_a_released_folder_comes_back_bit_equal(name: str, tmp_path: Path) -> None:
    """As a user converts: the release, a checkpoint to start from, and the release's format again."""
    meta = json.loads((FOLDER / "meta.json").read_text())[name]
    golden = load_file(FOLDER / f"{name}.safetensors")
    released = {key.removeprefix("sd."): value for key, value in golden.items() if key.startswith("sd.")}
    (tmp_path / "release").mkdir()
    (tmp_path / "release/config.json").write_text(json.dumps(meta))
    save_file(released, tmp_path / "release/model.safetensors")

    weights, notes = read_release(tmp_path / "release")
    assert notes == []
    write_weights(weights, tmp_path / "start")
    write_release(read_weights(tmp_path / "start"), tmp_path / "again")
    back = load_file(tmp_path / "again/model.safetensors")
    assert back.keys() == released.keys()
    assert [key for key, value in back.items() if not torch.equal(value, released[key])] == []
    config = json.loads((tmp_path / "again/config.json").read_text())
    config["num_labels"] = len(config.get("label2id", {}))  # Hugging Face derives it from the labels
    meta.pop("loss", None)
    assert {key: config[key] for key in meta} == meta
