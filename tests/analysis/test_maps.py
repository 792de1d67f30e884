"""Maps of an image: attention, similarity and predictions are what the model computed, patch for patch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from megatron_nepa.analysis.images import to_tensor
from megatron_nepa.analysis.maps import compute_maps
from megatron_nepa.config import ConfigError, ModelConfig
from tests.analysis.models import MODEL, build, pixels_of, weights_of

ROWS, COLUMNS = 3, 5
QUERIES = [(0, 0), (1, 4), (2, 1)]
PIXELS = pixels_of(ROWS, COLUMNS)
WITHOUT_BOS = replace(MODEL, bos_token=False)


@pytest.mark.parametrize("model", [MODEL, WITHOUT_BOS], ids=["BOS", "no BOS"])
def test_maps_against_the_model(model: ModelConfig) -> None:
    nepa = build(model)
    maps = compute_maps(weights_of(nepa), PIXELS, QUERIES)
    with torch.no_grad():
        output = nepa(to_tensor(PIXELS), torch.zeros(1, dtype=torch.int64))
    bos = int(model.bos_token)
    prediction, target = normalize(output.embeddings["prediction"]), normalize(output.embeddings["target"][bos:])

    assert maps.grid == (ROWS, COLUMNS)
    assert maps.causal
    for i, (y, x) in enumerate(QUERIES):
        expected = (target @ prediction[bos + y * COLUMNS + x]).view(ROWS, COLUMNS)
        np.testing.assert_allclose(maps.similarity[i], expected, atol=1e-6)
        # the query's prediction stands where it is judged: at the next patch
        next_patch = maps.next_patch(i)
        assert maps.next_cosine[next_patch] == pytest.approx(maps.similarity[i][next_patch], abs=1e-6)
    assert [maps.next_patch(i) for i in range(3)] == [(0, 1), (2, 0), (2, 2)]
    assert np.isnan(maps.next_cosine[0, 0]) == (not model.bos_token)
    assert np.nanmean(maps.next_cosine) == pytest.approx(-output.loss.item(), abs=1e-6)

    repeat = (target[:-1] * target[1:]).sum(1)
    assert np.isnan(maps.repeat_cosine[0, 0])
    np.testing.assert_allclose(maps.repeat_cosine.ravel()[1:], repeat, atol=1e-6)


def test_attention_is_stochastic_and_causal() -> None:
    maps = compute_maps(weights_of(build()), PIXELS, QUERIES)
    assert maps.attention.shape == (3, 2, 3, ROWS, COLUMNS)
    np.testing.assert_allclose(maps.attention.sum((3, 4)) + maps.attention_to_bos, 1, atol=1e-6)
    for i, (y, x) in enumerate(QUERIES):
        flat = maps.attention[:, :, i].reshape(6, -1)
        seen = y * COLUMNS + x + 1
        assert (flat[:, :seen] > 0).all()
        assert not flat[:, seen:].any()
        assert maps.visible(i).ravel().tolist() == [True] * seen + [False] * (ROWS * COLUMNS - seen)


def test_bidirectional_attention_sees_everything() -> None:
    weights = weights_of(build())
    maps = compute_maps(weights, PIXELS, QUERIES, bidirectional=True)
    assert not maps.causal
    assert (maps.attention > 0).all()
    assert not np.isnan(maps.relative_attention([0], "mean")).any()
    again = compute_maps(replace(weights, model=replace(MODEL, causal=False)), PIXELS, QUERIES)
    np.testing.assert_array_equal(maps.attention, again.attention)


@pytest.mark.parametrize("model", [MODEL, WITHOUT_BOS], ids=["BOS", "no BOS"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_a_query_projection_attention_is_uniform(model: ModelConfig, bidirectional: bool) -> None:
    """Queries of zeros: each token in sight gets the same, so the map is 1 there and blank elsewhere."""
    nepa = build(replace(model, qk_norm="none"))
    with torch.no_grad():
        for block in nepa.trunk.blocks:
            for parameter in (block.attention.qkv.weight, block.attention.qkv.bias):
                parameter[: model.hidden_size] = 0
    maps = compute_maps(weights_of(nepa), PIXELS, QUERIES, bidirectional)
    for heads in ("mean", "max", "each"):
        drawn = maps.relative_attention([0, 2], heads)
        assert drawn.shape == (3, 2 if heads == "each" else 1, ROWS, COLUMNS)
        for i in range(len(QUERIES)):
            np.testing.assert_allclose(drawn[i][:, maps.visible(i)], 1, atol=1e-5)
            assert np.isnan(drawn[i][:, ~maps.visible(i)]).all()
        seen = [maps.visible(i).sum() + 1 for i in range(len(QUERIES))]
        share = maps.bos_share([0, 2], heads)
        np.testing.assert_allclose(share[:, 0], 1 / np.array(seen) if model.bos_token else 0.0, atol=1e-6)


def test_layers_are_averaged_then_heads_reduced() -> None:
    maps = compute_maps(weights_of(build()), PIXELS, QUERIES)
    last = np.array([1, 10, 12])[:, None, None] + 1  # tokens that each query sees, with BOS
    layers = (maps.attention[0] + maps.attention[2]) / 2  # [heads, Q, R, C]
    for heads, expected in (("mean", layers.mean(0)), ("max", layers.max(0))):
        drawn = np.nan_to_num(maps.relative_attention([0, 2], heads)[:, 0])
        np.testing.assert_allclose(drawn, expected * last, rtol=1e-5)
    each = np.nan_to_num(maps.relative_attention([0, 2], "each"))
    np.testing.assert_allclose(each[:, 1], layers[1] * last, rtol=1e-5)


def test_weights_that_cannot_be_shown() -> None:
    weights = weights_of(build())
    with pytest.raises(ConfigError, match="do not fit their own config: 1 tensors are missing"):
        compute_maps(replace(weights, tensors=dict(list(weights.tensors.items())[1:])), PIXELS, QUERIES)
    broken = {name: value * torch.nan for name, value in weights.tensors.items()}
    with pytest.raises(ConfigError, match="compute embeddings that are not finite"):
        compute_maps(replace(weights, tensors=broken), PIXELS, QUERIES)
