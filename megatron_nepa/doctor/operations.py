"""Fused operations and attention back-ends against their definitions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_nepa.benchmarks.contenders import Contest, Implementation, contests
from megatron_nepa.config import ModelConfig
from megatron_nepa.doctor.report import Row
from megatron_nepa.kernels.attention.backends import attention_candidates, attention_sdpa
from megatron_nepa.kernels.operations import OPERATIONS

# every operation takes part; on a CPU the kernels run in Triton's interpreter, which is slow
GPU_MODEL = ModelConfig()
CPU_MODEL = ModelConfig(image_size=56, hidden_size=64, num_heads=2, num_layers=1, mlp_hidden_size=96)
KERNELS_REMEDY = "set --kernels reference until it is mended, and run make test-gpu for the details."
ATTENTION_REMEDY = "uninstall or rebuild flash-attn for this torch: attention then runs through SDPA."


def check_operations(device: torch.device) -> Iterator[Row]:
    """Every fused kernel, forward and backward, in bf16, and every attention back-end of ``device``."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        from megatron_nepa.kernels.launching.interpreter import is_interpreting, round_bf16_to_nearest

        if not is_interpreting():
            yield Row("fused kernels", "not checked", "Triton was loaded before its interpreter was switched on")
            return
        round_bf16_to_nearest()
    fused = {operation.name: operation.fused for operation in OPERATIONS}
    for contest in contests(GPU_MODEL if on_gpu else CPU_MODEL, 2, device, torch.bfloat16):
        if contest.name == "attention":
            yield from check_attention(contest, device)
        else:
            where = "" if on_gpu else " in Triton's interpreter"
            kernel = fused[contest.name]()
            yield judge(f"kernel {contest.name}", contest, kernel, f"the Triton kernel{where}", KERNELS_REMEDY)


def check_attention(contest: Contest, device: torch.device) -> Iterator[Row]:
    """Each back-end against SDPA; FlashAttention-2 is absent where flash-attn is."""
    if device.type != "cuda":
        yield judge("attention", contest, attention_sdpa, "SDPA", "reinstall torch.")
        yield Row("FlashAttention-2", "not checked", "needs a GPU")
        return
    if importlib.util.find_spec("flash_attn") is None:
        yield Row("FlashAttention-2", "absent", "attention runs through torch's SDPA")
    head_dim = contest.inputs["qkv"].shape[-1]
    for attention in attention_candidates(head_dim, torch.bfloat16, deterministic=False):
        name = attention.__name__
        yield judge(f"attention {name}", contest, attention, name, ATTENTION_REMEDY)


def judge(name: str, contest: Contest, implementation: Implementation, what: str, remedy: str) -> Row:
    """One row: whether ``implementation`` errs little enough (:func:`excess`)."""
    try:
        found = excess(contest, implementation)
    except Exception as error:  # Triton's compiler raises kinds of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Row(name, "failed", f"{what} does not run: {reason}", remedy)
    text = f"{what}: error {found:.2f} of what is allowed, forward and backward"
    return Row(name, "ok", text) if found <= 1 else Row(name, "failed", text, remedy)


def excess(contest: Contest, implementation: Implementation) -> float:
    """Largest error of an implementation against fp64, over the allowed one.

    Allowed is 2 times (outputs) or 3 times (gradients) the error of the operation's definition in the same dtype, and
    always the rounding of the largest value: one of bf16, two along a chain of fp32 operations. For an output that is a
    sum with cancellation the largest value is that of its terms.
    """
    definition = next(iter(contest.contenders.values()))
    doubles = {name: _wide(value) for name, value in contest.inputs.items()}
    upstream = [torch.randn_like(output) for output in _outputs(definition, contest.inputs)]
    exact = _evaluate(definition, doubles, contest.trained, [_wide(each) for each in upstream])
    plain = _evaluate(definition, contest.inputs, contest.trained, upstream)
    found = _evaluate(implementation, contest.inputs, contest.trained, upstream)
    worst = 0.0
    for kind, factor, least in ((0, 2, contest.scale), (1, 3, 0.0)):
        for got, usual, expected in zip(found[kind], plain[kind], exact[kind], strict=True):
            roundings = 2 if got.dtype == torch.float32 else 1
            rounding = roundings * torch.finfo(got.dtype).eps * expected.abs().max().clamp(min=least)
            allowed = factor * torch.maximum((usual.double() - expected).abs().max(), rounding)
            worst = max(worst, float((got.double() - expected).abs().max() / allowed))
    return worst


def _evaluate(
    function: Callable[..., Any], inputs: dict[str, Any], trained: list[str], upstream: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in trained}
    # times 1, since an operation that works in place refuses a leaf
    outputs = _outputs(function, inputs | {name: leaf * 1 for name, leaf in leaves.items()})
    values = [output.detach().clone() for output in outputs]
    differentiable = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if output.requires_grad]
    gradients = torch.autograd.grad(
        [output for output, _ in differentiable], list(leaves.values()), [grad.clone() for _, grad in differentiable]
    )
    return values, list(gradients)


def _outputs(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    outputs = function(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
