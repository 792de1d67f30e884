"""Part 1: what is installed, what the devices are and compute, and every fused kernel against fp64."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial

import torch

from megatron_nepa.acceptance.check import (
    INTERPRETER_FAILS,
    NUMPY_IS_NEWER,
    NUMPY_REMEDY,
    Check,
    NotRun,
    can_find,
    carry,
    from_doctor,
    not_installed,
)
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.setting import Setting
from megatron_nepa.benchmarks.contenders import Contest, contests
from megatron_nepa.config import ModelConfig
from megatron_nepa.doctor.installation import DALI, REQUIRED, check_installation, installed
from megatron_nepa.doctor.operations import KERNELS_REMEDY, check_attention, judge
from megatron_nepa.kernels.operations import OPERATIONS
from megatron_nepa.training.reporting.device_peak import measure_matmul

# what the other parts do without
NEEDED_BY = {
    "deepspeed": "part 2, and the engine's rows of 3 and 5, need it",
    "nvidia.dali": "parts 2 and 4, and the engine's rows of 3 and 5, need it",
    "triton": "the fused kernels need it",
    "transformers": "the comparison with the peer in part 3 needs it",
    "timm": "parts 2 and 5 need it",
    "torchvision": "timm needs it",
    "wandb": "parts 2 and 5 need it",
    "safetensors": "parts 2 and 5 need it",
    "matplotlib": "parts 2 and 5 need it",
    "tqdm": "parts 2 and 5 need it",
    "PIL": "part 4 needs it",
    "skimage": "part 4 needs its photographs",
    "sklearn": "part 4 needs its photographs",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def checks(setting: Setting) -> list[Check]:
    """Versions and devices first, then the models from the smallest on."""
    found = [
        Check("versions", 30, versions, gpu=False),
        Check("devices", 30, partial(devices, setting), gpu=False),
    ]
    for title, model in setting.kernel_models.items():
        for operation in OPERATIONS:
            if operation.serves(model):
                for dtype in DTYPES:
                    name = f"kernel {operation.name}, {title}, {dtype}"
                    call = partial(kernel, setting, name, model, operation.name, dtype)
                    found.append(Check(name, 30, call, gpu=False))
        found.append(Check(f"attention, {title}", 30, partial(attention, setting, title, model), gpu=False))
    return found


def versions() -> Iterator[Row]:
    """What is installed, and what lacks."""
    present = {name: version for name in (*REQUIRED, *DALI, "transformers") if (version := installed(name))}
    present["python"] = platform.python_version()
    present["CUDA of torch"] = torch.version.cuda or "none"
    yield Row("versions", "PASS", ", ".join(f"{name} {version}" for name, version in present.items()))
    for module, consequence in NEEDED_BY.items():
        if not can_find(module):
            yield not_installed(module, consequence)


def devices(setting: Setting) -> Iterator[Row]:
    """The doctor's rows on devices and compilers, and a matrix product of each device against fp64."""
    named = {"python", *REQUIRED, "DALI", "flash-attn", "Apex", "transformers", "Slurm"}  # that have rows elsewhere
    try:
        for row in check_installation():
            if row.name not in named:
                yield from_doctor(row)
    except ModuleNotFoundError:  # which is a row of the versions
        pass
    for device in setting.calls.devices():
        yield product(device)


def product(device: torch.device) -> Row:
    """A product in bf16 with fp32 sums against fp64, and its rate at a large size."""
    a, b = (torch.randn(512, 512, device=device).bfloat16() for _ in range(2))
    expected = a.double() @ b.double()
    error = float(((a @ b).double() - expected).abs().max() / expected.abs().max())
    rate = measure_matmul(device, torch.bfloat16, 8192 if device.type == "cuda" else 512)
    figure = f"error {error:.1e} of the largest value, {rate / 1e12:.3g} TFLOP/s in bf16"
    if error <= torch.finfo(torch.bfloat16).eps:
        return Row(f"matrix product on {device}", "PASS", figure)
    remedy = "take this device out of service: every result on it is in doubt."
    return Row(f"matrix product on {device}", "FAIL", figure, "the device computes wrong", remedy)


def kernel(setting: Setting, name: str, model: ModelConfig, operation: str, dtype: str) -> Iterator[Row]:
    """One fused operation, forward and backward."""
    if not can_find("triton"):
        raise NotRun("the package triton is not installed", carry("triton"))
    if setting.calls.device.type == "cpu":
        from megatron_nepa.kernels.launching.interpreter import is_interpreting, round_bf16_to_nearest

        if not is_interpreting():
            raise NotRun("on a CPU the kernels run in Triton's interpreter only", "set TRITON_INTERPRET=1.")
        round_bf16_to_nearest()
    fused = next(each.fused for each in OPERATIONS if each.name == operation)()
    contest = _contest(setting, model, operation, DTYPES[dtype])
    where = "Triton" if setting.calls.device.type == "cuda" else "Triton's interpreter"
    row = judge(name, contest, fused, where, KERNELS_REMEDY)
    if NUMPY_IS_NEWER in row.found:
        raise NotRun(INTERPRETER_FAILS, NUMPY_REMEDY)
    yield from_doctor(row)


def attention(setting: Setting, title: str, model: ModelConfig) -> Iterator[Row]:
    """Every back-end of attention at hand, in bf16."""
    contest = _contest(setting, model, "attention", torch.bfloat16)
    for row in check_attention(contest, setting.calls.device):
        if row.status in ("ok", "failed"):
            found = from_doctor(row)
            yield Row(f"{row.name}, {title}", found.status, found.figure, "", found.remedy)


def _contest(setting: Setting, model: ModelConfig, operation: str, dtype: torch.dtype) -> Contest:
    torch.manual_seed(0)
    every = contests(model, setting.kernel_batch, setting.calls.device, dtype)
    return next(contest for contest in every if contest.name == operation)


def attention_contest(setting: Setting) -> Contest:
    """Attention of the first model."""
    return _contest(setting, next(iter(setting.kernel_models.values())), "attention", torch.bfloat16)
