"""The release's format holds every model that it has a place for, bit for bit, and refuses the others by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_nepa.checkpoint.conversion.release_folder import read_release, write_release
from megatron_nepa.config import ConfigError
from tests.export.models import EXAMPLES, expected, random_weights, some_images

HELD = (
    *("quickstart", "quickstart_ft", "quickstart_upernet", "nepa_b_release", "nepa_l_release"),
    *("imagenet_ft_b_release", "imagenet_ft_l_release"),
    *("ade20k_upernet_b_release", "ade20k_upernet_l_release"),
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_model_is_held_or_refused(name: str, tmp_path: Path) -> None:
    weights = random_weights(EXAMPLES[name])
    if name not in HELD:
        with pytest.raises(ConfigError, match=r"but the released model (has no learned positions|always)"):
            write_release(weights, tmp_path / "model")
        return
    write_release(weights, tmp_path / "model")
    back, _ = read_release(tmp_path / "model")
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(value, weights.tensors[key]) for key, value in back.tensors.items())
    images = some_images(weights.model)
    assert torch.equal(expected(back, images).tokens, expected(weights, images).tokens)
