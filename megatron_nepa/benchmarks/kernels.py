"""Times every fused operation against the alternatives at hand, on the device that the process has."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_nepa.benchmarks.contenders import Contest, Implementation, contests
from megatron_nepa.config import require
from megatron_nepa.kernels.launching.timing import milliseconds
from megatron_nepa.recipes import PRETRAINING_RECIPES

# OPERATIONS and attention, by name: --help does not wait for torch
NAMES = ("qk_norm_rope", "swiglu", "residual_norm", "cosine_loss", "attention")
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
CPU_MICRO_BATCH = 2


@dataclass(frozen=True)
class Timing:
    """One implementation of one operation.

    Attributes:
        operation, contender: what was timed.
        forward_ms: forward without gradients.
        total_ms: forward and backward.
        bandwidth_share: the operation's minimum bytes over ``total_ms``, over the measured bandwidth of a copy.
        error: why it did not run, or empty.
    """

    operation: str
    contender: str
    forward_ms: float | None
    total_ms: float | None
    bandwidth_share: float | None
    error: str = ""


def copy_bandwidth(device: torch.device) -> float:
    """Measured bytes a second of a large copy on ``device``, reads and writes both counted."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), device) / 1e3)


def time_operation(operation: Contest, device: torch.device, bandwidth: float, repeats: int = 20) -> list[Timing]:
    """Time every contender; one that fails is a row with its error, not the end of the benchmark."""
    rows = []
    for name, implementation in operation.contenders.items():
        try:
            forward, total = _time(operation, implementation, device, repeats)
            share = operation.minimum_bytes / (total / 1e3) / bandwidth
            rows.append(Timing(operation.name, name, forward, total, share))
        except Exception as error:  # compilers raise kinds of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows.append(Timing(operation.name, name, None, None, None, reason))
    return rows


def _time(
    operation: Contest, implementation: Implementation, device: torch.device, repeats: int
) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    leaves = {name: operation.inputs[name].detach().clone().requires_grad_() for name in operation.trained}

    def forward() -> tuple[Tensor, ...]:
        # views of the leaves, since an operation that works in place refuses a leaf
        views = {name: leaf.view_as(leaf) for name, leaf in leaves.items()}
        outputs = implementation(**(operation.inputs | views))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output for output in outputs if output.requires_grad or not torch.is_grad_enabled())

    upstream = tuple(torch.randn_like(output) for output in forward())

    def both() -> None:
        torch.autograd.grad(forward(), tuple(leaves.values()), upstream, allow_unused=True)

    total = milliseconds(both, device, repeats)
    with torch.no_grad():
        return milliseconds(forward, device, repeats), total


def format_table(rows: list[Timing], device: torch.device, bandwidth: float) -> str:
    """The timings as text, headed by the device that they belong to."""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
        note = ""
    else:
        where = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads), torch {torch.__version__}"
        note = "CPU figures of the reference operations; they say nothing about a GPU or the Triton kernels.\n"
    lines = [
        f"{where}; a copy moves {bandwidth / 1e9:.1f} GB/s",
        f"{'operation':<15}{'contender':<28}{'forward ms':>12}{'both ms':>12}{'of copy bandwidth':>19}",
    ]
    for row in rows:
        if row.error:
            lines.append(f"{row.operation:<15}{row.contender:<28}  failed: {row.error}")
        else:
            lines.append(
                f"{row.operation:<15}{row.contender:<28}{row.forward_ms:>12.3f}{row.total_ms:>12.3f}"
                f"{row.bandwidth_share:>19.1%}"
            )
    return note + "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``benchmark.py kernels``."""
    parser.add_argument("--recipe", default="nepa_b", help="whose shapes to use")
    default = f"default: the recipe's; {CPU_MICRO_BATCH} on a CPU"
    parser.add_argument("--micro_batch_size", type=int, default=None, help=f"samples ({default})")
    parser.add_argument("--operations", default=",".join(NAMES), help="comma-separated operations")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the activations")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    """Time and print.

    Raises:
        ConfigError: for an unknown recipe or operation.
    """
    require(
        options.recipe in PRETRAINING_RECIPES,
        f"--recipe {options.recipe} is unknown; there are {', '.join(PRETRAINING_RECIPES)}.",
    )
    wanted = options.operations.split(",")
    for name in wanted:
        require(name in NAMES, f"--operations {name} is unknown; there are {', '.join(NAMES)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = PRETRAINING_RECIPES[options.recipe]()
    batch = options.micro_batch_size or (recipe.micro_batch_size if device.type == "cuda" else CPU_MICRO_BATCH)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    bandwidth = copy_bandwidth(device)
    rows = []
    for operation in contests(recipe.model, batch, device, dtype):
        if operation.name in wanted:
            rows += time_operation(operation, device, bandwidth)
    if options.json:
        print(
            json.dumps(
                {
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                    "copy_bytes_per_second": bandwidth,
                    "timings": [asdict(row) for row in rows],
                }
            )
        )
    else:
        print(format_table(rows, device, bandwidth))
