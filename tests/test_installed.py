"""The wheel in an environment without a checkout: every command is there, the main job runs from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = [f"megatron_nepa.tools.{path.stem}" for path in sorted((ROOT / "tools").glob("*.py"))]
EXAMPLES = [f"megatron_nepa.examples.{path.stem}" for path in sorted((ROOT / "examples").glob("*.py"))]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has the wheel, and finds other packages where this process does."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, f"--wheel-dir={folder}", str(ROOT)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True, cwd=folder, env=without_checkout())
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def without_checkout() -> dict[str, str]:
    """The environment without PYTHONPATH, which may lead to a checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def call(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run([python, *arguments], cwd=folder, env=without_checkout(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_wheel_that_is_found(installed: Path, tmp_path: Path) -> None:
    found = call(installed, tmp_path, "-c", "import megatron_nepa; print(megatron_nepa.__file__)")
    assert Path(found).is_relative_to(installed.parents[1])


@pytest.mark.parametrize("module", ["megatron_nepa", *EXAMPLES, *TOOLS])
def test_every_command_is_a_module(installed: Path, tmp_path: Path, module: str) -> None:
    assert call(installed, tmp_path, "-m", module, "--help").startswith("usage:")


def test_the_main_job_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """On the built-in photographs, with one of the package's own DeepSpeed configs."""
    flags = ["--ds_config=ds_configs/zero2_fp32.json", "--steps=1", "--output_dir=run", "--stall_timeout=0"]
    flags += ["--global_batch_size=2", "--micro_batch_size=2", "--model.num_layers=1"]
    call(installed, tmp_path, "-m", "megatron_nepa", *flags)
    assert (tmp_path / "run/checkpoints/latest").is_file()
    assert (tmp_path / "run/figures/loss.png").is_file()
