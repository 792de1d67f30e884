"""The planner's sizes and times against the model, the kernels' byte counts and hand arithmetic."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import get_args

import pytest
import torch

from megatron_nepa.config import ActivationCheckpointing, AimObjective, ConfigError, ModelConfig, ParallelConfig
from megatron_nepa.kernels.proofs.cases import model_cases
from megatron_nepa.models.build import Build
from megatron_nepa.models.flops import forward_flops
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.objectives.build import build_objective
from megatron_nepa.objectives.flops import pretraining_flops
from megatron_nepa.parallel.topology import TensorGroup
from megatron_nepa.planning.cluster import GPUS, ring_of
from megatron_nepa.planning.command import start_command
from megatron_nepa.planning.communication import Collective, data_ring, plan_collectives, tensor_ring
from megatron_nepa.planning.compute import block_work, outer_work
from megatron_nepa.planning.layout import Layout, count_parameters
from megatron_nepa.planning.plan import find_plans, predict, step_time
from megatron_nepa.planning.requirements import IMAGES_PER_CORE, requirements
from megatron_nepa.planning.stacks import count_all, count_trained, stacks_of
from megatron_nepa.planning.validation import IMAGENET_IMAGES, validate
from megatron_nepa.recipes import PRETRAINING_RECIPES

H100 = GPUS["h100"]


@pytest.mark.parametrize("name", sorted(PRETRAINING_RECIPES))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parameters_are_those_of_the_model(name: str, size: int) -> None:
    model = replace(PRETRAINING_RECIPES[name]().model, num_layers=2)
    if model.num_heads % size or model.mlp_hidden_size % size:
        pytest.skip("not a divisor")
    with torch.device("meta"):
        trunk = Trunk(model, Build(ParallelConfig(size), TensorGroup(0, size)))
    counted = count_parameters(model, size)
    assert counted.local == sum(param.numel() for param in trunk.parameters())
    shared = [param for param in trunk.parameters() if not param.tensor_model_parallel]  # type: ignore[attr-defined]
    assert counted.replicated == sum(param.numel() for param in shared)


def test_release_has_its_published_parameters() -> None:
    assert count_parameters(PRETRAINING_RECIPES["nepa_b_release"]().model).local == 85_527_552
    assert count_parameters(PRETRAINING_RECIPES["nepa_l_release"]().model).local == 302_967_808


@pytest.mark.parametrize("name", ["nepa_b", "nepa_l_release", "nepa_7b"])
@pytest.mark.parametrize("size", [1, 8])
def test_tensor_parallel_ranks_share_the_flops_of_the_forward_pass(name: str, size: int) -> None:
    model = PRETRAINING_RECIPES[name]().model
    if model.num_heads % size:
        model = replace(model, num_heads=16)
    layout = Layout(size, size, size > 1, micro_batch_size=8)
    inside = sum(work.flops for work in block_work(model, layout, H100) if work.phase == "forward")
    outside = sum(work.flops for work in outer_work(model, layout, H100) if work.phase == "forward")
    total = size * (model.num_layers * inside + outside)
    assert total == pytest.approx(8 * forward_flops(model), rel=1e-12)


PIXELS = {"mae": PRETRAINING_RECIPES["mae_b"](), "aim": PRETRAINING_RECIPES["aim_b"]()}
PIXELS["aim without a prefix"] = replace(PIXELS["aim"], objective=AimObjective(prefix=False, head_layers=3))


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("size", [1, 4])
def test_parameters_of_an_objective_are_those_of_its_model(name: str, size: int) -> None:
    run = PIXELS[name]
    with torch.device("meta"):
        model = build_objective(run.model, run.objective, Build(ParallelConfig(size), TensorGroup(0, size)))
    assert count_all(run.model, size, run.objective).local == sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert count_trained(run.model, size, run.objective) == trained


@pytest.mark.parametrize("name", PIXELS)
def test_kernels_have_the_flops_of_the_objective(name: str) -> None:
    run, layout = PIXELS[name], Layout(1, micro_batch_size=8)
    stacks = stacks_of(run.model, layout, run.objective)
    work = [(stack.model.num_layers, block_work(stack.model, stack.layout, H100)) for stack in stacks]
    work.append((1, outer_work(run.model, layout, H100, run.objective)))
    planned = sum(times * each.flops for times, some in work for each in some if each.phase == "forward")
    counted = 8 * pretraining_flops(run) / 3
    if name == "aim":  # under a mask, attention computes the pairs that it leaves out, too
        assert counted < planned < 1.05 * counted
    else:
        assert planned == pytest.approx(counted, rel=1e-12)


def test_fused_operations_move_what_their_kernels_must() -> None:
    model, batch = PRETRAINING_RECIPES["nepa_b"]().model, 4
    names = {"qk_norm_rope": "QK-norm and RoPE", "swiglu": "SwiGLU", "residual_norm": "residual and norm"}
    names["cosine_loss"] = "loss"
    layout = Layout(1, micro_batch_size=batch)
    planned = defaultdict(float)
    for work in block_work(model, layout, H100) + outer_work(model, layout, H100):
        planned[work.name, work.phase] += work.bytes
    found = set()
    for case in model_cases(model, batch, model.sequence_length, "meta"):
        if case.operation in names:
            times = 2 if case.operation == "residual_norm" else 1
            assert planned[names[case.operation], case.direction] == times * case.minimum_bytes
            found.add(case.operation)
    assert found == set(names)


def test_time_of_a_collective() -> None:
    node = ring_of(H100, size=8, ranks_per_node=8)
    gather = Collective("rows", "all_gather", "tensor", "forward", calls=10, bytes=37e9)
    assert gather.seconds(node) == pytest.approx(10 * (8.4e-6 + 7 * 3.4e-6) + 7 / 8 * 37e9 / 370e9)
    reduce = replace(gather, kind="all_reduce")
    assert reduce.seconds(node) == pytest.approx(10 * (8.4e-6 + 14 * 3.4e-6) + 14 / 8 * 37e9 / 370e9)
    # 2 nodes, one rank of the group in each: an adapter of 47 GB/s, two hops
    across = ring_of(H100, size=2, ranks_per_node=1)
    assert gather.seconds(across) == pytest.approx(10 * (8.4e-6 + 2 * 14e-6) + 37e9 / 2 / 47e9)
    # all eight adapters carry more than NVLink: NVLink bounds it
    assert ring_of(H100, size=64, ranks_per_node=8).bandwidth == pytest.approx(370e9)
    assert gather.seconds(ring_of(H100, 1, 8)) == 0


def test_groups_lie_where_the_topology_puts_them() -> None:
    layout = Layout(gpus=64, tensor_parallel_size=8)
    assert tensor_ring(H100, layout).bandwidth == pytest.approx(370e9)  # inside a node
    assert data_ring(H100, layout).bandwidth == pytest.approx(47e9)  # a rank in each of 8 nodes
    assert data_ring(H100, Layout(gpus=8)).bandwidth == pytest.approx(370e9)


def test_no_collectives_on_one_gpu() -> None:
    assert plan_collectives(PRETRAINING_RECIPES["nepa_b"]().model, Layout(1)) == []


def test_an_h200_is_an_h100_with_another_memory() -> None:
    h200 = GPUS["h200"]
    other = {"name": "H200 SXM 141 GB", "memory_bytes": 141e9, "memory_bandwidth": 4.8e12}
    assert h200 == replace(H100, **other)  # type: ignore[arg-type]
    run, layout = PRETRAINING_RECIPES["nepa_7b"](), Layout(64, 8, True, micro_batch_size=512)
    smaller, larger = predict(run, layout, H100), predict(run, layout, h200)
    assert smaller.memory == larger.memory
    assert (smaller.fits, larger.fits) == (False, True)
    assert larger.images_per_second > smaller.images_per_second


def test_best_plans_come_first_and_fit() -> None:
    plans = find_plans(PRETRAINING_RECIPES["nepa_7b"](), 8, H100)
    fitting = [plan for plan in plans if plan.fits]
    assert 0 < len(fitting) < len(plans)
    assert plans[: len(fitting)] == fitting
    rates = [plan.images_per_second for plan in fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(plan.memory.total <= 80e9 for plan in fitting)
    assert all(plan.memory.total > 80e9 for plan in plans[len(fitting) :])
    assert {plan.layout.tensor_parallel_size for plan in plans} == {1, 2, 4, 8}
    assert {plan.layout.zero_stage for plan in plans} == {1, 2}
    assert {plan.layout.activation_checkpointing for plan in plans} == set(get_args(ActivationCheckpointing))


def test_recomputation_trades_time_for_memory() -> None:
    run = PRETRAINING_RECIPES["nepa_l"]()
    none, selective, full = (
        predict(run, Layout(8, micro_batch_size=128, activation_checkpointing=level), H100)
        for level in get_args(ActivationCheckpointing)
    )
    assert selective.memory.activations < 0.8 * none.memory.activations
    assert full.memory.activations < 0.25 * none.memory.activations
    assert none.images_per_second > selective.images_per_second > full.images_per_second
    assert none.mfu > selective.mfu > full.mfu
    # the seam between the branches, 6 U, and SwiGLU, 3 V
    model, rows = run.model, 4096 // 8 * run.model.sequence_length
    moved = 2 * rows * model.num_layers * (6 * model.hidden_size + 3 * model.mlp_hidden_size)
    assert selective.time.recompute == pytest.approx(moved / H100.memory_bandwidth)


def test_chunks_hide_behind_products_but_for_one() -> None:
    run = PRETRAINING_RECIPES["nepa_7b"]()
    layout = Layout(8, 8, True, micro_batch_size=64)
    plan = predict(run, layout, H100)
    gathers = next(each for each in plan.collectives if each[0].what == "rows before qkv and up")
    rows = 64 * 256 * 4096 * 2  # bytes: two chunks of the 64 MB that one has at least
    assert layout.num_chunks(run.model) == 2
    assert (gathers[0].calls, gathers[0].bytes) == (2 * 80, 80 * rows)
    assert (gathers[0].chunks, gathers[0].behind) == (2, "column_products")

    def waits(forward: list[float]) -> float:
        """Of collectives alone, these calls' in the place of the plan's."""
        chosen = [(each, 0.0) for each, _ in plan.collectives if each.behind not in ("column_products", "row_products")]
        chosen += [(gathers[0], seconds) for seconds in forward]
        return step_time(run.model, layout, H100, 1, chosen).tensor_collectives

    products = 40 * sum(
        work.seconds
        for work in block_work(run.model, layout, H100)
        if work.name in ("qkv", "up") and work.phase == "forward"
    )
    assert waits([products / 2]) == pytest.approx(products / 4)  # one chunk of two
    assert waits([products]) == pytest.approx(products / 2)
    assert waits([3 * products]) == pytest.approx(3 / 2 * products + products)
    assert Layout(1, micro_batch_size=64).num_chunks(run.model) == 1


def test_a_compiled_run_stays_compiled_under_tensor_parallelism() -> None:
    run = replace(PRETRAINING_RECIPES["nepa_7b"](), compile=True)
    assert Layout(8, 8, True).apply(run).compile
    assert "--compile true" in start_command(run, Layout(8, 8, True))


def test_requirements_follow_from_the_step() -> None:
    run = PRETRAINING_RECIPES["nepa_b"]()
    plan = predict(run, Layout(16, micro_batch_size=256), H100)
    need = requirements(run, plan, IMAGENET_IMAGES)
    assert need.images == pytest.approx(1600 * IMAGENET_IMAGES, rel=1e-5)
    assert need.days * 86400 * plan.images_per_second == pytest.approx(need.images)
    assert need.gpu_hours == pytest.approx(need.days * 24 * 16)
    assert need.images_per_node == pytest.approx(plan.images_per_second / 2)
    assert need.cores_per_node == pytest.approx(need.images_per_node / IMAGES_PER_CORE)
    assert need.checkpoint_bytes == 16 * count_parameters(run.model).local


def test_published_utilisation_is_reproduced_from_the_published_rates() -> None:
    # of the four NeMo runs and of the ViT-L on an H200: the anchors' own arithmetic
    published = [28.9, 27.3, 44.5, 42.7, 35.9]
    anchors = validate()
    assert [round(100 * anchor.plan.mfu / anchor.ratio, 1) for anchor in anchors[:5]] == published
    assert all(anchor.ratio > 1 for anchor in anchors)  # the planner's time is a lower bound


@pytest.mark.parametrize(("gpus", "words"), [(0, "at least 1"), (7, "take 4 or 8 GPUs"), (1 << 20, "take 16384 GPUs")])
def test_an_impossible_number_of_gpus_is_named(gpus: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_plans(PRETRAINING_RECIPES["nepa_b"](), gpus, H100)


def test_a_layout_that_the_model_refuses_is_named() -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        predict(PRETRAINING_RECIPES["nepa_b"](), Layout(8, 8), H100)
    assert ModelConfig().num_heads == 12
