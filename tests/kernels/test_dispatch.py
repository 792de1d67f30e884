"""The one dispatch: who serves what, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_nepa.config import ConfigError
from megatron_nepa.kernels.dispatch import Kernels, select_kernels

REFERENCE = {
    "qk_norm_rope": "qk_norm_rope_reference",
    "attention_masked": "attention_masked",
    "swiglu": "swiglu_reference",
    "layer_norm": "layer_norm_reference",
    "residual_norm": "residual_norm_reference",
    "cosine_loss": "cosine_loss_reference",
    "attention": "attention_sdpa",
}


@pytest.mark.parametrize(("choice", "dtype"), [("auto", torch.float32), ("reference", torch.bfloat16)])
def test_a_cpu_takes_the_reference(choice, dtype):
    assert select_kernels(choice, "cpu", dtype=dtype).describe() == REFERENCE == Kernels().describe()


def test_a_cpu_in_bf16_takes_a_few_rows_at_a_time():
    served = {name: f"{name}_cpu" for name in ("qk_norm_rope", "swiglu", "residual_norm")}
    assert select_kernels("auto", "cpu").describe() == REFERENCE | served


def test_a_gpu_takes_the_compiled_kernels_by_itself_but_never_the_interpreter():
    assert select_kernels("auto", "cuda").swiglu.__name__ == "swiglu_reference"
    code = "from megatron_nepa.kernels.dispatch import select_kernels; print(select_kernels('auto', 'cuda').describe())"
    result = run(code, TRITON_INTERPRET="")
    assert "'swiglu': 'swiglu_triton'" in result.stdout, result.stderr
    assert "'residual_norm': 'residual_norm_triton'" in result.stdout


def test_triton_under_the_interpreter():
    chosen = select_kernels("triton", "cpu", attention_shape=(2, 257, 3, 64)).describe()
    fused = {"qk_norm_rope", "swiglu", "residual_norm", "cosine_loss"}
    expected = {name: f"{name}_triton" if name in fused else served for name, served in REFERENCE.items()}
    assert chosen == expected | {"attention": "attention_products"}


def test_a_head_dim_without_a_kernel_is_refused():
    with pytest.raises(ConfigError, match="takes head dims 32, 64, 80, 96, 128, not 48"):
        select_kernels("triton", "cpu", attention_shape=(2, 4, 3, 48))


def run(code, **environment):
    environment = {name: value for name, value in (os.environ | environment).items() if value != ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_triton_on_a_cpu_says_what_to_do():
    code = "from megatron_nepa.kernels.dispatch import select_kernels; select_kernels('triton', 'cpu')"
    result = run(code, TRITON_INTERPRET="")
    assert result.returncode == 1
    assert "ConfigError: kernels is triton, but the run is on cpu; set kernels to reference" in result.stderr


def test_the_reference_path_never_imports_triton_nor_needs_it():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
sys.modules["triton.language"] = None
from megatron_nepa.kernels.dispatch import select_kernels
print(select_kernels("reference", "cpu").describe()["swiglu"], select_kernels("auto", "cpu").describe()["swiglu"])
"""
    result = run(code)
    assert result.stdout.split() == ["swiglu_reference", "swiglu_cpu"], result.stderr
