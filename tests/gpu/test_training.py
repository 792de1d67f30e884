"""Training on one GPU: the script in a process of its own, ZeRO-2 in bf16 over NCCL with one rank."""

from __future__ import annotations

import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest

from megatron_nepa.training.stopping.exit_codes import EXIT_TRAINING_FAILED
from tests.runs import TINY, read_metrics

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
BASE = [flag for flag in TINY if "num_threads" not in flag]  # which synthetic images have no use for
BASE += ["--dtype=bf16", "--data=synthetic", "--model.hidden_size=64", "--log_every=1"]
# two orders of the same sums in bf16
TOLERANCE = 0.02
# attention's backward and the sums of gradients repeat bit for bit only if torch is asked to
DETERMINISTIC = (
    "import runpy, sys, torch; torch.use_deterministic_algorithms(True); sys.argv = sys.argv[1:]; "
    "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
)

NOT_FINITE = (
    "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    "from tests.runs import poison_from_step; poison_from_step(3); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def train(output: Path, *flags: str, ds_config: str = "zero2", deterministic: bool = False) -> list[float]:
    """Run the script; the loss of every step that the folder's log holds."""
    for package in ("deepspeed", "timm", "nvidia.dali"):
        pytest.importorskip(package)
    program = ["-c", DETERMINISTIC] if deterministic else []
    command = [sys.executable, *program, str(ROOT / "pretrain_nepa.py"), *BASE, f"--output_dir={output}", *flags]
    command.append(f"--ds_config={ROOT / 'ds_configs' / ds_config}.json")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [row["loss"] for row in read_metrics(output)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of eight steps in plain torch."""
    return train(tmp_path_factory.mktemp("reference"), "--steps=8", "--kernels=reference")


@pytest.mark.parametrize(
    "flags",
    [
        ["--kernels=triton"],
        ["--kernels=triton", "--activation_checkpointing=selective"],
        ["--kernels=triton", "--activation_checkpointing=full"],
        ["--kernels=triton", "--compile"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_the_loss_curve_is_plain_torchs(flags: list[str], reference: list[float], tmp_path: Path) -> None:
    assert train(tmp_path, "--steps=8", *flags) == pytest.approx(reference, abs=TOLERANCE)


def test_offload_computes_the_same(reference: list[float], tmp_path: Path) -> None:
    losses = train(tmp_path, "--steps=8", "--kernels=reference", ds_config="zero2_offload")
    assert losses == pytest.approx(reference, abs=TOLERANCE)


def test_without_nvcc_torchs_adamw_computes_the_same(
    reference: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))  # where nothing is built yet
    losses = train(tmp_path / "run", "--steps=8", "--kernels=reference")
    assert losses == pytest.approx(reference, abs=TOLERANCE)


def test_a_resumed_run_repeats_the_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: its last checkpoint is taken away, so that the second half is trained again."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags = ["--steps=8", "--save_every=4"]
    whole = train(tmp_path / "run", *flags, deterministic=True)
    (newest,) = (tmp_path / "run").rglob("*0008")
    newest.rename(tmp_path / "set_aside")
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    assert train(tmp_path / "run", *flags, deterministic=True) == whole[4:]


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_step_that_is_not_finite_changes_nothing(kernels: str, tmp_path: Path) -> None:
    """Every step from the third on: two are skipped, then the run gives up, and the newest checkpoint trains on."""
    for package in ("deepspeed", "timm"):
        pytest.importorskip(package)
    script = str(ROOT / "pretrain_nepa.py")
    flags = [*BASE, f"--output_dir={tmp_path}", f"--kernels={kernels}", "--steps=6", "--save_every=1"]
    flags += ["--max_skipped_steps=2", f"--ds_config={ROOT / 'ds_configs' / 'zero2.json'}"]
    result = subprocess.run(
        [sys.executable, "-c", NOT_FINITE, script, *flags], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == EXIT_TRAINING_FAILED, result.stdout + result.stderr
    assert "the gradient was not finite in 2 steps in a row (steps 3 to 4" in result.stderr + result.stdout
    assert [row["skipped_steps"] for row in read_metrics(tmp_path)] == [0, 0, 1, 2]
    assert all(isfinite(loss) for loss in train(tmp_path, f"--kernels={kernels}", "--steps=6", "--save_every=1")[3:])
