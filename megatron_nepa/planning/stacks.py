"""The stacks of blocks that an objective runs in a micro-batch, and the weights that it adds to the trunk's.

The formulas of memory, collectives and time are those of a stack of blocks on some rows. NEPA and AIM have one;
AIM's prefix is a mask, under which attention computes all pairs. MAE has the trunk on the visible patches and the
decoder on all. JEPA has three: the trunk on the context's patches; the predictor, a sequence for each target block, of
the largest size that can be drawn; and, forward alone, the trunk with the averaged weights on all patches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_nepa.config import (
    IMAGE_CHANNELS,
    AimObjective,
    JepaObjective,
    MaeObjective,
    ModelConfig,
    NepaObjective,
    ObjectiveConfig,
)
from megatron_nepa.planning.layout import Layout, ParameterCount, count_parameters


@dataclass(frozen=True)
class Sequences(ModelConfig):
    """A shape of blocks whose sequences have another length than an image's patches."""

    tokens: int = 1

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.tokens

    @classmethod
    def of(cls, model: ModelConfig, tokens: int) -> Sequences:
        """The shape of ``model`` on sequences of ``tokens``."""
        return cls(**{entry.name: getattr(model, entry.name) for entry in fields(ModelConfig)}, tokens=tokens)


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another.

    Attributes:
        model: their shape and the length of their sequences.
        layout: the run's, with the stack's number of sequences as its micro-batch.
        trained: whether there is a backward pass.
        embeds: whether it starts from patches, rather than from another stack's output.
        masked: whether attention takes a mask of every sample.
    """

    model: ModelConfig
    layout: Layout
    trained: bool = True
    embeds: bool = True
    masked: bool = False


def stacks_of(model: ModelConfig, layout: Layout, objective: ObjectiveConfig) -> list[Stack]:
    """Every stack of a micro-batch, in the order in which they run forward."""
    match objective:
        case AimObjective(prefix=True):
            return [Stack(replace(model, causal=False), layout, masked=True)]
        case MaeObjective():
            visible = objective.num_visible(model.num_patches) + int(model.bos_token)
            decoder = Stack(objective.decoder_model(model), layout, embeds=False)
            return [Stack(Sequences.of(model, visible), layout), decoder]
        case JepaObjective():
            context = objective.num_context(model.num_patches)
            block = objective.most_target_patches(model.grid_size, model.grid_size)
            predictor = Sequences.of(objective.predictor_model(model), context + block)
            sequences = replace(layout, micro_batch_size=layout.micro_batch_size * objective.num_targets)
            return [
                Stack(Sequences.of(model, context), layout),
                Stack(predictor, sequences, embeds=False),
                Stack(model, layout, trained=False),
            ]
        case _:
            return [Stack(model, layout)]


def count_all(model: ModelConfig, tensor_parallel_size: int, objective: ObjectiveConfig) -> ParameterCount:
    """The numbers that a rank holds of the trunk's weights and of what the objective adds."""
    trunk = count_parameters(model, tensor_parallel_size)
    pixels, width = IMAGE_CHANNELS * model.patch_size**2, model.hidden_size
    match objective:
        case NepaObjective():
            return trunk
        case AimObjective(head_layers=layers):
            gates = 2 if model.mlp == "swiglu" else 1
            split = layers * ((gates + 1) * width + gates) * model.mlp_hidden_size // tensor_parallel_size
            # biases and norms of the layers, another norm, and a linear layer
            outside = (3 * layers + 2) * width + (width + 1) * pixels
            return ParameterCount(trunk.split + split, trunk.block_replicated, trunk.replicated + outside)
        case MaeObjective():
            added = objective.decoder_model(model)
            # layers in and out, mask token, norm, fixed positions
            outside = (width + 1 + pixels + 3 + added.sequence_length) * added.hidden_size + pixels
        case JepaObjective():
            added = objective.predictor_model(model)
            # likewise
            outside = (2 * width + 4 + model.num_patches) * added.hidden_size + width
    # the blocks' own count has a patch embedding besides
    blocks = count_parameters(added, tensor_parallel_size)
    return ParameterCount(
        trunk.split + blocks.split,
        trunk.block_replicated,
        trunk.replicated + added.num_layers * blocks.block_replicated + outside,
    )


def count_trained(model: ModelConfig, tensor_parallel_size: int, objective: ObjectiveConfig) -> int:
    """The numbers of :func:`count_all` that are trained: all but fixed positions."""
    shapes = [model]
    if isinstance(objective, JepaObjective):
        shapes.append(objective.predictor_model(model))
    elif isinstance(objective, MaeObjective):
        shapes.append(objective.decoder_model(model))
    fixed = [shape.sequence_length * shape.hidden_size for shape in shapes if shape.position_embedding == "sincos"]
    return count_all(model, tensor_parallel_size, objective).local - sum(fixed)


def count_copied(model: ModelConfig, tensor_parallel_size: int) -> int:
    """The numbers of the trunk's weight average, of which JEPA keeps a copy."""
    return count_trained(model, tensor_parallel_size, NepaObjective())
