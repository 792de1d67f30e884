"""Where a step's time goes: a trace of some steps, and ranges that NVIDIA's profilers show for every step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

TABLE_ROWS = 30


class StepProfiler:
    """Marks the parts of every step, and records the steps that ``--profile`` names.

    Args:
        steps: numbers of the optimizer steps to record, counted from 1; empty records none.
        folder: for ``trace.json`` (open it in Perfetto or chrome://tracing) and ``operations.txt``, the operations
            that take most time; replaced where they exist.
        device: where the run trains.
    """

    def __init__(self, steps: range, folder: Path, device: torch.device) -> None:
        self.steps = steps
        self.folder = folder
        self.on_gpu = device.type == "cuda"
        self._recording: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self._write()  # of a run that ends before its last step to record

    def part(self, name: str) -> AbstractContextManager[object]:
        """A context for one part of the step; costs nothing where nobody watches."""
        if self._recording is not None:
            return record_function(name)
        return torch.cuda.nvtx.range(name) if self.on_gpu else contextlib.nullcontext()

    def before(self, step: int) -> None:
        """Begin to record where step number ``step``, which is about to start, is the first to record."""
        if step in self.steps and self._recording is None:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.on_gpu else [])
            self._recording = profile(activities=activities, record_shapes=True)
            with contextlib.nullcontext() if self.on_gpu else _silent_stderr():
                self._recording.start()

    def after(self, step: int) -> Path | None:
        """End the record after its last step; returns the folder once it is written."""
        if self._recording is None or step < self.steps[-1]:
            return None
        return self._write()

    def _write(self) -> Path | None:
        if self._recording is None:
            return None
        recorded, self._recording = self._recording, None
        with contextlib.nullcontext() if self.on_gpu else _silent_stderr():
            recorded.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / "trace.json.partial"
        recorded.export_chrome_trace(str(beside))
        beside.replace(self.folder / "trace.json")
        order = "self_cuda_time_total" if self.on_gpu else "self_cpu_time_total"
        table = recorded.key_averages(group_by_input_shape=True).table(
            sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=60, max_shapes_column_width=60
        )
        (self.folder / "operations.txt").write_text(table)
        return self.folder


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without what torch's profiler prints from C++ on a CPU: that its search for GPUs failed."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
