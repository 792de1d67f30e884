"""The products of parallel layers, with their collectives on the way while they compute.

Each is a plain function, and the same function as a custom op for ``--compile``, which takes it whole: a compiler that
looked inside would keep the rows that the forward pass gathered for the backward pass, where only this rank's are kept,
and would choose the order of products and collectives itself.
"""

from __future__ import annotations

from torch import Tensor, library, nn

from megatron_nepa.parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter, wait


def gathered_product(x: Tensor, weight: Tensor, bias: Tensor, size: int, group: str) -> Tensor:
    """``x W^T + b`` of all ranks' rows.

    Args:
        x: this rank's rows, [n, in].
        weight: [out, in].
        bias: [out].
        size: ranks of the group.
        group: its name.

    Returns:
        [n * size, out].
    """
    return nn.functional.linear(wait(start_all_gather(x, size, group)), weight, bias)


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


def replicated_product_backward(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a product of rows that every rank holds: the input's is summed behind the weight's product."""
    summing = start_all_reduce(grad @ weight, group)
    grad_weight = grad.t() @ x
    grad_bias = grad.sum(0)
    return wait(summing), grad_weight, grad_bias


gathered_product_op = library.custom_op("megatron_nepa::gathered_product", gathered_product, mutates_args=())
gathered_product_backward_op = library.custom_op(
    "megatron_nepa::gathered_product_backward", gathered_product_backward, mutates_args=()
)
replicated_product_backward_op = library.custom_op(
    "megatron_nepa::replicated_product_backward", replicated_product_backward, mutates_args=()
)


@gathered_product_op.register_fake
def _gathered_product_fake(x: Tensor, weight: Tensor, bias: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0] * size, weight.shape[0])


@gathered_product_backward_op.register_fake
def _gathered_product_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, size: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@replicated_product_backward_op.register_fake
def _replicated_product_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
