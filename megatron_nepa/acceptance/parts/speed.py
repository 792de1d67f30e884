"""Part 3: bandwidth of the kernels, attention back-ends, and steps against the planner and against the peer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

from megatron_nepa.acceptance.check import Check, NotRun, can_find, carry
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.roofline import planned
from megatron_nepa.acceptance.setting import Setting, Speed
from megatron_nepa.acceptance.steps import PeerSteps, PlainSteps, Steps, Timing, random_images, time_steps
from megatron_nepa.benchmarks import suite
from megatron_nepa.benchmarks.contenders import contests
from megatron_nepa.benchmarks.kernels import Timing as KernelTiming
from megatron_nepa.benchmarks.kernels import copy_bandwidth, time_operation
from megatron_nepa.benchmarks.results_page import Entry, describe_kernels
from megatron_nepa.config import PretrainingConfig
from megatron_nepa.hardware import data_sheet
from megatron_nepa.kernels.attention.backends import Attention, attention_candidates, attention_sdpa
from megatron_nepa.kernels.launching.timing import milliseconds
from megatron_nepa.models.flops import train_flops

LEAST_COPY_SHARE = 0.75  # of the data sheet's bandwidth
MOST_OF_ONE_TOKEN = 1.5  # times as long with a token more


def checks(setting: Setting) -> list[Check]:
    """The quickest first; what needs DeepSpeed last."""
    found = [Check("bandwidth of a copy", 20, partial(bandwidth, setting), gpu=False)]
    for speed in setting.speeds:
        found.append(Check(f"steps of {speed.title}", 60, partial(steps, setting, speed, False), gpu=False))
    for speed in setting.speeds:
        found.append(Check(f"kernels of {speed.title}", 70, partial(kernels, setting, speed)))
        found.append(Check(f"attention of {speed.title}", 20, partial(attention, setting, speed)))
        found.append(Check(f"compiled steps of {speed.title}", 80, partial(steps, setting, speed, True)))
        found.append(Check(f"{speed.title} against transformers", 90, partial(peer, setting, speed), gpu=False))
    found.append(Check(f"data wait of {setting.speeds[0].title}", 45, partial(data_wait, setting, setting.speeds[0])))
    for entry in setting.engine_entries:
        found.append(Check(f"{entry.title} under the engine", 100, partial(engine, setting, entry)))
    return found


def bandwidth(setting: Setting) -> Iterator[Row]:
    """A large copy against the data sheet."""
    measured, sheet = copy_bandwidth(setting.calls.device), data_sheet(setting.calls.name())
    figure = f"{measured / 1e9:.0f} GB/s, reads and writes"
    if sheet is None:
        yield Row("bandwidth of a copy", "PASS", figure, "the device has no data sheet here")
        return
    share = measured / sheet.memory_bandwidth
    figure += f", {share:.0%} of the data sheet's {sheet.memory_bandwidth / 1e9:.0f}"
    slow = share < LEAST_COPY_SHARE
    remedy = "see who shares the device (nvidia-smi), its clocks and its temperature." if slow else ""
    yield Row("bandwidth of a copy", "FAIL" if slow else "PASS", figure, "slow" if slow else "", remedy)


def kernels(setting: Setting, speed: Speed) -> Iterator[Row]:
    """Every fused operation against its contenders; ours is slow below a share of a copy's bandwidth."""
    device, rows = setting.calls.device, []
    rate = copy_bandwidth(device)
    for contest in contests(speed.recipe.model, speed.micro_batches[-1], device, torch.bfloat16):
        if contest.name == "attention":
            continue
        if setting.calls.compile_backend == "eager":
            contest.contenders.pop("compiled")
        # a stand-in has no compiled Triton: plain torch goes through the same lines
        timings = time_operation(contest, device, rate)
        rows += timings
        ours = next((each for each in timings if each.contender == "triton"), timings[0])
        yield kernel_row(f"kernel {contest.name} of {speed.title}", ours, timings, setting.least_kernel_share)
    report = {"timings": [asdict(row) for row in rows]}
    if entry := setting.kernel_entries[speed.title]:
        yield Row(f"kernels of {speed.title}", "PASS", "timed", "", "", {entry: describe_kernels(report)})


def kernel_row(name: str, ours: KernelTiming, timings: list[KernelTiming], least: float) -> Row:
    """Whether a kernel uses the device's bandwidth."""
    remedy = "set --kernels reference where another is faster, and profile this one."
    if ours.bandwidth_share is None or ours.total_ms is None:
        return Row(name, "FAIL", ours.error, "it does not run", remedy)
    others = [f"{each.contender} {each.total_ms:.3f} ms" for each in timings if each is not ours and each.total_ms]
    figure = f"{ours.total_ms:.3f} ms, {ours.bandwidth_share:.0%} of a copy's bandwidth; {', '.join(others)}"
    if ours.bandwidth_share < least:
        return Row(name, "FAIL", figure, f"slow: below {least:.0%} of the bandwidth", remedy)
    return Row(name, "PASS", figure, "forward and backward; its minimum bytes over the time")


def attention(setting: Setting, speed: Speed) -> Iterator[Row]:
    """Back-ends at a model's own number of tokens and at one more, as with a BOS token."""
    calls, model = setting.calls, speed.recipe.model
    found: dict[str, list[float]] = {}
    counts = (model.num_patches, model.num_patches + 1)
    candidates: list[Attention] = [attention_sdpa]
    if calls.device.type == "cuda":
        candidates = attention_candidates(model.head_size, torch.bfloat16, deterministic=False)
    for tokens in counts:
        shape = (speed.micro_batches[0], tokens, 3, model.num_heads, model.head_size)
        qkv = torch.randn(shape, device=calls.device, dtype=torch.bfloat16, requires_grad=True)
        for candidate in candidates:

            def both(candidate: Callable[..., torch.Tensor] = candidate, qkv: torch.Tensor = qkv) -> None:
                out = candidate(qkv, model.causal)
                torch.autograd.grad(out, qkv, out.detach())

            try:
                found.setdefault(candidate.__name__, []).append(milliseconds(both, calls.device, repeats=10))
            except Exception as error:  # a back-end that does not fit refuses in its own way
                print(f"{candidate.__name__} with {tokens} tokens: {error}")
    yield attention_row(f"attention of {speed.title}", counts, found)


def attention_row(name: str, counts: tuple[int, int], found: dict[str, list[float]]) -> Row:
    """Whether some back-end serves both numbers of tokens about equally fast."""
    served = {back_end: times for back_end, times in found.items() if len(times) == 2}
    remedy = "see the part's log for why the back-ends refuse."
    if not served:
        return Row(name, "FAIL", "no back-end runs", "", remedy)
    first, second = (min(times[i] for times in served.values()) for i in (0, 1))
    parts = (f"{back_end} {times[0]:.3f} and {times[1]:.3f} ms" for back_end, times in served.items())
    figure = f"T = {counts[0]} and {counts[1]}: {', '.join(parts)}"
    if second > MOST_OF_ONE_TOKEN * first:
        remedy = "train without a BOS token, or install flash-attn."
        return Row(name, "FAIL", figure, f"slow: one token more costs {second / first:.2f} times", remedy)
    return Row(name, "PASS", figure, "forward and backward; a run takes the fastest by itself")


def steps(setting: Setting, speed: Speed, compiled: bool) -> Iterator[Row]:
    """Steps without an engine: eager over all micro-batches that fit, compiled at the largest of them."""
    build = partial(PlainSteps, setting.calls, speed.recipe.model, compiled=compiled)
    kind = "compiled" if compiled else "eager"
    timings = sweep(setting, lambda batch: partial(build, micro_batch=batch), speed, largest=compiled)
    best = max(timings, key=lambda timing: timing.images_per_second)
    name = f"{'compiled steps' if compiled else 'steps'} of {speed.title}"
    row = step_row(setting, name, speed.recipe, timings, best)
    results = {speed.entry + ("_compile" if compiled else ""): f"{kind}: {row.figure}"} if speed.entry else {}
    yield Row(row.name, row.status, row.figure, row.meaning, row.remedy, results)


def sweep(
    setting: Setting, build: Callable[[int], Callable[[], Steps]], speed: Speed, largest: bool = False
) -> list[Timing]:
    """A timing each micro-batch from the smallest on, or only that of the largest that fits."""
    calls, found = setting.calls, []
    batches = speed.micro_batches[::-1] if largest else speed.micro_batches
    for batch in batches:
        images = random_images(calls, speed.recipe.model.image_size, batch)
        try:
            found.append(time_steps(calls, build(batch), batch, images, setting.timed_steps))
        except torch.OutOfMemoryError:
            if batch == (batches[-1] if largest else batches[0]):
                raise
            if not largest:
                break
        finally:
            gc.collect()
        if largest and found:
            break
    return found


def step_row(setting: Setting, name: str, run: PretrainingConfig, timings: list[Timing], best: Timing) -> Row:
    """The fastest micro-batch against the planner."""
    plan = planned(setting.calls, run, best.micro_batch)
    # the same peak in both: that of the planner's record
    share = best.images_per_second / plan.images_per_second
    flops = best.images_per_second * train_flops(run.model)
    tried = ", ".join(f"{each.micro_batch}: {each.images_per_second:.4g}" for each in timings)
    figure = (
        f"{best.images_per_second:.4g} images/s at micro-batch {best.micro_batch}, {flops / 1e12:.3g} TFLOP/s, MFU "
        f"{share * plan.mfu:.1%} of {plan.mfu:.1%} planned, peak {best.peak_gb:.2f} GB (images/s by micro-batch: "
        f"{tried}; no images to wait for)"
    )
    if share < setting.least_plan_share:
        remedy = "see the profile of part 5 and the kernels' rows; nvidia-smi for clocks and for other processes."
        return Row(name, "FAIL", figure, f"slow: below {setting.least_plan_share:.0%} of the plan", remedy)
    return Row(name, "PASS", figure, "in one process without an engine, in bf16")


def peer(setting: Setting, speed: Speed) -> Iterator[Row]:
    """The release's model at one micro-batch: this project's steps and transformers', eager and compiled."""
    if not can_find("transformers"):
        raise NotRun("the package transformers is not installed", carry("transformers"))
    calls, model, batch = setting.calls, speed.peer_recipe.model, speed.micro_batches[0]
    kinds = (False, True) if calls.is_gpu else (False,)
    builders: dict[str, Callable[[], Steps]] = {}
    for compiled in kinds:
        word = "compiled" if compiled else "eager"
        builders[f"transformers {word}"] = partial(PeerSteps, calls, model, compiled=compiled)
        builders[f"megatron_nepa {word}"] = partial(PlainSteps, calls, model, batch, compiled=compiled)
    found = {}
    for name, build in builders.items():
        images = random_images(calls, model.image_size, batch)
        found[name] = time_steps(calls, build, batch, images, setting.timed_steps)
        gc.collect()
    yield peer_row(f"{speed.title} against transformers", found, on_cpu=calls.device.type == "cpu")


def peer_row(name: str, found: dict[str, Timing], on_cpu: bool) -> Row:
    """Whether the fastest of ours beats the fastest of theirs; toy sizes on a CPU decide nothing."""
    best = {
        whose: max(each.images_per_second for kind, each in found.items() if kind.startswith(whose))
        for whose in ("megatron_nepa", "transformers")
    }
    ratio = best["megatron_nepa"] / best["transformers"]
    parts = (f"{kind} {each.images_per_second:.4g} images/s, {each.peak_gb:.2f} GB" for kind, each in found.items())
    figure = f"{ratio:.2f}x: {', '.join(parts)}"
    if ratio < 1 and not on_cpu:
        remedy = "see which kernels are slow, and the profile of part 5."
        return Row(name, "FAIL", figure, "slow: transformers' step is faster", remedy)
    return Row(name, "PASS", figure, "the release's model, best of each; on a toy it decides nothing" if on_cpu else "")


def data_wait(setting: Setting, speed: Speed) -> Iterator[Row]:
    """The same steps on images that are decoded for them."""
    from megatron_nepa.acceptance.images import decoded_batches

    batch, size = speed.micro_batches[-1], speed.recipe.model.image_size
    build = partial(PlainSteps, setting.calls, speed.recipe.model, batch)
    with decoded_batches(setting, size, batch) as images:
        timing = time_steps(setting.calls, build, batch, images, setting.timed_steps)
    share = timing.waited / timing.seconds
    figure = f"{timing.images_per_second:.4g} images/s, {timing.waited * 1e3:.1f} ms of {timing.seconds * 1e3:.0f}"
    name, slow = f"data wait of {speed.title}", share > 0.1 and setting.calls.device.type == "cuda"
    remedy = "take the decoder's settings of part 4, and more --data.num_threads." if slow else ""
    yield Row(name, "FAIL" if slow else "PASS", f"{figure} waiting ({share:.0%})", "slow" if slow else "", remedy)


def engine(setting: Setting, entry: Entry) -> Iterator[Row]:
    """A row of the results page, as ``tools/benchmark.py`` measures it."""
    figures = suite.DESCRIBE[entry.arguments[0]](suite.measure(entry))
    results = {entry.name: figures} if setting.calls.device.type == "cuda" else {}
    yield Row(f"{entry.title} under the engine", "PASS", figures, entry.command, "", results)
