"""MAE against transformers' own, with its weights: loss and every gradient; and what its masks promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from megatron_nepa.config import ConfigError, MaeObjective, ModelConfig, ParallelConfig, PretrainingConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.positions import sine_positions
from megatron_nepa.objectives.mae import MaeForPretraining
from megatron_nepa.parallel.random import derive_key, uniform_tensor
from tests.distributed.cases import sample_images
from tests.objectives.transformers_vit import (
    VIT,
    block_of,
    linear_of,
    newly_named,
    settings_of,
    spread_parameters,
    trunk_of,
)

MODEL = replace(VIT, bos_token=True)
OBJECTIVE = MaeObjective(decoder_hidden_size=16, decoder_layers=2, decoder_heads=2, decoder_mlp_hidden_size=24)
SEED, BATCH = 11, 3


def oracle() -> Any:
    config = ViTMAEConfig(
        **settings_of(MODEL),
        decoder_hidden_size=OBJECTIVE.decoder_hidden_size,
        decoder_num_hidden_layers=OBJECTIVE.decoder_layers,
        decoder_num_attention_heads=OBJECTIVE.decoder_heads,
        decoder_intermediate_size=OBJECTIVE.decoder_mlp_hidden_size,
        mask_ratio=OBJECTIVE.mask_ratio,
        norm_pix_loss=True,
    )
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).double()
    spread_parameters(model)
    return model


def ours_of(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, or gradients, under our names and in our layouts."""
    theirs = newly_named(theirs)

    def channels_first(rows: Tensor) -> Tensor:  # theirs are (pixel row, pixel column, channel)
        side = MODEL.patch_size
        return rows.unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)

    found = trunk_of(theirs, MODEL.num_layers, "vit.", "trunk.")
    found |= {"trunk.embedding.bos_token": theirs["vit.embeddings.cls_token"].flatten()}
    found |= linear_of(theirs, "decoder.decoder_embed", "pixel_decoder.embed")
    found |= {"pixel_decoder.mask_token": theirs["decoder.mask_token"].flatten()}
    for i in range(OBJECTIVE.decoder_layers):
        found |= block_of(theirs, f"decoder.decoder_layers.{i}", f"pixel_decoder.blocks.{i}")
    found |= linear_of(theirs, "decoder.decoder_norm", "pixel_decoder.norm")
    predict = linear_of(theirs, "decoder.decoder_pred", "pixel_decoder.predict")
    return found | {name: channels_first(value) for name, value in predict.items()}


def test_loss_and_every_gradient_are_those_of_transformers() -> None:
    theirs = oracle()
    ours = MaeForPretraining(MODEL, OBJECTIVE, Build(seed=SEED)).double()
    assert ours.trunk.embedding.positions is not None
    assert ours.pixel_decoder.positions is not None
    with torch.no_grad():  # some releases of transformers leave theirs at 0
        theirs.vit.embeddings.position_embeddings.copy_(ours.trunk.embedding.positions)
        theirs.decoder.decoder_pos_embed.copy_(ours.pixel_decoder.positions)
    assert not ours.load_state_dict(ours_of(dict(theirs.named_parameters())), strict=False).unexpected_keys
    images, index = sample_images(range(BATCH), MODEL, torch.float64), torch.arange(BATCH)
    noise = uniform_tensor(derive_key(SEED, "mae_mask"), index, MODEL.num_patches)
    expected, output = theirs(images, noise=noise), ours(images, index)
    expected.loss.backward()
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-9)
    wanted = ours_of({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    got = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert gradient is not None
        # a key's bias shifts all scores of a query alike: its gradient is null, and rounding beside the others'
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9 * wanted[name].abs().max().item())


def test_positions_are_those_of_mae() -> None:
    """Written out as in MAE's code: the first half of the channels turns with x."""
    found, width = sine_positions(3, 16, 1), 16
    assert torch.equal(found[0], torch.zeros(width))
    for patch in range(9):
        y, x = divmod(patch, 3)
        for place, at in ((0, x), (width // 2, y)):
            for i in range(width // 4):
                angle = at / 10000 ** (i / (width // 4))
                assert found[1 + patch, place + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert found[1 + patch, place + width // 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_only_visible_patches_reach_the_trunk_and_only_masked_ones_the_loss() -> None:
    model = MaeForPretraining(MODEL, OBJECTIVE, Build(seed=SEED)).double()
    images, index = sample_images(range(1), MODEL, torch.float64).requires_grad_(), torch.arange(1)
    output, prediction, _ = model.predict(images, index, model.order(index))
    assert output.output.shape[0] == 1 + MODEL.num_patches // 4
    (gradient,) = torch.autograd.grad(prediction.sum(), images)
    side = MODEL.patch_size
    seen = gradient.abs().sum(1).unfold(1, side, side).unfold(2, side, side).sum((3, 4)).flatten() > 0
    visible = model.order(index)[0, : MODEL.num_patches // 4]
    assert set(seen.nonzero().flatten().tolist()) == set(visible.tolist())
    changed = images.detach().clone()
    row, column = divmod(int(visible[0]), MODEL.grid_size)
    here = (..., slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
    order = model.order(index)
    target = model(images.detach(), index).loss
    model.predict = lambda *_: (output, prediction.detach(), _rows(model))  # type: ignore[method-assign]
    changed[here] += torch.randn(3, side, side, dtype=torch.float64)
    torch.testing.assert_close(model(changed, index).loss, target)
    assert order.shape == (1, MODEL.num_patches)


def _rows(model: MaeForPretraining) -> Any:
    from megatron_nepa.parallel.rows import shard_rows

    return shard_rows(model.trunk.config.sequence_length, model.trunk.tensor, False)


def test_a_mask_depends_on_the_sample_alone() -> None:
    model = MaeForPretraining(MODEL, OBJECTIVE, Build(seed=SEED))
    together = model.order(torch.arange(5))
    assert torch.equal(together[3:], model.order(torch.tensor([3, 4])))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("model", "objective", "size", "message"),
    [
        (replace(MODEL, causal=True), OBJECTIVE, 1, "set model.causal to false"),
        (MODEL, replace(OBJECTIVE, mask_ratio=0.99), 1, "leaves 0 of 16 patches visible"),
        (MODEL, replace(OBJECTIVE, decoder_heads=3), 1, "decoder_heads 3 heads"),
        (MODEL, replace(OBJECTIVE, decoder_hidden_size=18), 1, "18 must be a multiple of 4, .* take .* 16 or 20"),
        (MODEL, replace(OBJECTIVE, decoder_mlp_hidden_size=25), 2, "does not divide .*decoder_mlp_hidden_size 25"),
    ],
)
def test_what_cannot_work_is_refused(model: ModelConfig, objective: MaeObjective, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainingConfig(model=model, objective=objective, parallel=ParallelConfig(size), steps=1)
