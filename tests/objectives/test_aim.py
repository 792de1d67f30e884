"""AIM against a loss written out, and what its prefix promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_nepa.config import AimObjective, ConfigError, ModelConfig, PretrainingConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.draws import prefix_lengths
from megatron_nepa.objectives.aim import AimForPretraining, prefix_attention
from megatron_nepa.objectives.flops import pretraining_flops
from tests.distributed.cases import MODEL, sample_images

SEED, BATCH = 5, 4
PLAIN = replace(MODEL, bos_token=False)


def written_out(prediction: Tensor, images: Tensor, prefix: list[int], model: ModelConfig) -> Tensor:
    """The loss of AIM's equation 3, patch by patch: ``prediction`` [B, T, pixels], ``prefix`` patches come first."""
    losses = []
    grid, side, bos = model.grid_size, model.patch_size, int(model.bos_token)
    for sample, image in enumerate(images):
        errors = []
        for patch in range(prefix[sample], grid * grid):
            top, left = patch // grid * side, patch % grid * side
            pixels = image[:, top : top + side, left : left + side].flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append((prediction[sample, patch - 1 + bos] - target).square().mean())
        losses.append(torch.stack(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("model", [MODEL, PLAIN], ids=["bos", "plain"])
@pytest.mark.parametrize("has_prefix", [True, False])
def test_the_loss_is_the_one_written_out(model: ModelConfig, has_prefix: bool) -> None:
    aim = AimForPretraining(model, AimObjective(prefix=has_prefix), Build(seed=SEED)).double().eval()
    images, index = sample_images(range(BATCH), model, torch.float64), torch.arange(BATCH)
    _, prediction, first = aim.predict(images, index)
    lengths = (
        prefix_lengths(model.num_patches, SEED, index) if has_prefix else torch.full_like(first, not model.bos_token)
    )
    assert torch.equal(first, lengths.long())
    expected = written_out(prediction.unflatten(0, (BATCH, -1)), images, first.tolist(), model)
    torch.testing.assert_close(aim(images, index).loss, expected, rtol=1e-12, atol=0)


def test_a_prediction_sees_the_prefix_and_what_comes_before_its_patch_alone() -> None:
    aim = AimForPretraining(PLAIN, AimObjective(), Build(seed=SEED)).double().eval()
    images, index = sample_images(range(BATCH), PLAIN, torch.float64).requires_grad_(), torch.arange(BATCH)
    _, prediction, prefix = aim.predict(images, index)
    rows, side = prediction.unflatten(0, (BATCH, -1)), PLAIN.patch_size
    assert len(set(prefix.tolist())) > 1
    for token in (0, 7):
        (gradient,) = torch.autograd.grad(rows[:, token].sum(), images, retain_graph=True)
        seen = gradient.abs().sum(1).unfold(1, side, side).unfold(2, side, side).sum((3, 4)).flatten(1) > 0  # [B, N]
        last = prefix.clamp_min(token + 1)
        assert torch.equal(seen, torch.arange(PLAIN.num_patches) < last[:, None])


def test_prefixes_are_spread_over_all_lengths_and_depend_on_the_sample_alone() -> None:
    lengths = prefix_lengths(16, SEED, torch.arange(3000))
    counts = torch.bincount(lengths, minlength=17)
    assert counts[0] == counts[16] == 0
    assert counts[1:16].min() > 140  # 200 are expected of each
    assert torch.equal(lengths[7:9], prefix_lengths(16, SEED, torch.tensor([7, 8])))


def test_a_mask_without_a_prefix_is_causal_attention() -> None:
    causal = prefix_attention(torch.zeros(2, dtype=torch.long), 5)
    assert torch.equal(causal, torch.ones(2, 1, 5, 5).tril().bool())


def test_a_bidirectional_trunk_is_refused() -> None:
    with pytest.raises(ConfigError, match="predicts the next patch"):
        PretrainingConfig(model=replace(MODEL, causal=False), objective=AimObjective(), steps=1)


def test_flops_count_head_and_prefix() -> None:
    def flops(objective: AimObjective) -> int:
        return pretraining_flops(PretrainingConfig(model=MODEL, objective=objective, steps=1))

    layer = 3 * MODEL.hidden_size * MODEL.mlp_hidden_size
    assert flops(AimObjective(head_layers=3)) - flops(AimObjective()) == 3 * 2 * MODEL.sequence_length * layer
    assert flops(AimObjective()) > flops(AimObjective(prefix=False))
