# mypy: disable-error-code="no-untyped-def"
"""QK-norm and 2-D RoPE in place on packed qkv: the launches, the torch custom ops and their autograd."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_nepa.kernels.launching.launch import FLOATS, check_tensor, launch
from megatron_nepa.kernels.qk_norm_rope.device_code import qk_norm_rope_backward, qk_norm_rope_forward

HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_ROWS = 64  # heads of q and k that one program holds; more heads take more programs
TOKENS_PER_PARTIAL = 16  # tokens whose weight gradients one program sums before the second stage


def _check(
    qkv: Tensor, angles: Tensor | None, scale: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    check_tensor("qkv", qkv, (None, None, 3, None, None), FLOATS)
    batch, tokens, _, _, dim = qkv.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"qkv has head dim {dim}; the kernel takes {', '.join(map(str, HEAD_DIMS))}.")
    if angles is not None:
        shape = (tokens, dim // 2) if angles.ndim == 2 else (batch, tokens, dim // 2)
        check_tensor("angles", angles, shape, (torch.float32,), qkv)
    if scale is not None:
        if angles is None:
            raise ValueError("scale multiplies the angles, but angles is None.")
        check_tensor("scale", scale, (batch,), (torch.float32,), qkv)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight go together: give both, or neither for the plain norm.")
    if q_weight is not None and k_weight is not None:
        check_tensor("q_weight", q_weight, (dim,), FLOATS, qkv)
        check_tensor("k_weight", k_weight, (dim,), FLOATS, qkv)


def _tiles(qkv: Tensor) -> tuple[int, dict[str, int], int]:
    """Programs over the heads, the tile constants and the number of warps."""
    heads, half = qkv.shape[3], qkv.shape[4] // 2
    rows, cols = min(MAX_ROWS, triton.next_power_of_2(2 * heads)), triton.next_power_of_2(half)
    warps = min(8, max(1, rows * cols // 512))  # 16 values of each tile a thread: no spills, and 2 rows share an angle
    return triton.cdiv(2 * heads, rows), {"HEADS": heads, "HALF": half, "ROWS": rows, "COLS": cols}, warps


def _angle_rows(angles: Tensor | None) -> int:
    """Tokens that have angles of their own: those of one sample, or of the whole batch."""
    return 1 if angles is None else angles.numel() // angles.shape[-1]


def forward_(
    qkv: Tensor, angles: Tensor | None, scale: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Launch the forward kernel over ``qkv``; returns what backward needs.

    That is the reciprocal std [B, T, 2, H] in fp32 for the plain norm, a copy of q and k [B, T, 2, H, d] for the
    affine norm, nothing [0] without a norm.
    """
    _check(qkv, angles, scale, q_weight, k_weight)
    saved = _new_saved(qkv, q_weight, norm)
    if qkv.numel() and (norm or angles is not None):
        chunks, tile, warps = _tiles(qkv)
        launch(
            qk_norm_rope_forward, (qkv.shape[0] * qkv.shape[1], chunks),
            qkv, angles, scale, q_weight, k_weight, saved, qkv.shape[1], _angle_rows(angles), **tile,
            NORM=norm, AFFINE=norm and q_weight is not None, ROTATE=angles is not None, RESCALE=scale is not None,
            EPS=eps, num_warps=warps,
        )  # fmt: skip
    return saved


def _new_saved(qkv: Tensor, q_weight: Tensor | None, norm: bool) -> Tensor:
    batch, tokens, _, heads, dim = qkv.shape
    if not norm:
        return qkv.new_empty(0)
    if q_weight is not None:
        return qkv.new_empty(batch, tokens, 2, heads, dim)
    return qkv.new_empty(batch, tokens, 2, heads, dtype=torch.float32)


def backward_(
    grad: Tensor, out: Tensor | None, saved: Tensor, angles: Tensor | None, scale: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Launch the backward kernel over ``grad`` [B, T, 3, H, d]; returns the weights' gradients, fp32 [2, d], or [0]."""
    _check(grad, angles, scale, q_weight, k_weight)
    affine = norm and q_weight is not None
    steps = TOKENS_PER_PARTIAL if affine else 1
    tokens = grad.shape[0] * grad.shape[1]
    programs = triton.cdiv(tokens, steps)
    chunks, tile, warps = _tiles(grad)
    partials = grad.new_empty(programs * chunks if affine else 0, 2, grad.shape[4], dtype=torch.float32)
    if grad.numel() and (norm or angles is not None):
        launch(
            qk_norm_rope_backward, (programs, chunks),
            grad, out, angles, scale, q_weight, k_weight, saved, partials, tokens, grad.shape[1], _angle_rows(angles),
            **tile, STEPS=steps,
            NORM=norm, AFFINE=affine, ROTATE=angles is not None, RESCALE=scale is not None, EPS=eps, num_warps=warps,
        )  # fmt: skip
    return partials.sum(0) if affine else grad.new_empty(0, dtype=torch.float32)


_forward_op = torch.library.custom_op("megatron_nepa::qk_norm_rope_", forward_, mutates_args=("qkv",))
_backward_op = torch.library.custom_op("megatron_nepa::qk_norm_rope_backward_", backward_, mutates_args=("grad",))


@_forward_op.register_fake
def _forward_fake(
    qkv: Tensor, angles: Tensor | None, scale: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    return _new_saved(qkv, q_weight, norm)


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, out: Tensor | None, saved: Tensor, angles: Tensor | None, scale: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    shape = (2, grad.shape[4]) if norm and q_weight is not None else (0,)
    return grad.new_empty(shape, dtype=torch.float32)


class _QKNormRope(torch.autograd.Function):
    """The result takes over the input's storage.

    Marking the input dirty instead would be dear: qkv is a view of the projection's output, and for a view autograd
    inserts CopySlices, three more passes over qkv's gradient.
    """

    @staticmethod
    def forward(ctx, qkv, angles, scale, q_weight, k_weight, norm, eps):
        saved = _forward_op(qkv, angles, scale, q_weight, k_weight, norm, eps)
        out = qkv.detach()
        plain = norm and q_weight is None
        ctx.save_for_backward(out if plain else None, saved, angles, scale, q_weight, k_weight)
        ctx.norm, ctx.eps = norm, eps
        return out

    @staticmethod
    def backward(ctx, grad):
        out, saved, angles, scale, q_weight, k_weight = ctx.saved_tensors
        grad = grad.contiguous()
        weights = _backward_op(grad, out, saved, angles, scale, q_weight, k_weight, ctx.norm, ctx.eps)
        dq, dk = (None, None) if q_weight is None else (weights[0].to(q_weight.dtype), weights[1].to(k_weight.dtype))
        return grad, None, None, dq, dk, None, None


def qk_norm_rope_triton(
    qkv: Tensor,
    angles: Tensor | None,
    scale: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: bool,
    eps: float,
) -> Tensor:
    """``qk_norm_rope_reference`` in place, in one pass each way.

    With U the bytes of one [B, T, H, d] tensor, forward moves 4U (q and k, read and written) and backward 6U. The plain
    norm saves the reciprocal std alone: backward turns the output, which attention keeps anyway, back into the
    standardised input. The affine norm keeps a copy of q and k (2U more in forward), since a weight may be 0.

    Both directions write over what they are given. ``qkv`` must not be used after the call (what autograd saved from it
    earlier raises in backward), and the gradient that reaches the result must be a buffer of its own, as attention's
    backward makes.

    Args:
        qkv: [B, T, 3, H, d], contiguous, fp32 or bf16, d one of 32, 64, 80, 96, 128; not a leaf that requires grad.
        angles: fp32 [T, d/2], or [B, T, d/2] where samples hold other patches; zeros for a BOS row; None for no
            rotation.
        scale: factor on each sample's angles, fp32 [B], or None.
        q_weight, k_weight: affine weights of the norms, [d], or None for the plain norm.
        norm: whether to normalise.
        eps: added to the variance in fp32.

    Returns:
        [B, T, 3, H, d] in ``qkv``'s storage.

    Raises:
        ValueError: an argument of another shape, dtype, layout or head dim, or a leaf that requires grad.
    """
    if qkv.is_leaf and qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("qkv is a leaf that requires grad; the kernel would overwrite it in place. Pass qkv.clone().")
    if not norm:
        q_weight = k_weight = None
    return _QKNormRope.apply(qkv, angles, scale, q_weight, k_weight, norm, eps)
