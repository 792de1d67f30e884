"""A training step makes no device-to-host read of its own: what reads there are, DeepSpeed makes."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.cases import Case, build_engine, sample_images
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, make_images, pretrain

PROJECT = str(Path(__file__).parents[2])
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class ReadCounter(TorchDispatchMode):
    """Collects where the host waits for a value of the device: ``item``, ``equal``, ``nonzero``."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.deepspeed = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in READS:
            callers = [frame.filename for frame in traceback.extract_stack()]
            if any("/deepspeed/" in name for name in callers[-8:]):
                self.deepspeed += 1
            else:
                self.ours.append("".join(traceback.format_stack(limit=6)))
        return function(*arguments, **(options or {}))


def count_reads(planted: bool) -> tuple[list[str], int]:
    case = Case(steps=1).on(micro_batch_size=4)
    engine = build_engine(case)
    batches = [(sample_images(range(k, k + 4), case.model, torch.float32), torch.arange(4) + k) for k in (0, 4)]
    with ReadCounter() as counter:
        for i, (images, sample_index) in enumerate(batches):
            output = engine.forward(images, sample_index)
            if planted:
                output.loss.item()
            engine.backward(output.loss)
            if i == 0:
                engine.end_micro_batch()
        engine.step(1e-3)
    return counter.ours, counter.deepspeed


def test_a_step_reads_nothing_from_the_device() -> None:
    ours, deepspeed = run_ranks(1, count_reads, False)[0]
    assert ours == []
    assert deepspeed > 0  # its overflow check: the counter does see reads


def test_a_read_would_be_seen() -> None:
    ours, _ = run_ranks(1, count_reads, True)[0]
    assert len(ours) == 2


def reads_of_a_run(output_dir: str, images: str, steps: int) -> int:
    arguments = [*TINY, f"--data={images}", f"--output_dir={output_dir}", f"--steps={steps}", "--log_every=100"]
    with ReadCounter() as counter:
        assert pretrain(arguments) is None
    return len(counter.ours)


@pytest.mark.parametrize("data", ["{0}", "{0}=0.7,{1}=0.3"], ids=["one set", "mixture"])
def test_the_loop_reads_no_more_in_a_longer_run(data: str, tmp_path: Path) -> None:
    """Starting, logging once and saving once read; the steps between do not."""
    images = data.format(make_images(tmp_path / "images"), make_images(tmp_path / "more", 5))
    short, long = (run_ranks(1, reads_of_a_run, str(tmp_path / f"{n}"), images, n)[0] for n in (2, 7))
    assert short == long
