"""Model FLOPs of each objective, counted without torch: the planner asks, too."""

from __future__ import annotations

from megatron_nepa.config import (
    IMAGE_CHANNELS,
    AimObjective,
    JepaObjective,
    MaeObjective,
    ModelConfig,
    NepaObjective,
    PretrainingConfig,
)
from megatron_nepa.models.flops import blocks_flops, feed_forward_products, forward_flops, train_flops


def pretraining_flops(run: PretrainingConfig) -> int:
    """FLOPs of one image's share of a training step, with what the objective adds to the trunk.

    See :mod:`megatron_nepa.models.flops` for what is counted.
    """
    match run.objective:
        case NepaObjective():
            return train_flops(run.model)
        case AimObjective():
            return 3 * (forward_flops(run.model) + _aim_flops(run.model, run.objective))
        case MaeObjective():
            return 3 * _mae_flops(run.model, run.objective)
        case JepaObjective():
            return _jepa_flops(run.model, run.objective)


def _aim_flops(model: ModelConfig, objective: AimObjective) -> int:
    """Of the head on every token, and of the pairs beyond the causal ones that a prefix of mean length adds."""
    width, patches = model.hidden_size, model.num_patches
    head = objective.head_layers * feed_forward_products(model) + width * _pixels(model)
    # the prefix of q tokens sees q (q - 1) / 2 pairs more; its patches are uniform in 1 to N - 1
    lengths = [prefix + int(model.bos_token) for prefix in range(1, patches)] if objective.prefix else [0]
    pairs = sum(q * (q - 1) // 2 for q in lengths) // len(lengths)
    return 2 * (model.sequence_length * head + model.num_layers * 2 * pairs * width)


def _mae_flops(model: ModelConfig, objective: MaeObjective) -> int:
    """Of the trunk on the visible patches, and of the decoder on all."""
    visible, decoder = objective.num_visible(model.num_patches), objective.decoder_model(model)
    tokens = visible + int(model.bos_token)
    embedding = visible * _pixels(model) * model.hidden_size
    embedding += tokens * model.hidden_size * decoder.hidden_size
    prediction = decoder.sequence_length * decoder.hidden_size * _pixels(model)
    blocks = blocks_flops(model, tokens) + blocks_flops(decoder, decoder.sequence_length)
    return 2 * (embedding + prediction) + blocks


def _jepa_flops(model: ModelConfig, objective: JepaObjective) -> int:
    """Three passes of the context encoder and of the predictor, and the one forward pass of the targets' encoder.

    The size of a target block changes from step to step: that of the mean scale and aspect is counted.
    """
    context = objective.num_context(model.num_patches)
    predictor = objective.predictor_model(model)
    rows, columns = objective.mean_block_sides(model.grid_size, model.grid_size)
    block = rows * columns
    embedding = 2 * context * _pixels(model) * model.hidden_size
    # into the predictor's width, of the context once; back, of the block's patches
    projections = 2 * (context + objective.num_targets * block) * model.hidden_size * predictor.hidden_size
    sequences = objective.num_targets * blocks_flops(predictor, context + block)
    trained = embedding + blocks_flops(model, context) + projections + sequences
    return 3 * trained + forward_flops(model)


def _pixels(model: ModelConfig) -> int:
    return IMAGE_CHANNELS * model.patch_size**2
