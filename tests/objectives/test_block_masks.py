"""JEPA's masks against plain words, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_nepa.config import JepaObjective
from megatron_nepa.objectives.block_masks import TRIES, block_masks
from megatron_nepa.parallel.random import derive_key, uniform

SEED = 11


def plain_masks(objective: JepaObjective, side: int, step: int, sample: int) -> tuple[list[int], list[list[int]]]:
    """Context and target patches of one sample by the rule in words, one number at a time."""

    def draw(purpose: str, index: int, count: int) -> list[float]:
        return [float(x) for x in uniform(derive_key(SEED, purpose), np.array([index]), count)[0]]

    def sides(scale: float, aspect: float) -> tuple[int, int]:
        patches = int(scale * side * side)
        rows, columns = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
        return min(max(rows, 1), side), min(max(columns, 1), side)

    a, b, c = draw("block_sizes", step, 3)
    scale = objective.target_scale_min + a * (objective.target_scale_max - objective.target_scale_min)
    aspect = objective.target_aspect_min + b * (objective.target_aspect_max - objective.target_aspect_min)
    target = sides(scale, aspect)
    context = sides(objective.context_scale_min + c * (1 - objective.context_scale_min), 1.0)

    def block(size: tuple[int, int], row_draw: float, column_draw: float) -> list[int]:
        top, left = int(row_draw * (side - size[0] + 1)), int(column_draw * (side - size[1] + 1))
        return [y * side + x for y in range(top, top + size[0]) for x in range(left, left + size[1])]

    wanted = round(objective.context_ratio * side * side)
    places = iter(draw("block_places", sample, TRIES * (objective.num_targets + 1) * 2))
    for attempt in range(TRIES):
        blocks = [block(target, next(places), next(places)) for _ in range(objective.num_targets)]
        if attempt == TRIES - 1:
            blocks = blocks[:1] * objective.num_targets
        left_over = set(block(context, next(places), next(places))).difference(*blocks)
        if len(left_over) >= wanted:
            break
    order = draw("context_patches", sample, side * side)
    return sorted(sorted(left_over, key=lambda patch: order[patch])[:wanted]), blocks


# where few first tries leave too little, where most do, and where all of some samples do
@pytest.mark.parametrize(
    ("side", "objective"),
    [(14, JepaObjective()), (6, JepaObjective()), (6, JepaObjective(context_ratio=0.44, num_targets=8))],
)
def test_masks_are_those_of_plain_words(side: int, objective: JepaObjective) -> None:
    samples = torch.arange(20)
    on_each_other = False
    for step in range(5):
        masks = block_masks(objective, (side, side), SEED, step, samples)
        for i in range(len(samples)):
            context, targets = plain_masks(objective, side, step, i)
            assert masks.context[i].tolist() == context
            assert masks.targets[i].tolist() == targets
        alone = block_masks(objective, (side, side), SEED, step, samples[7:9])
        assert torch.equal(alone.context, masks.context[7:9])  # whatever the micro-batch
        assert torch.equal(alone.targets, masks.targets[7:9])
        on_each_other |= bool((masks.targets == masks.targets[:, :1]).all(dim=2).all(dim=1).any())
    assert on_each_other == (objective.num_targets == 8)


def test_every_block_size_leaves_its_context() -> None:
    for side in range(5, 20):
        objective = JepaObjective(context_ratio=0.3)
        largest = objective.most_target_patches(side, side)
        sizes = [block_masks(objective, (side, side), SEED, step, torch.arange(2)) for step in range(40)]
        assert max(masks.targets.shape[2] for masks in sizes) <= largest
        assert {masks.context.shape[1] for masks in sizes} == {round(0.3 * side * side)}
