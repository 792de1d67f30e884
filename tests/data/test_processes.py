"""What a killed run leaves behind, and how much memory a long one takes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nepa.config import DataConfig
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.pretraining import PretrainingLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share

REPOSITORY = Path(__file__).parents[2]

# prints a digest of every step's images, from the step in argv[2] on
RUN = """
import sys
sys.path.insert(0, sys.argv[3])
from test_processes import digest, make_loader
for step, batch in enumerate(make_loader(sys.argv[1], 4, 4 * int(sys.argv[2])), int(sys.argv[2])):
    print(step, digest(batch.images), flush=True)
"""


def make_loader(folder: str | Path, batch: int, consumed: int = 0) -> PretrainingLoader:
    """A loader of one rank."""
    config = DataConfig(horizontal_flip=True)
    share = Share(batch, batch, 1, 0, 1, 0, 1)
    feed = Feed(share, 1, torch.device("cpu"), torch.float32, consumed)
    return PretrainingLoader(scan_folder(folder), config, 32, feed)


def digest(images: torch.Tensor) -> str:
    """A hash of every bit."""
    return hashlib.md5(images.numpy().tobytes()).hexdigest()


def run_until_killed(folder: Path, start: int, steps: int) -> list[str]:
    """The hashes of ``steps`` steps of a process that is then killed with SIGKILL."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RUN, str(folder), str(start), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(steps)]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert not children  # the loader decodes in threads: there is no process that could outlive it
    return lines


def test_a_killed_run_continues_as_if_it_had_not_been(photographs: Path) -> None:
    """kill -9 at step 5, a new process from step 5: the same images as one process sees."""
    loader = make_loader(photographs, 4)
    whole = [f"{step} {digest(batch.images)}" for step, batch in enumerate(islice(loader, 12))]
    loader.close()
    assert len(set(whole)) == 12
    assert run_until_killed(photographs, 0, 5) + run_until_killed(photographs, 5, 7) == whole


@pytest.mark.slow
def test_memory_does_not_grow(cache: Path, tmp_path: Path) -> None:
    """10,000 batches of images from 40 to 1,000 pixels: no growth after the first 2,000."""
    rng = np.random.default_rng(0)
    sources = sorted(cache.glob("*/*.jpg"))
    for number in range(300):
        side = int(40 * 25 ** rng.random() ** 3)
        image = Image.open(sources[number * 6]).resize((side, max(40, side * 3 // 4)))
        image.save(tmp_path / f"{number:03d}.jpg")
    loader = make_loader(tmp_path, 4)
    resident = []
    for _ in range(10):
        for _ in islice(loader, 1000):
            pass
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    loader.close()
    assert max(resident[2:]) - resident[1] < 24, [round(value) for value in resident]
