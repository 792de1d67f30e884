"""The stacks of blocks that an objective runs in a micro-batch, and the weights that it adds to the trunk's.

The formulas of memory, collectives and time are those of a stack of blocks on some rows. JEPA has three: the trunk on
the context's patches; the predictor, a sequence for each target block, of the largest size that can be drawn; and,
forward alone, the trunk with the averaged weights on all patches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_nepa.config import JepaObjective, ModelConfig, NepaObjective, ObjectiveConfig
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
    """

    model: ModelConfig
    layout: Layout
    trained: bool = True


def stacks_of(model: ModelConfig, layout: Layout, objective: ObjectiveConfig) -> list[Stack]:
    """Every stack of a micro-batch, in the order in which they run forward."""
    match objective:
        case JepaObjective():
            context = objective.num_context(model.num_patches)
            block = objective.most_target_patches(model.grid_size, model.grid_size)
            predictor = Sequences.of(objective.predictor_model(model), context + block)
            sequences = replace(layout, micro_batch_size=layout.micro_batch_size * objective.num_targets)
            return [
                Stack(Sequences.of(model, context), layout),
                Stack(predictor, sequences),
                Stack(model, layout, trained=False),
            ]
        case _:
            return [Stack(model, layout)]


def count_all(model: ModelConfig, tensor_parallel_size: int, objective: ObjectiveConfig) -> ParameterCount:
    """The numbers that a rank holds of the trunk's weights and of what the objective adds."""
    trunk = count_parameters(model, tensor_parallel_size)
    if not isinstance(objective, JepaObjective):
        return trunk
    predictor = objective.predictor_model(model)
    blocks = count_parameters(predictor, tensor_parallel_size)
    width = predictor.hidden_size
    # a layer in and one back, mask token, norm, fixed positions; the blocks' own count has a patch embedding besides
    outside = 2 * width * model.hidden_size + model.hidden_size + 4 * width + model.num_patches * width
    return ParameterCount(
        trunk.split + blocks.split,
        trunk.block_replicated,
        trunk.replicated + predictor.num_layers * blocks.block_replicated + outside,
    )


def count_trained(model: ModelConfig, tensor_parallel_size: int, objective: ObjectiveConfig) -> int:
    """The numbers of :func:`count_all` that are trained: all but fixed positions."""
    return count_all(model, tensor_parallel_size, objective).local - sum(
        shape.num_patches * shape.hidden_size + int(shape.bos_token) * shape.hidden_size
        for shape in (model, *((objective.predictor_model(model),) if isinstance(objective, JepaObjective) else ()))
        if shape.position_embedding == "sincos"
    )


def count_copied(model: ModelConfig, tensor_parallel_size: int) -> int:
    """The numbers of the trunk's weight average, of which JEPA keeps a copy."""
    return count_trained(model, tensor_parallel_size, NepaObjective())
