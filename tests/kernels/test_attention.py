"""Attention: SDPA on packed qkv, flash-attn's call sites through a stand-in, and the choice between back-ends."""

import importlib.util
import logging
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_nepa.config import ConfigError
from megatron_nepa.kernels.attention import backends as attention
from megatron_nepa.kernels.attention import flash
from megatron_nepa.kernels.dispatch import select_kernels
from tests.kernels import flash_attn_stub

BF16 = torch.bfloat16


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_equals_softmax_written_out(causal):
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    got = attention.attention_sdpa(qkv, causal)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()


def test_a_mask_of_ones_own_equals_softmax_written_out():
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(2, 1, 5, 5) < 0.5
    visible |= torch.eye(5, dtype=torch.bool)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~visible, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    got = attention.attention_masked(qkv, visible)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()
    (found,), (wanted,) = (torch.autograd.grad(out.sin().sum(), qkv) for out in (got, expected))
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous()


def test_a_causal_mask_equals_causal_attention():
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    causal = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attention.attention_masked(qkv, causal), attention.attention_sdpa(qkv, True))


def test_sdpa_returns_qkvs_gradient_in_its_own_layout():
    """Else the in-place backward of QK-norm and RoPE would have to copy it."""
    qkv = torch.randn(2, 5, 3, 2, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(attention.attention_sdpa(qkv, True).sum(), qkv)
    assert grad.is_contiguous()


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_call_site(monkeypatch, causal):
    calls = flash_attn_stub.install(monkeypatch)
    qkv = torch.randn(2, 5, 3, 2, 32, dtype=BF16, requires_grad=True)
    out = flash.flash_attention_2(deterministic=True)(qkv, causal)
    expected = attention.attention_sdpa(qkv, causal)
    torch.testing.assert_close(out, expected)
    assert calls == [{"causal": causal, "deterministic": True}]
    upstream = torch.randn_like(out)
    (got,), (wanted,) = (torch.autograd.grad(result, qkv, upstream) for result in (out, expected))
    torch.testing.assert_close(got, wanted)


def test_the_stand_in_refuses_what_flash_attn_refuses(monkeypatch):
    flash_attn_stub.install(monkeypatch)
    flash_attn = flash.flash_attention_2(deterministic=False)
    for qkv in (
        torch.randn(1, 2, 3, 1, 32),
        torch.randn(1, 2, 3, 1, 320, dtype=BF16),
        torch.randn(1, 2, 3, 32, 2, dtype=BF16).transpose(-1, -2),
        torch.randn(1, 2, 3, 1, 32, dtype=BF16, device="meta"),
    ):
        with pytest.raises(RuntimeError):
            flash_attn(qkv, True)


def test_flash_attention_is_absent_without_the_package():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    assert flash.flash_attention_2(deterministic=False) is None


@pytest.mark.parametrize("error", [None, ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so.12")])
def test_a_flash_attn_that_cannot_be_used_gives_way_to_sdpa(monkeypatch, caplog, tmp_path, error):
    """flash-attn-4 alone has no packed function; a build for another torch cannot be imported."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("" if error is None else f"raise {error!r}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert names(attention.attention_candidates(64, BF16, deterministic=False))[0] == "sdpa_flash"
    assert "flash_attn is installed but cannot be used" in caplog.text
    sys.modules.pop("flash_attn", None)


def names(candidates):
    return [candidate.__name__ for candidate in candidates]


def test_candidates(monkeypatch):
    flash_attn_stub.install(monkeypatch)
    everything = ["flash_attn", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math"]
    assert names(attention.attention_candidates(64, BF16, deterministic=False)) == everything
    assert names(attention.attention_candidates(64, torch.float32, deterministic=False)) == everything[1:]
    assert names(attention.attention_candidates(320, BF16, deterministic=False)) == everything[1:]
    assert names(attention.attention_candidates(64, BF16, deterministic=True)) == ["flash_attn", "sdpa_math"]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", [3, 4])
def test_newer_versions_call_sites(monkeypatch, version, causal, with_lse):
    """Version 3 takes packed qkv, 4 takes q, k and v; releases differ in whether they return more than the output."""
    calls = flash_attn_stub.install_version(monkeypatch, version, with_lse)
    assert names(attention.attention_candidates(64, BF16, deterministic=False))[-1] == f"flash_attn_{version}"
    assert names(attention.attention_candidates(64, BF16, deterministic=True)) == ["sdpa_math"]
    assert names(attention.attention_candidates(64, torch.float32, deterministic=False))[-1] == "sdpa_math"
    newer = {3: flash.flash_attention_3, 4: flash.flash_attention_4}[version]()
    qkv = torch.randn(2, 5, 3, 2, 32, dtype=BF16, requires_grad=True)
    out, expected = newer(qkv, causal), attention.attention_sdpa(qkv, causal)
    torch.testing.assert_close(out, expected)
    assert calls == [causal]
    upstream = torch.randn_like(out)
    (got,), (wanted,) = (torch.autograd.grad(result, qkv, upstream) for result in (out, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_a_back_end_that_computes_something_else_is_left_out(monkeypatch, caplog, causal, dtype):
    """Its forward or its backward alone, however fast it is."""

    def right(qkv, causal):
        return attention.attention_sdpa(qkv, causal)

    def wrong_mask(qkv, causal):
        return attention.attention_sdpa(qkv, not causal)

    def wrong_scale(qkv, causal):
        return attention.attention_sdpa(torch.cat((1.3 * qkv[:, :, :1], qkv[:, :, 1:]), 2), causal)

    def no_gradient_of_k(qkv, causal):
        q, k, v = qkv.unbind(2)
        return attention.attention_sdpa(torch.stack((q, k.detach(), v), 2), causal)

    def not_a_number(qkv, causal):
        return attention.attention_sdpa(qkv, causal) * float("nan")

    wrong = [wrong_mask, wrong_scale, no_gradient_of_k, not_a_number]
    monkeypatch.setattr(attention, "milliseconds", lambda call, device: 1.0 if call.__defaults__[0] is right else 0.1)
    qkv = torch.randn(2, 16, 3, 2, 32, dtype=dtype, requires_grad=True)
    assert attention.fastest_attention([*wrong, right, attention.sdpa_with(SDPBackend.MATH)], qkv, causal) is not None
    for candidate in wrong:
        assert f"{candidate.__name__} is wrong here" in caplog.text
    assert "right is wrong" not in caplog.text
    assert "sdpa_math is wrong" not in caplog.text
    with pytest.raises(ConfigError, match="no attention back-end"):
        attention.fastest_attention(wrong, qkv, causal)


def test_preferred_back_end_gives_way_where_it_does_not_fit():
    qkv = torch.randn(1, 4, 3, 2, 8)
    got = attention.sdpa_with(SDPBackend.CUDNN_ATTENTION)(qkv, True)
    torch.testing.assert_close(got, attention.attention_sdpa(qkv, True))


def test_the_fastest_that_runs_is_chosen_and_logged(monkeypatch, caplog):
    def broken(qkv, causal):
        raise AssertionError("no kernel for this shape\nand a long story")

    def slow(qkv, causal):
        return attention.attention_sdpa(qkv, causal)

    def fast(qkv, causal):
        return attention.attention_sdpa(qkv, causal)

    def clock(call, device):
        call()
        return next(times)

    times = iter([2.0, 0.5])
    monkeypatch.setattr(attention, "milliseconds", clock)
    qkv = torch.randn(1, 4, 3, 2, 8, requires_grad=True)
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        assert attention.fastest_attention([broken, slow, fast], qkv, True) is fast
    assert "attention: fast; slow 2.000 ms, fast 0.500 ms" in caplog.text
    assert "broken does not run here: no kernel for this shape" in caplog.text
    with pytest.raises(ConfigError, match="no attention back-end runs"):
        attention.fastest_attention([broken], qkv, True)


def test_timing_takes_the_median_of_real_calls():
    calls = []
    duration = attention.milliseconds(lambda: calls.append(0), torch.device("cpu"), repeats=5, warmup=2)
    assert len(calls) == 7
    assert duration > 0


def test_a_cpu_takes_sdpa():
    assert select_kernels("auto", "cpu").attention is attention.attention_sdpa
