"""A check, and how whatever happens in one becomes rows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_nepa.acceptance.report import Row
from megatron_nepa.doctor.report import Row as DoctorRow

# packages by the name that is imported, with what installs them where there is no network: copied there as wheels
CARRY = {
    "nvidia.dali": "nvidia-dali-cuda130 (or -cuda120 for CUDA 12)",
    "nvidia.nvimgcodec": "nvidia-dali-cuda130 (or -cuda120 for CUDA 12)",
    "nvidia": "nvidia-dali-cuda130 (or -cuda120 for CUDA 12)",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "flash_attn": "flash-attn 2.8, built for this torch",
    "flash_attn_interface": "flash-attn 3 (flash_attn_3), built for this torch",
    "flash_attn.cute": "flash-attn-4",
    "apex": "NVIDIA Apex, built with its CUDA extensions",
}
# as Python says it, and as the project's tools do
MISSING = re.compile(r"No module named '([\w.]+)'|\b([\w.]+) is not installed[;:]")
# Triton 3.6's interpreter; on a GPU nothing is interpreted
NUMPY_IS_NEWER = "only 0-dimensional arrays can be converted"
INTERPRETER_FAILS = "this Triton's interpreter does not run with this NumPy"
NUMPY_REMEDY = "pip install 'numpy<2.4' for what runs in Triton's interpreter; a GPU needs none."


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        name: unique in its part.
        seconds: after which it is ended; it begins only where its part has as many left.
        call: looks, and returns what it found.
        gpu: whether it needs one.
    """

    name: str
    seconds: float
    call: Callable[[], Iterable[Row]]
    gpu: bool = True


class NotRun(Exception):
    """Raised by a check that cannot be done here.

    Args:
        reason: why.
        remedy: what would make it possible.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


def carry(module: str) -> str:
    """What to bring along for a module that is not installed."""
    package = CARRY.get(module) or CARRY.get(module.partition(".")[0]) or module.partition(".")[0]
    return f"carry along {package}: pip download it where there is a network, pip install --no-index --find-links here."


def not_installed(module: str, consequence: str = "") -> Row:
    """The row of a package that is not installed."""
    return Row(CARRY.get(module, module), "NOT RUN", "not installed", consequence, carry(module))


def can_find(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def perform(check: Check, has_gpu: bool) -> tuple[list[Row], bool]:
    """The rows of a check, and whether the process is spoilt: no later call to CUDA can succeed in it."""
    if check.gpu and not has_gpu:
        return [Row(check.name, "NOT RUN", "needs a GPU", "", "run the same command on a machine with a GPU.")], False
    try:
        return list(check.call()), False
    except NotRun as error:
        return [Row(check.name, "NOT RUN", str(error), "", error.remedy)], False
    except Exception as error:  # compilers, drivers and packages raise kinds of their own
        text = " ".join(str(error).split()) or type(error).__name__
        if NUMPY_IS_NEWER in text:
            return [Row(check.name, "NOT RUN", INTERPRETER_FAILS, "", NUMPY_REMEDY)], False
        missing = MISSING.search(text)
        module = (missing[1] or missing[2]) if missing else "megatron_nepa"
        if not module.startswith("megatron_nepa"):
            return [Row(check.name, "NOT RUN", f"the package {module} is not installed", "", carry(module))], False
        spoilt = "CUDA error" in text or type(error).__name__ == "AcceleratorError"
        remedy = "mend what the error names; the part's log in the report's folder has all of it."
        return [
            Row(check.name, "FAIL", f"{type(error).__name__}: {text[:300]}", "it ended in an error", remedy)
        ], spoilt


def from_doctor(row: DoctorRow, meaning: str = "") -> Row:
    """A row of the doctor's as one of ours."""
    status = {"ok": "PASS", "failed": "FAIL", "absent": "NOT RUN", "not checked": "NOT RUN"}[row.status]
    return Row(row.name, status, row.found, meaning, row.remedy)  # type: ignore[arg-type]
