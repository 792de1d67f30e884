"""The objective learns; without stop-gradient the embeddings collapse, which the loss does not show (paper 4.1)."""

from __future__ import annotations

from functools import cache

import torch
from skimage import data as photographs
from torch import Tensor

from megatron_nepa.config import ModelConfig, NepaObjective
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.training.reporting.health import EmbeddingHealth, embedding_health, read_health

MODEL = ModelConfig(
    image_size=56,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    mlp_hidden_size=128,
    bos_token=True,
    position_embedding="none",
    layer_scale_init=0.1,
)
STEPS = 400


def photograph_crops(count: int, step: int) -> Tensor:
    """``count`` random 56 x 56 crops of a small photograph, [count, 3, 56, 56] in -1 to 1."""
    generator = torch.Generator().manual_seed(step)
    photograph = torch.from_numpy(photographs.astronaut()).permute(2, 0, 1) / 127.5 - 1
    photograph = torch.nn.functional.avg_pool2d(photograph, 4)  # 128 x 128: patches hold detail, not one colour
    corners = torch.randint(0, 128 - 56, (count, 2), generator=generator).tolist()
    return torch.stack([photograph[:, top : top + 56, left : left + 56] for top, left in corners])


@cache
def train(stop_gradient: bool) -> tuple[list[float], EmbeddingHealth]:
    torch.manual_seed(0)
    objective = NepaObjective(stop_gradient=stop_gradient)
    model = NepaForPretraining(MODEL, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for step in range(STEPS):
        output = model(photograph_crops(16, step), torch.arange(16) + 16 * step)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.item())
    with torch.no_grad():
        output = model.eval()(photograph_crops(64, STEPS), torch.arange(64))
    patches = (
        output.embeddings["target"].view(64, -1, MODEL.hidden_size)[:, 1:].flatten(0, 1)
    )  # BOS is no embedding of an image
    return losses, read_health(embedding_health(patches))


def test_with_stop_gradient_the_embeddings_keep_their_rank() -> None:
    losses, health = train(stop_gradient=True)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert health.effective_rank > 8
    assert health.mean_direction < 0.97


def test_without_stop_gradient_the_embeddings_collapse() -> None:
    losses, health = train(stop_gradient=False)
    assert losses[-1] < -0.99  # the loss alone looks like success
    assert health.effective_rank < 3
    assert health.mean_direction > 0.999


def test_a_causal_model_cannot_see_ahead() -> None:
    model = NepaForPretraining(MODEL).eval()
    images = photograph_crops(1, 0)
    changed = images.clone()
    changed[:, :, 28:] = 0  # the last two of four rows of patches
    before, after = (model(x, torch.zeros(1, dtype=torch.long)).embeddings["prediction"] for x in (images, changed))
    first_changed = 1 + 8
    assert torch.equal(before[:first_changed], after[:first_changed])
    assert not torch.allclose(before[first_changed:], after[first_changed:])


def test_the_target_is_the_next_patch_without_positions_or_mask() -> None:
    config = ModelConfig(**{**MODEL.__dict__, "position_embedding": "learned"})
    masked = NepaForPretraining(config, NepaObjective(mask_ratio=0.6))
    plain = NepaForPretraining(config)
    images, index = photograph_crops(2, 0), torch.arange(2)
    assert torch.equal(masked(images, index).embeddings["target"], plain(images, index).embeddings["target"])
    assert not torch.equal(
        masked(images, index).embeddings["prediction"], plain(images, index).embeddings["prediction"]
    )
    output = plain(images, index)
    y, z = (rows.view(2, -1, 64) for rows in (output.embeddings["prediction"], output.embeddings["target"]))
    expected = -torch.nn.functional.cosine_similarity(y[:, :-1], z[:, 1:], dim=-1).mean()
    torch.testing.assert_close(output.loss, expected)
