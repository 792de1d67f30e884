"""Files for others get the permissions that the user's umask gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_nepa.checkpoint.format.safetensors_file import write_safetensors


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_safetensors_file_follows_the_umask(umask: int, tmp_path: Path) -> None:
    former = os.umask(umask)
    try:
        write_safetensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(former)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
