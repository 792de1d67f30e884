"""The rule that a fused kernel is judged by, FlashAttention's own.

Its error against fp64 is at most 2 times (forward) or 3 times (backward) the error of plain torch in the same dtype.
The rounding of the largest value is always allowed, once in bf16 and four times along a chain of fp32 operations, since
on few values torch may be exact by luck.
"""

import torch


def evaluate(function, tensors, differentiable, upstream):
    """Outputs and gradients of ``function(**tensors)``, a tensor or a tuple of tensors."""
    tensors = {
        name: tensor.clone().requires_grad_(name in differentiable) if torch.is_tensor(tensor) else tensor
        for name, tensor in tensors.items()
    }
    outputs = function(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
    torch.autograd.backward(outputs[: len(upstream)], [grad.clone() for grad in upstream])
    gradients = {name: tensors[name].grad for name in differentiable if tensors[name] is not None}
    return values, gradients


def widen(tensor):
    return tensor.double() if torch.is_tensor(tensor) and tensor.is_floating_point() else tensor


def assert_rule(fused, reference, tensors, differentiable, upstream, scale=0.0):
    """Judge ``fused`` by the rule; ``scale`` is the size of the terms of an output that is a sum with cancellation.

    Gradients are no such sums: each is judged by its own largest value.
    """
    exact = evaluate(
        reference,
        {name: widen(tensor) for name, tensor in tensors.items()},
        differentiable,
        [widen(g) for g in upstream],
    )
    plain = evaluate(reference, tensors, differentiable, upstream)
    mine = evaluate(fused, tensors, differentiable, upstream)
    for factor, least, fused_part, plain_part, exact_part in zip((2, 3), (scale, 0.0), mine, plain, exact, strict=True):
        assert fused_part.keys() == exact_part.keys()
        for name, expected in exact_part.items():
            got = fused_part[name]
            assert got.dtype == plain_part[name].dtype, (
                f"{name}: {got.dtype}, plain torch gives {plain_part[name].dtype}"
            )
            assert got.shape == expected.shape, name
            error = (got.double() - expected).abs().max().item()
            allowed = (plain_part[name].double() - expected).abs().max().item()
            roundings = 4 if got.dtype == torch.float32 else 1
            rounding = roundings * torch.finfo(got.dtype).eps / 2 * max(expected.abs().max().item(), least)
            assert error <= factor * max(allowed, rounding), f"{name}: error {error:.2e}, plain torch {allowed:.2e}"
