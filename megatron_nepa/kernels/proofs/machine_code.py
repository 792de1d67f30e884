"""Ahead-of-time compilation of a recorded launch, and what its machine code says; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_nepa.kernels.launching.launch import Launch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
ACCESS = re.compile(r"\b(LDG|STG|LDL|STL)\.?([\w.]*)")


@dataclass(frozen=True)
class MachineCode:
    """Figures of one compiled kernel.

    Attributes:
        registers: registers that a thread uses.
        spilled_bytes: of a thread's stack, where registers that do not fit go.
        shared_bytes: shared memory of a program.
        wide_loads, wide_stores: instructions that move 16 bytes a thread between device memory and registers.
        narrow: instructions that move 1 or 2 bytes: a bf16 tensor read or written value by value.
        local: instructions on local memory.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    narrow: int
    local: int


def compile_launch(launch: Launch, arch: str) -> MachineCode:
    """Compile ``launch`` for ``arch`` (``sm_80``, ``sm_90``) as a run on that GPU would, and read its machine code."""
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": launch.num_warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        accesses = ACCESS.findall(_cuobjdump("-sass", file.name))
    resources = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return MachineCode(
        registers=int(resources["REG"]),
        spilled_bytes=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
        wide_loads=sum(name == "LDG" and "128" in kind for name, kind in accesses),
        wide_stores=sum(name == "STG" and "128" in kind for name, kind in accesses),
        narrow=sum(bool(re.search(r"\b[US](8|16)\b", kind)) for name, kind in accesses if name in ("LDG", "STG")),
        local=sum(name in ("LDL", "STL") for name, _ in accesses),
    )


def _source(launch: Launch) -> ASTSource:
    """The specialisation that Triton's launcher would compile: torch's buffers are 16-byte aligned, integers divisible
    by 16 are marked so, and None and 1 become constants."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes = {}
    for index, (name, arg) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if arg is None or (isinstance(arg, int) and arg == 1):
            signature[name], constants[name] = "constexpr", arg
            continue
        if isinstance(arg, torch.Tensor):
            signature[name] = POINTERS[arg.dtype]
        else:
            signature[name] = "fp32" if isinstance(arg, float) else "i32"
        if isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    return ASTSource(launch.kernel, signature, constants, attributes)


def _cuobjdump(*arguments: str) -> str:
    """Run the cuobjdump that comes with Triton."""
    return subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, *arguments], capture_output=True, text=True, check=True
    ).stdout
