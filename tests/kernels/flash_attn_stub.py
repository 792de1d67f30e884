"""A stand-in for flash-attn 2.8's ``flash_attn_qkvpacked_func``: its signature and refusals, computed by SDPA."""

import types

import torch


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    device_type="cpu",
):
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if qkv.device.type != device_type:
        raise RuntimeError(f"qkv must be on {device_type}")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise RuntimeError("qkv must have shape (batch_size, seqlen, 3, nheads, headdim)")
    if qkv.stride(-1) != 1:
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if qkv.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    assert dropout_p == 0.0
    assert softmax_scale is None
    assert not return_attn_probs
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    flash_attn_qkvpacked_func.calls.append({"causal": causal, "deterministic": deterministic})
    return out.transpose(1, 2)


flash_attn_qkvpacked_func.calls = []


def install(monkeypatch):
    """Make ``import flash_attn`` find the stand-in; returns the list of its calls."""
    import importlib.machinery
    import sys

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    flash_attn_qkvpacked_func.calls.clear()
    return flash_attn_qkvpacked_func.calls


def install_version(monkeypatch, version, with_lse):
    """Make version 3 or 4 importable, and no other; returns the list of ``causal`` of its calls."""
    import importlib.machinery
    import sys

    calls = []

    def attend(q, k, v, causal):
        assert q.dtype in (torch.float16, torch.bfloat16)
        calls.append(causal)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        return (out, q.new_zeros(q.shape[:3])) if with_lse else out

    if version == 3:
        module = types.ModuleType("flash_attn_interface")
        module.flash_attn_qkvpacked_func = lambda qkv, softmax_scale=None, causal=False: attend(*qkv.unbind(2), causal)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    else:
        module = types.ModuleType("flash_attn.cute")
        module.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: attend(q, k, v, causal)
        package = types.ModuleType("flash_attn")
        package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    return calls
