"""The doctor's row on the compiler of DeepSpeed's FusedAdam."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from megatron_nepa.doctor.installation import nvcc


@pytest.mark.parametrize(
    ("release", "status", "found"),
    [
        (None, "absent", "not found: torch's fused AdamW"),
        ("12.8", "absent", "is of CUDA 12.8, torch of CUDA 13.0: torch's fused AdamW"),
        ("13.2", "ok", "release 13.2"),
    ],
)
def test_nvcc_must_be_of_torchs_cuda(
    release: str | None, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if release is not None:
        (tmp_path / "bin").mkdir()
        compiler = tmp_path / "bin" / "nvcc"
        compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.93'\n")
        compiler.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    row = nvcc()
    assert row.status == status
    assert found in row.found
