"""What is installed, and what each optional part will do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_nepa.doctor.report import Row
from megatron_nepa.kernels.attention.flash import import_flash_attn

REQUIRED = ("megatron_nepa", "torch", "torchvision", "deepspeed", "triton", "numpy", "safetensors", "timm", "wandb")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def check_installation() -> Iterator[Row]:
    """Versions, devices, compilers, folders and the surroundings of a job."""
    yield Row("python", "ok", f"{platform.python_version()} in {sys.prefix}")
    for package in REQUIRED:
        version = installed(package)
        yield (
            Row(package, "ok", version)
            if version
            else Row(package, "failed", "not installed", f"pip install {package}.")
        )
    yield from _dali()
    yield from _devices()
    yield from _optional()
    yield from _compilers()
    if torch.cuda.is_available():
        yield nvcc()
    yield from _folders()
    yield _slurm()


def installed(package: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dali() -> Iterator[Row]:
    found = {package: version for package in DALI if (version := installed(package))}
    if not found:
        yield Row("DALI", "failed", "not installed", "pip install 'megatron_nepa[cuda13]' (or cuda12).")
    elif len(found) > 1:
        yield Row(
            "DALI", "failed", "both CUDA variants are installed and own the same files", f"pip uninstall {DALI[1]}, "
            f"then pip install --force-reinstall {DALI[0]}.",
        )  # fmt: skip
    else:
        package, version = next(iter(found.items()))
        decoder = "nvJPEG" if torch.cuda.is_available() else "libjpeg-turbo"
        yield Row("DALI", "ok", f"{version} ({package}): images are decoded by {decoder}")


def _devices() -> Iterator[Row]:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Row("CUDA", "absent", f"no device ({built}): training runs on the CPU, over gloo")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        size = f"{properties.total_memory / 1e9:.0f} GB, sm_{properties.major}{properties.minor}"
        if properties.major >= 8:
            yield Row(f"GPU {number}", "ok", f"{properties.name}, {size}, CUDA {torch.version.cuda}")
        else:
            remedy = "take an sm_80 or newer GPU, or --dtype fp32 --kernels reference."
            yield Row(f"GPU {number}", "failed", f"{properties.name}, {size}: no bf16 matrix units", remedy)
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    yield (
        Row("NCCL", "ok", f"{version}: serves every collective on GPUs")
        if version
        else Row("NCCL", "failed", "torch is built without it", "install torch's CUDA wheel.")
    )


def _optional() -> Iterator[Row]:
    on_gpu = torch.cuda.is_available()
    parts = {
        "flash-attn": ("flash_attn", "serves attention on GPUs", "attention runs through torch's SDPA"),
        "Apex": ("apex.optimizers", "its FusedAdam and FusedLayerNorm serve GPUs", "DeepSpeed's FusedAdam serves GPUs"),
        "transformers": ("transformers", "serves benchmark.py train --baseline", "benchmark.py has no peer to time"),
    }
    for name, (module, with_it, without) in parts.items():
        broken = _why_broken(module)
        if broken is not None:
            yield Row(name, "absent", f"{broken}: {without}")
        elif _can_find(module):
            unused = "" if on_gpu or name not in ("flash-attn", "Apex") else "; unused without a GPU"
            yield Row(name, "ok", f"{installed(module.partition('.')[0]) or installed(name) or ''}: {with_it}{unused}")
        else:
            yield Row(name, "absent", without)


def _why_broken(module: str) -> str | None:
    """Why an optional package that is installed will not be used; None where nothing speaks against it."""
    if module == "flash_attn":
        try:
            import_flash_attn()
        except ImportError as error:
            return str(error)
    if module == "apex.optimizers" and _can_find(module) and not _can_find("amp_C"):
        return "built without its CUDA extensions"
    return None


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _compilers() -> Iterator[Row]:
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join((beside, os.environ.get("PATH", "")))
    compiler = shutil.which("c++", path=path) or shutil.which("g++", path=path)
    ninja = shutil.which("ninja", path=path)
    name = "C++ compiler"
    missing = " and ".join(tool for tool, found in (("c++", compiler), ("ninja", ninja)) if not found)
    if not missing:
        yield Row(name, "ok", f"{compiler}, {ninja}")
    elif torch.cuda.is_available():
        remedy = "install g++ from your distribution, and ninja with pip: DeepSpeed's Adam is compiled."
        yield Row(name, "failed", f"no {missing}", remedy)
    else:
        yield Row(name, "absent", f"no {missing}: needed by --compile and ds_configs/zero2_offload.json")


def nvcc() -> Row:
    """The CUDA compiler that DeepSpeed's FusedAdam is built with, whose major version must be torch's."""
    from torch.utils.cpp_extension import CUDA_HOME  # it looks for the compiler when it is imported

    instead = "torch's fused AdamW takes the place of DeepSpeed's"
    path = Path(CUDA_HOME or "/nonexistent") / "bin" / "nvcc"
    if not path.is_file():
        return Row("nvcc", "absent", f"not found: {instead}")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", text)
    if release is None or release[1] != str(torch.version.cuda).partition(".")[0]:
        found = f"CUDA {release[0].removeprefix('release ')}" if release else "an unknown version"
        return Row("nvcc", "absent", f"{path} is of {found}, torch of CUDA {torch.version.cuda}: {instead}")
    return Row("nvcc", "ok", f"{path}, {release[0]}")


def _folders() -> Iterator[Row]:
    from megatron_nepa.data.index.builtin import cache_folder  # needs Pillow, and what stands above does not

    for name, folder in (("current folder", Path.cwd()), ("cache of built-in images", cache_folder())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free / 1e9
            yield Row(name, "ok", f"{folder} can be written, {free:.0f} GB free")
        except OSError as error:
            remedy = "give --output_dir a folder that can be written; $MEGATRON_NEPA_CACHE moves the cache."
            yield Row(name, "failed", f"{folder}: {error.strerror}", remedy)


def _slurm() -> Row:
    if "SLURM_JOB_ID" not in os.environ:
        return Row("Slurm", "absent", "not in a job: start with deepspeed, torchrun or sbatch examples/slurm/*.sbatch")
    if "SLURM_STEP_ID" not in os.environ:
        return Row("Slurm", "ok", f"job {os.environ['SLURM_JOB_ID']}, outside of a step: srun starts the ranks")
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    missing = [name for name in names if name not in os.environ]
    if missing:
        return Row("Slurm", "failed", f"{', '.join(missing)} not set", "start the ranks with srun.")
    return Row("Slurm", "ok", f"rank {os.environ['SLURM_PROCID']} of {os.environ['SLURM_NTASKS']}")
