"""Recomputed attention is the attention that was computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_nepa.analysis.attention import AttentionRecorder, attention_probabilities
from megatron_nepa.analysis.images import to_tensor
from megatron_nepa.kernels.attention.backends import attention_sdpa
from megatron_nepa.kernels.dispatch import Kernels
from megatron_nepa.models.build import Build
from megatron_nepa.models.trunk import Trunk
from tests.analysis.models import MODEL, build, pixels_of

TOKENS = [0, 4, 10]


def draw_qkv(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 11, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_are_probabilities_that_reproduce_sdpa(causal: bool) -> None:
    qkv = draw_qkv(torch.float64)
    rows = attention_probabilities(qkv, causal, TOKENS)
    assert rows.shape == (2, 4, 3, 11)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    mixed = torch.einsum("bhqt,bthd->bqhd", rows, qkv[:, :, 2])
    torch.testing.assert_close(mixed, attention_sdpa(qkv, causal)[:, TOKENS], atol=1e-12, rtol=0)
    for place, token in enumerate(TOKENS):
        future = rows[:, :, place, token + 1 :]
        assert not future.any() if causal else (future > 0).all()


def test_bf16_is_widened_first() -> None:
    qkv = draw_qkv(torch.bfloat16)
    rows = attention_probabilities(qkv, True, TOKENS)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, attention_probabilities(qkv.float(), True, TOKENS), atol=0, rtol=0)


def test_constructed_attention() -> None:
    """A query of zeros spreads evenly over what it sees; a key along the query, far longer than the rest, takes all."""
    qkv = draw_qkv()
    qkv[:, :, 0] = 0
    rows = attention_probabilities(qkv, True, TOKENS)
    for place, token in enumerate(TOKENS):
        torch.testing.assert_close(rows[:, :, place, : token + 1], torch.full((2, 4, token + 1), 1 / (token + 1)))

    qkv[:, :, 0] = qkv[:, 2:3, 1] = torch.eye(8)[0] * 30
    rows = attention_probabilities(qkv, True, [6])
    torch.testing.assert_close(rows[:, :, 0, 2], torch.ones(2, 4))


def test_a_recorded_model_computes_what_it_computed() -> None:
    images = to_tensor(pixels_of(3, 5))
    state = build().trunk.state_dict()
    recorder = AttentionRecorder(TOKENS)
    outputs = []
    for kernels in (Kernels(), replace(Kernels(), attention=recorder)):
        trunk = Trunk(MODEL, Build(kernels=kernels)).eval()
        trunk.load_state_dict(state)
        outputs.append(trunk(images, torch.zeros(1, dtype=torch.int64)).output)
    assert torch.equal(outputs[0], outputs[1])
    assert [rows.shape for rows in recorder.probabilities] == [(1, 2, 3, 16)] * 3
