"""What a command imports: nothing heavy before its flags are known to be good, and afterwards only what it uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "pretrain_nepa.py",
    *(str(path.relative_to(ROOT)) for folder in ("examples", "tools") for path in sorted((ROOT / folder).glob("*.py"))),
    "examples/fashion_mnist/run.py",
]
HEAVY = ("torch", "nvidia.dali", "deepspeed", "wandb", "timm", "torchvision", "transformers", "matplotlib", "triton")
TINY = (
    *("--dtype=fp32", "--global_batch_size=2", "--micro_batch_size=2"),
    *("--model.num_layers=1", "--model.image_size=28"),
)
# runs a script with the absent packages refused as an installation without them does, and says what was imported
PROBE = """
import os, runpy, sys

sys.modules.update(dict.fromkeys({absent!r}))  # None: as not installed

def tell(status):
    print("imported", *(name for name in {heavy!r} if sys.modules.get(name)), flush=True)
    leave(status)

leave, os._exit = os._exit, tell
sys.argv = {command!r}
status = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code or 0
os._exit(status)
"""


def start(*command: str, absent: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
    """Exit status, the heavy modules that a fresh process imported, and what it said on standard error."""
    code = PROBE.format(absent=absent, heavy=HEAVY, command=list(command))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "imported", done.stderr
    return done.returncode, last[1:], done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_waits_for_nothing(script: str) -> None:
    assert start(script, "--help") == (0, [], "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["pretrain_nepa.py", "--stepz=3"], "there is no flag --stepz"),
        (["pretrain_nepa.py", "--steps=0"], "steps is 0"),
        (["pretrain_nepa.py", "--ds_config=none.json"], "none.json is not a file"),
        (["examples/finetune_classification.py", "--recipe=imagenet_ft_x"], "there is no recipe"),
        (["tools/index_dataset.py", "there", "--out=here", "--resize=4"], "--resize scales"),
        (["tools/plan_run.py", "--recipe=nepa_x"], "--recipe nepa_x is unknown"),
        (["tools/doctor.py", "--only=installations"], "--only takes groups"),
        (["tools/kernel_report.py", "--arch=hopper"], "--arch hopper is not"),
    ],
)
def test_a_mistake_in_the_flags_waits_for_nothing(command: list[str], said: str) -> None:
    status, imported, error = start(*command)
    assert (status, imported) == (2, [])
    assert said in error


def test_a_plan_is_made_without_torch() -> None:
    assert start("tools/plan_run.py", "--recipe=nepa_b", "--gpus=8", absent=("torch",)) == (0, [], "")


def test_synthetic_images_need_no_decoder_and_a_run_only_what_it_uses(tmp_path: Path) -> None:
    flags = ["--data=synthetic", "--steps=1", f"--output_dir={tmp_path}/run", "--stall_timeout=0", *TINY]
    absent = ("nvidia.dali", "wandb", "timm", "torchvision", "transformers", "skimage", "sklearn")
    status, imported, error = start("pretrain_nepa.py", *flags, absent=absent)
    assert status == 0, error
    assert not set(imported) & set(absent)


@pytest.mark.parametrize(
    ("command", "absent", "said"),
    [
        (["pretrain_nepa.py", "--steps=1", "--output_dir={folder}/run"], "nvidia.dali", "megatron_nepa[cuda13]"),
        (["tools/visualize_attention.py", "a", "--checkpoint=b", "--out={folder}/o"], "matplotlib", "make install"),
    ],
)
def test_a_package_that_is_not_installed_is_one_sentence(
    command: list[str], absent: str, said: str, tmp_path: Path
) -> None:
    status, _, error = start(*(word.format(folder=tmp_path) for word in command), absent=(absent,))
    assert status == 2
    assert f"{absent} is not installed" in error.splitlines()[-1]
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_the_first_step_has_imported_what_it_uses_and_no_compiler(tmp_path: Path) -> None:
    code = """
import gc, os, sys
from megatron_nepa.benchmarks.start import reach_first_step

def arrived():
    unused = "torch._inductor.compile_fx", "networkx", "torch.distributed.checkpoint", "matplotlib", "timm", "wandb"
    print("imported", *(name for name in unused if name in sys.modules))
    print("garbage", gc.isenabled(), gc.get_freeze_count() > 100_000)
    print("compiler", os.environ.get("TORCHDYNAMO_DISABLE"), flush=True)
    os._exit(0)

reach_first_step(sys.argv[1:], arrived)
"""
    flags = ["--data=synthetic", "--steps=1", f"--output_dir={tmp_path}/run", "--stall_timeout=0", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-3:] == ["imported", "garbage True True", "compiler None"], done.stderr
