"""Part 2: the script's own runs: plain torch's curve, the fused kernels', every grid's, and a run that is resumed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_nepa.acceptance.check import Check
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.scripts import DETERMINISTIC, losses, train
from megatron_nepa.acceptance.setting import Setting

TOLERANCE = 0.02  # two orders of the same sums in bf16
BACKEND = {"cuda": "NCCL", "cpu": "gloo"}


def checks(setting: Setting) -> list[Check]:
    """On one rank first, whose first run has DeepSpeed compile its Adam; then the grids of all devices."""
    found = [
        Check("curve of plain torch", 150, partial(reference_curve, setting), gpu=False),
        Check("curve of the fused kernels", 90, partial(fused_curve, setting)),
        Check("resume", 120, partial(resume, setting), gpu=False),
    ]
    for ranks, size in grids(setting.calls.count()):
        sequence = size > 1
        name = f"{ranks} ranks, tensor parallel {size}{' with sequence parallelism' if sequence else ''}"
        found.append(Check(name, 90, partial(grid, setting, name, ranks, size)))
    return found


def grids(count: int) -> list[tuple[int, int]]:
    """Ranks and tensor-parallel size: of all devices, or of the largest power of two of them."""
    ranks = 2 ** int(math.log2(count)) if count else 0
    return [(ranks, size) for size in (1, 2, 4, 8) if ranks > 1 and size <= ranks]


def reference_curve(setting: Setting) -> Iterator[Row]:
    """Whether it learns."""
    curve = reference(setting, again=True)
    figure = f"loss {curve[0]:.4f} to {curve[-1]:.4f} in {len(curve)} steps"
    if all(map(math.isfinite, curve)) and curve[-1] < curve[0]:
        yield Row("curve of plain torch", "PASS", figure, "the engine trains on this machine")
    else:
        remedy = "look into rank0.log and metrics.jsonl in the folder work/reference."
        yield Row("curve of plain torch", "FAIL", figure, "the loss does not fall", remedy)


def fused_curve(setting: Setting) -> Iterator[Row]:
    """The same steps with the Triton kernels."""
    curve = train(_fresh(setting, "fused"), [*_flags(setting), "--kernels=triton"])
    remedy = "set --kernels reference, and see which kernel of part 1 errs."
    yield compare("curve of the fused kernels", reference(setting), curve, "plain torch's", remedy)


def grid(setting: Setting, name: str, ranks: int, size: int) -> Iterator[Row]:
    """The same steps on several devices."""
    flags = [*_flags(setting), "--kernels=reference", f"--tensor_parallel_size={size}"]
    flags += ["--sequence_parallel"] if size > 1 else []
    micro_batch = int(next(f for f in flags if f.startswith("--micro_batch_size=")).partition("=")[2])
    batch = int(next(f for f in flags if f.startswith("--global_batch_size=")).partition("=")[2])
    flags.append(f"--micro_batch_size={min(micro_batch, batch // (ranks // size))}")
    curve = train(_fresh(setting, f"grid_{ranks}_{size}"), flags, ranks)
    remedy = "train on one device until tests/distributed says which parameter differs."
    where = f"one rank's, over {BACKEND[setting.calls.device.type]}"
    yield compare(name, reference(setting), curve, where, remedy)


def resume(setting: Setting) -> Iterator[Row]:
    """The last checkpoint is taken away, so that the second half is trained again: it must repeat bit for bit."""
    output = _fresh(setting, "resume")
    half = setting.run_steps // 2
    flags = [*_flags(setting), f"--save_every={half}"]
    whole = train(output, flags, before=DETERMINISTIC)
    newest = next(path for path in output.rglob(f"*{setting.run_steps:04d}") if path.is_dir())
    shutil.rmtree(newest)
    (output / "metrics.jsonl").unlink()
    yield repeated(whole[half:], train(output, flags, before=DETERMINISTIC))


def repeated(whole: list[float], resumed: list[float]) -> Row:
    """Whether the resumed half is the whole run's."""
    differing = [step for step, (a, b) in enumerate(zip(whole, resumed, strict=False), 1) if a != b]
    if len(whole) == len(resumed) and not differing:
        return Row("resume", "PASS", f"{len(whole)} steps repeated bit for bit", "a run can be stopped at any time")
    figure = f"{len(differing)} of {len(whole)} steps differ, the first is step {min(differing, default=0)} after it"
    if len(whole) != len(resumed):
        figure = f"{len(resumed)} steps after the resume, {len(whole)} before"
    remedy = "find what a checkpoint lacks: the optimizer's step and moments, the place in the data."
    return Row("resume", "FAIL", figure, "a resumed run is another run", remedy)


def compare(name: str, expected: list[float], found: list[float], of_what: str, remedy: str) -> Row:
    """Whether two curves are the same but for rounding."""
    if len(expected) != len(found):
        return Row(name, "FAIL", f"{len(found)} steps, not {len(expected)}", "the run did not end", remedy)
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    figure = f"loss within {worst:.1e} of {of_what} in {len(found)} steps"
    if worst <= TOLERANCE:
        return Row(name, "PASS", figure, "it computes the same")
    return Row(name, "FAIL", figure, f"more than rounding ({TOLERANCE})", remedy)


def reference(setting: Setting, again: bool = False) -> list[float]:
    """Losses in plain torch on one rank, trained where they are not there yet."""
    output = setting.work / "reference"
    found = [] if again else losses(output)
    if len(found) != setting.run_steps:
        found = train(_fresh(setting, "reference"), [*_flags(setting), "--kernels=reference"])
    return found


def _flags(setting: Setting) -> list[str]:
    return [*setting.run_flags, f"--steps={setting.run_steps}"]


def _fresh(setting: Setting, name: str) -> Path:
    folder = setting.work / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder
