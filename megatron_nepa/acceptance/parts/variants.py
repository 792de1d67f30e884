"""Part 5: what a run can choose: optimizers, FlashAttention, checkpointing, offload; a non-finite step; a profile."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import profile

from megatron_nepa.acceptance.check import Check, NotRun, can_find, carry, from_doctor, not_installed
from megatron_nepa.acceptance.parts.training import compare
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.scripts import losses, train
from megatron_nepa.acceptance.setting import TOY_FLAGS, Setting
from megatron_nepa.acceptance.steps import PlainSteps, Timing, random_images, time_steps
from megatron_nepa.config import ActivationCheckpointing

STEPS = 6
VARIANTS = {
    "selective checkpointing": ("zero2", "--activation_checkpointing=selective"),
    "full checkpointing": ("zero2", "--activation_checkpointing=full"),
    "compiled blocks": ("zero2", "--compile"),
    "offload": ("zero2_offload", "--kernels=reference"),
}
FLASH_ATTENTIONS = {"2": "flash_attn", "3": "flash_attn_3", "4": "flash_attn_4"}  # names of the back-ends
FUSED_ADAMS = {"DeepSpeed's FusedAdam": "deepspeed.ops.adam", "Apex's FusedAdam": "apex.optimizers"}
POISONED = 3  # the step whose images are not finite
POISON = f"""
import dataclasses
import torch
from megatron_nepa.tasks.pretraining import PretrainingTask
real, calls = PretrainingTask.forward, [0]
def poisoned(self, engine, batch):
    calls[0] += 1
    if (calls[0] - 1) // engine.accumulation_steps == {POISONED - 1}:
        batch = dataclasses.replace(batch, images=torch.full_like(batch.images, torch.nan))
    return real(self, engine, batch)
PretrainingTask.forward = poisoned
"""


def checks(setting: Setting) -> list[Check]:
    """What needs no engine first; for offload DeepSpeed compiles its CPU Adam."""
    flash = [("flash_attn", "2"), ("flash_attn_interface", "3"), ("flash_attn.cute", "4")]
    return [
        Check("torch's fused AdamW", 30, partial(torch_adamw, setting), gpu=False),
        *(Check(name, 90, partial(fused_adam, setting, name, module)) for name, module in FUSED_ADAMS.items()),
        *(
            Check(f"FlashAttention-{version}", 30, partial(flash_attention, setting, module, version))
            for module, version in flash
        ),
        Check("checkpointing without an engine", 60, partial(checkpointing, setting), gpu=False),
        Check("profile of a step", 45, partial(profiled, setting), gpu=False),
        Check("a run of plain torch", 60, partial(plain_run, setting), gpu=False),
        *(
            Check(
                f"a run with {name}",
                100 if name == "offload" else 60,
                partial(variant, setting, name),
                gpu=name != "selective checkpointing",
            )
            for name in VARIANTS
        ),
        Check("a non-finite step", 60, partial(non_finite, setting), gpu=False),
    ]


def torch_adamw(setting: Setting) -> Iterator[Row]:
    """AdamW of torch against fp64 on the same ten gradients."""
    yield optimizer_row("torch's fused AdamW", setting.calls.device, torch.optim.AdamW, {"fused": True})


def fused_adam(setting: Setting, name: str, module: str) -> Iterator[Row]:
    """DeepSpeed's or Apex's likewise; one that cannot be built is not used."""
    meaning = "torch's fused AdamW takes its place"
    if not can_find(module):
        package = module.partition(".")[0]
        yield Row(name, "NOT RUN", f"the package {package} is not installed", meaning, carry(package))
        return
    if setting.calls.device.type == "cpu":
        raise NotRun("needs a GPU", "run the same command on a machine with a GPU.")
    kind = importlib.import_module(module).FusedAdam
    try:
        kind([torch.zeros(1, device=setting.calls.device, requires_grad=True)])
    except Exception as error:  # of compilers, of torch's and of DeepSpeed's own kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        yield Row(name, "NOT RUN", f"cannot be built: {reason}", meaning, "install nvcc of torch's CUDA version.")
        return
    yield optimizer_row(name, setting.calls.device, kind, {"adam_w_mode": True})


def optimizer_row(name: str, device: torch.device, kind: Any, options: dict[str, Any]) -> Row:
    """Ten steps of one optimizer."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4096, generator=generator)
    exact, found = start.double().requires_grad_(), start.to(device).requires_grad_()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    reference, optimizer = torch.optim.AdamW([exact], **settings), kind([found], **settings, **options)
    for _ in range(10):
        gradient = torch.randn(4096, generator=generator)
        exact.grad, found.grad = gradient.double(), gradient.to(device)
        reference.step()
        optimizer.step()
    error = float((found.detach().cpu().double() - exact.detach()).abs().max())
    figure = f"error {error:.1e} after ten steps, weights of about 1"
    if error < 1e-5:
        return Row(name, "PASS", figure, "it updates as AdamW is defined")
    return Row(name, "FAIL", figure, "it computes another update", "uninstall it, or rebuild it for this torch.")


def flash_attention(setting: Setting, module: str, version: str) -> Iterator[Row]:
    """The back-end of one package, where it is installed, forward and backward against fp64."""
    from megatron_nepa.acceptance.parts.kernels import attention_contest
    from megatron_nepa.doctor.operations import ATTENTION_REMEDY, judge
    from megatron_nepa.kernels.attention.backends import attention_candidates

    name = f"FlashAttention-{version}"
    if not can_find(module):
        row = not_installed(module, "torch's SDPA serves without it")
        yield Row(name, row.status, row.figure, row.meaning, row.remedy)
        return
    contest = attention_contest(setting)
    candidates = attention_candidates(contest.inputs["qkv"].shape[-1], torch.bfloat16, deterministic=False)
    found = next((each for each in candidates if each.__name__ == FLASH_ATTENTIONS[version]), None)
    if found is None:  # the folder of version 4 is in version 2's wheel without what it needs
        reason = "its package is there, but cannot be imported or has another interface"
        yield Row(name, "NOT RUN", reason, "torch's SDPA serves without it", carry(module))
        return
    yield from_doctor(judge(name, contest, found, found.__name__, ATTENTION_REMEDY))


def checkpointing(setting: Setting) -> Iterator[Row]:
    """Losses and memory of steps that compute parts of a block again."""
    speed = setting.speeds[0]
    batch, timings = speed.micro_batches[0], {}
    levels: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
    for level in levels:
        build = partial(PlainSteps, setting.calls, speed.recipe.model, batch, checkpointing=level)
        images = random_images(setting.calls, speed.recipe.model.image_size, batch)
        timings[level] = time_steps(setting.calls, build, batch, images, setting.timed_steps)
    for level in levels[1:]:
        yield checkpointing_row(level, timings["none"], timings[level])


def checkpointing_row(level: str, plain: Timing, found: Timing) -> Row:
    """One level against none."""
    name = f"{level} checkpointing without an engine"
    row = compare(name, plain.losses, found.losses, "the steps without it", "train without it.")
    figure = f"{row.figure}; {found.images_per_second:.4g} images/s and {found.peak_gb:.2f} GB"
    figure += f", without it {plain.images_per_second:.4g} and {plain.peak_gb:.2f}"
    return Row(name, row.status, figure, row.meaning, row.remedy)


def profiled(setting: Setting) -> Iterator[Row]:
    """Where a step's time goes, by operation."""
    calls, speed = setting.calls, setting.speeds[0]
    batch = speed.micro_batches[0]
    steps = PlainSteps(calls, speed.recipe.model, batch)
    images = random_images(calls, speed.recipe.model.image_size, batch)
    for _ in range(3):
        steps.step(next(images))
    calls.synchronize()
    with profile(activities=list(calls.activities)) as found:
        steps.step(next(images))
        calls.synchronize()
    times = {event.key: calls.device_microseconds(event) for event in found.key_averages()}
    total = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])[:8]
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    figure = ", ".join(f"{name[:60]} {time / total:.0%}" for name, time in largest)
    meaning = f"{total / 1e3:.1f} ms of work in a step of {speed.title}; the whole table is in the part's log"
    yield Row("profile of a step", "PASS" if total else "FAIL", figure or "nothing was recorded", meaning)


def plain_run(setting: Setting) -> Iterator[Row]:
    """The curve that the variants are compared with."""
    curve = reference(setting, again=True)
    yield Row("a run of plain torch", "PASS", f"loss {curve[0]:.4f} to {curve[-1]:.4f} in {len(curve)} steps")


def variant(setting: Setting, name: str) -> Iterator[Row]:
    """The same run with one choice changed."""
    ds_config, flag = VARIANTS[name]
    output = setting.work / "variant"
    shutil.rmtree(output, ignore_errors=True)
    curve = train(output, [*_flags(setting), flag], ds_config=ds_config)
    yield compare(f"a run with {name}", reference(setting), curve, "plain torch's", "train without it.")


def non_finite(setting: Setting) -> Iterator[Row]:
    """One step whose images are not finite: it is skipped, and the weights stay finite."""
    output = setting.work / "poisoned"
    shutil.rmtree(output, ignore_errors=True)
    yield non_finite_row(train(output, _flags(setting), before=POISON))


def non_finite_row(curve: list[float]) -> Row:
    """Of the losses, of which one is not finite."""
    bad = [step for step, loss in enumerate(curve, 1) if loss != loss]
    figure = f"losses that are not finite in steps {bad or 'none'} of {len(curve)}"
    if bad == [POISONED] and len(curve) == STEPS:
        return Row("a non-finite step", "PASS", figure, "it was skipped and the run went on")
    remedy = "look into rank0.log in the folder work/poisoned."
    return Row("a non-finite step", "FAIL", figure, "one bad step reached the weights or ended the run", remedy)


def reference(setting: Setting, again: bool = False) -> list[float]:
    """Losses of the variants' run in plain torch, trained where they are not there yet."""
    output = setting.work / "variants_reference"
    found = [] if again else losses(output)
    if len(found) != STEPS:
        shutil.rmtree(output, ignore_errors=True)
        found = train(output, [*_flags(setting), "--kernels=reference"])
    return found


def _flags(setting: Setting) -> list[str]:
    dtype = "bf16" if setting.calls.device.type == "cuda" else "fp32"
    return [*TOY_FLAGS, f"--dtype={dtype}", f"--steps={STEPS}"]
