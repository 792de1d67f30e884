"""The training benchmark: its peer computes this project's numbers, its report adds up, its tool runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.benchmarks.train import ceiling as train_ceiling
from megatron_nepa.benchmarks.train import comparison as train
from megatron_nepa.benchmarks.train.contender import Contender, Local, StepTime
from megatron_nepa.benchmarks.train.peer import PeerModel
from megatron_nepa.benchmarks.train.report import Contest, Count, TrainReport
from megatron_nepa.benchmarks.train.rounds import WARMUP_STEPS, Probe, compete
from megatron_nepa.benchmarks.train.steps import PARTS, PartClock, TrainingSteps, build_setting
from megatron_nepa.config import ConfigError, ModelConfig, OptimizerConfig
from megatron_nepa.objectives.nepa import NepaForPretraining
from megatron_nepa.recipes import PRETRAINING_RECIPES
from tests.distributed.cases import sample_images, spread_vectors
from tests.distributed.ranks import run_ranks
from tests.runs import TINY

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
RELEASE = ModelConfig(
    image_size=56,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    mlp="gelu",
    mlp_hidden_size=96,
    position_embedding="none",
    bos_token=True,
    layer_scale_init=0.5,
)
# ours to transformers', within a block and outside
BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "attention.out.weight": "attention.o_proj.weight",
    "attention.out.bias": "attention.o_proj.bias",
    "feed_forward.down.weight": "mlp.down_proj.weight",
    "feed_forward.down.bias": "mlp.down_proj.bias",
    "layer_scale1": "layer_scale1.lambda1",
    "layer_scale2": "layer_scale2.lambda1",
}
OUTSIDE = {
    "embedding.weight": "embeddings.patch_embeddings.weight",
    "embedding.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}


def to_peer(ours: dict[str, Tensor], config: ModelConfig, blocks: str) -> dict[str, Tensor]:
    """Our weights under the peer's names, whose ``blocks`` depend on the release of transformers."""
    theirs = {f"vit.{name}": ours[f"trunk.{own}"] for own, name in OUTSIDE.items()}
    theirs["vit.embeddings.cls_token"] = ours["trunk.embedding.bos_token"][None, None]
    normed = config.qk_norm != "none"
    for i in range(config.num_layers):
        own, other = f"trunk.blocks.{i}.", f"{blocks}.{i}."
        theirs |= {other + name: ours[own + mine] for mine, name in BLOCK.items()}
        for kind in ("weight", "bias"):
            qkv = ours[f"{own}attention.qkv.{kind}"].chunk(3)
            for part, value in zip("qkv", qkv, strict=True):
                suffix = ".0" if normed and part != "v" else ""
                theirs[f"{other}attention.{part}_proj{suffix}.{kind}"] = value
            up = ours[f"{own}feed_forward.up.{kind}"]
            if config.mlp == "swiglu":
                gate, up = up.chunk(2)
                theirs[f"{other}mlp.gate_proj.{kind}"] = gate
            theirs[f"{other}mlp.up_proj.{kind}"] = up
        if config.qk_norm == "affine":
            for part in "qk":
                theirs[f"{other}attention.{part}_proj.1.weight"] = ours[f"{own}attention.{part}_norm"]
    return theirs


@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "qk_norm": "affine"}, {"qk_norm": "none"}])
def test_the_peer_trains_the_same_model(changes: dict[str, str]) -> None:
    pytest.importorskip("transformers")
    config = replace(RELEASE, **changes)  # type: ignore[arg-type]
    model = NepaForPretraining(config)
    spread_vectors(model)
    peer = PeerModel(config).train()
    to_names = partial(to_peer, config=config, blocks="vit.model.layer" if hasattr(peer.vit, "model") else "vit.layer")
    missing, unexpected = peer.load_state_dict(to_names(dict(model.named_parameters())), strict=False)
    assert not unexpected
    assert all("mask_token" in name or "register_tokens" in name for name in missing)  # neither takes part
    images = sample_images(range(4), config, torch.float32)
    ours, theirs = model(images, torch.arange(4)).loss, peer(images)
    assert abs(ours.item() - theirs.item()) < 1e-6
    ours.backward()
    theirs.backward()
    named = dict(peer.named_parameters())
    for name, gradient in to_names({n: p.grad for n, p in model.named_parameters()}).items():  # type: ignore[misc]
        got = named[name].grad
        assert got is not None
        # the gradient of the key's bias is null without a norm behind it
        assert (got - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_the_peer_refuses_what_the_release_does_not_have() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="--recipe nepa_b_release"):
        PeerModel(PRETRAINING_RECIPES["nepa_b"]().model)
    with pytest.raises(ConfigError, match="no DropPath"):
        PeerModel(replace(RELEASE, drop_path=0.1))


class FakeSteps:
    """Steps of given durations on a stand-in for time."""

    device = CPU

    def __init__(self, monkeypatch: pytest.MonkeyPatch, durations: list[float]) -> None:
        self.durations, self.now = iter(durations), 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def step(self, clock: PartClock) -> None:
        clock.start()
        duration = next(self.durations)
        for part in PARTS:
            self.now += duration / len(PARTS)
            clock.end(part)


def test_the_median_step_counts_with_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Local(FakeSteps(monkeypatch, [4.0, 100.0, 8.0])).time(3)
    assert found.seconds == 8.0
    assert found.parts == dict.fromkeys(PARTS, 2.0)


class FakeMachine:
    """A machine on a stand-in for time: what its contenders and probes take, each in the order of the calls."""

    def __init__(self, seconds: dict[str, list[float]], probes: list[tuple[float, float]]) -> None:
        self.seconds = {name: iter(found) for name, found in seconds.items()}
        self.probes = iter(probes)
        self.calls: list[object] = []

    def start(self, name: str) -> Contender:
        machine = self

        class Fake:
            def time(self, steps: int) -> StepTime:
                machine.calls.append((name, steps))
                return StepTime(
                    0.0 if steps == WARMUP_STEPS else next(machine.seconds[name]), dict.fromkeys(PARTS, 0.0)
                )

            def peak_memory_gb(self) -> float:
                return 1.0

            def close(self) -> None:
                machine.calls.append(name)

        return Fake()

    def probe(self) -> Probe:
        return Probe(*next(self.probes))

    def compete(self, rounds: int) -> tuple[list[Contest], Count]:
        return compete({name: partial(self.start, name) for name in self.seconds}, 8, rounds, 5, self.probe)


def test_rounds_take_turns_in_fresh_processes() -> None:
    machine = FakeMachine({name: [1.0] * 3 for name in "abc"}, [(1.0, 1.0)] * 12)
    contests, count = machine.compete(rounds=3)
    turns = [[(name, WARMUP_STEPS), (name, 5), name] for name in "abcbcacab"]
    assert machine.calls == [call for turn in turns for call in turn]
    assert [len(contest.times) for contest in contests] == [3, 3, 3]
    assert str(count) == "3 rounds"


def test_rounds_of_an_unsteady_machine_are_dropped_and_counted() -> None:
    steady, slow_copy, slow_product = (1.0, 1.0), (1.2, 1.0), (1.0, 1.2)
    probes = [slow_copy, steady, steady, slow_product, (1.09, 1.09), steady, steady, steady]
    contests, count = FakeMachine({"a": [9.0, 9.0, 2.0, 4.0]}, probes).compete(rounds=2)
    assert contests[0].speeds == [4.0, 2.0]
    assert str(count) == "2 rounds, 2 more dropped as unsteady"
    # the best may come last: then what seemed steady before was not
    contests, count = FakeMachine({"a": [9.0, 2.0, 4.0]}, [(2.0, 1.0)] * 2 + [steady] * 4).compete(rounds=2)
    assert contests[0].speeds == [4.0, 2.0]
    assert (count.steady, count.dropped) == (2, 1)


def test_a_machine_that_is_never_steady_says_so() -> None:
    contests, count = FakeMachine({"a": [1.0, 2.0]}, [(1.0, 2.0), (2.0, 1.0)] * 2).compete(rounds=1)
    assert len(contests[0].times) == 2  # twice what was asked for, and no more
    assert str(count) == "2 rounds, none of them steady"


def report(ceiling_ms: dict[str, float]) -> TrainReport:
    parts = dict.fromkeys(PARTS, 0.1)
    first = Contest("ours", 8, [StepTime(seconds, parts) for seconds in (1.0, 2.0, 4.0)], 1.0)
    second = Contest("theirs", 8, [StepTime(seconds, parts) for seconds in (2.0, 3.0, 8.0)], 2.0)
    machine = Machine("a machine", 1, "2", "1", "2026-01-01")
    return TrainReport("c", machine, "nepa_b", "bf16", 2, 1e12, 4e12, [first, second], Count(3), ceiling_ms, 0.0)


def test_the_report_adds_up() -> None:
    found = report({"linear": 1500.0, "update": 500.0})
    ours, theirs = found.contests
    assert ours.images_per_second == 4.0
    assert found.flops(ours) == 2e12  # of one of two devices
    assert found.ratio(theirs) == 2.0  # the median of 2, 1.5 and 2, not the ratio of medians
    assert found.ceiling_images_per_second == 4.0
    as_json = json.loads(json.dumps(found.to_dict()))
    assert as_json["share_of_ceiling"] == 1.0
    assert as_json["contests"][1]["first_over_this"] == 2.0
    assert as_json["contests"][0]["share_of_matmul"] == 0.5
    assert any("reaches 1.00" in line for line in found.lines())
    assert report({}).to_dict()["share_of_ceiling"] is None


def test_the_ceiling_names_every_part_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_ceiling, "CPU_REPEATS", 1)
    parts = train_ceiling.measure_ceiling(RELEASE, OptimizerConfig(), 2, CPU, torch.float32, compiled=False)
    linears = {"qkv linear", "attention out linear", "up linear", "down linear", "patch embedding"}
    assert parts.keys() == linears | {"qk_norm_rope", "residual_norm", "cosine_loss", "attention", "gelu", "update"}
    assert all(duration > 0 for duration in parts.values())


def timed_steps(arguments: list[str]) -> tuple[int, str | None, StepTime, float]:
    setting = build_setting(arguments)
    steps = TrainingSteps(setting)
    local = Local(steps)
    found = local.time(1)
    return setting.run.global_batch_size, setting.run.data.path, found, local.communication_seconds()


def test_the_steps_are_those_of_the_flags_on_any_grid() -> None:
    flags = [flag for flag in TINY if "batch_size" not in flag] + ["--micro_batch_size=4"]
    batch, data, found, communication = run_ranks(1, timed_steps, flags)[0]
    assert (batch, data) == (4, "synthetic")
    assert min(found.parts["forward"], found.parts["backward"], found.parts["optimizer"]) > 0
    batch, _, _, communication = run_ranks(4, timed_steps, [*flags, "--tensor_parallel_size=2"])[0]
    assert batch == 8
    assert communication > 0


@pytest.mark.slow
def test_the_tool_compares_in_turns(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "train", "--baseline", "--rounds", "1"]
    command += ["--timed_steps", "1", "--micro_batch_size", "2", "--model.num_layers", "1", "--no_ceiling"]
    command += ["--json", tmp_path / "report.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert [contest["name"].strip() for contest in found["contests"]] == [
        name.strip() for name in (train.SHIPPED, train.REFERENCE, train.PEER)
    ]
    assert all(contest["images_per_second"] > 0 and contest["peak_memory_gb"] > 0 for contest in found["contests"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--recipe", "nepa_x"], "there is no recipe 'nepa_x'"),
        (["train", "--json", "no/folder/report.json"], "--json 'no/folder/report.json' cannot be written"),
        (["data", "--data", ""], "--data '' is not a folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str) -> None:
    command = [sys.executable, ROOT / "tools" / "benchmark.py", *arguments]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
