"""The products of parallel layers, with their collectives on the way while they compute.

In the forward pass rows travel in chunks. All gathers start at once, and a product waits for its own chunk alone; a sum
over the ranks starts as soon as its chunk's product is there. So all but one chunk can hide behind products, as both
collectives of the backward pass do. Rows do not depend on each other: chunks change no number but by the order in which
a library adds up a product of fewer rows.

Each is a plain function, and the same function as a custom op for ``--compile``, which takes it whole: a compiler that
looked inside would keep the rows that the forward pass gathered for the backward pass, where only this rank's are kept,
and would choose the order of products and collectives itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, library, nn

from megatron_nepa.parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter, wait

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _taken_whole(
    fake: Callable[Arguments, Result],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A function that a compiler takes as one operation; ``fake`` makes what it returns of tensors without memory."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        operation = library.custom_op(f"megatron_nepa::{function.__name__}", function, mutates_args=())
        operation.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            return (operation if torch.compiler.is_compiling() else function)(*arguments, **named)

        return call

    return decorate


@_taken_whole(lambda x, weight, bias, size, group, chunks: x.new_empty(x.shape[0] * size, weight.shape[0]))
def gathered_product(x: Tensor, weight: Tensor, bias: Tensor, size: int, group: str, chunks: int) -> Tensor:
    """``x W^T + b`` of all ranks' rows.

    Args:
        x: this rank's rows, [n, in].
        weight: [out, in].
        bias: [out].
        size: ranks of the group.
        group: its name.
        chunks: in which the rows travel, n at most.

    Returns:
        [n * size, out].
    """
    gathering = [start_all_gather(chunk, size, group) for chunk in x.tensor_split(chunks)]
    parts = [nn.functional.linear(wait(chunk), weight, bias) for chunk in gathering]
    # a chunk holds some rows of every rank
    return _join([part.unflatten(0, (size, -1)) for part in parts], dim=1).flatten(0, 1)


@_taken_whole(lambda x, weight, size, group, chunks: x.new_empty(x.shape[0] // size, weight.shape[0]))
def scattered_product(x: Tensor, weight: Tensor, size: int, group: str, chunks: int) -> Tensor:
    """``x W^T``, summed over the ranks, of this rank's rows.

    Args:
        x: all ranks' rows, [n * size, in].
        weight: [out, in].
        size: ranks of the group.
        group: its name.
        chunks: in which the rows travel, n at most.

    Returns:
        [n, out].
    """
    summing = []
    for chunk in x.unflatten(0, (size, -1)).tensor_split(chunks, dim=1):  # [size, n / chunks, in]
        summing.append(start_reduce_scatter(nn.functional.linear(chunk.flatten(0, 1), weight), size, group))
    return _join([wait(chunk) for chunk in summing])


@_taken_whole(lambda x, weight, group, chunks: x.new_empty(x.shape[0], weight.shape[0]))
def summed_product(x: Tensor, weight: Tensor, group: str, chunks: int) -> Tensor:
    """``x W^T``, summed over the ranks, of all rows on every rank: [N, in] to [N, out]."""
    output = x.new_empty(x.shape[0], weight.shape[0])
    summing = []
    for chunk, result in zip(x.tensor_split(chunks), output.tensor_split(chunks), strict=True):
        summing.append(start_all_reduce(torch.mm(chunk, weight.t(), out=result), group))
    for result in summing:
        wait(result)
    return output


def _join(chunks: list[Tensor], dim: int = 0) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim)


def _gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the gradients of a product's input, weight and bias."""
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@_taken_whole(lambda grad, x, weight, size, group: _gradients(x, weight))
def gathered_product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, size: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gathered_product`'s input, whose rows are summed over the ranks, weight and bias.

    The rows are gathered again behind the input's product, and its gradient is summed behind the weight's (Korthikanti
    et al. 2022, section 4.2.2).
    """
    gathering = start_all_gather(x, size, group)
    summing = start_reduce_scatter(grad @ weight, size, group)
    grad_weight = grad.t() @ wait(gathering)
    grad_bias = grad.sum(0)
    return wait(summing), grad_weight, grad_bias


@_taken_whole(lambda grad, x, weight, group: _gradients(x, weight))
def replicated_product_backward(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a product of rows that every rank holds: the input's is summed behind the weight's product."""
    summing = start_all_reduce(grad @ weight, group)
    grad_weight = grad.t() @ x
    grad_bias = grad.sum(0)
    return wait(summing), grad_weight, grad_bias
