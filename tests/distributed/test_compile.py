"""``--compile`` with tensor parallelism: one graph for all blocks, collectives included, and an eager run's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.fx import GraphModule

from megatron_nepa.models import transformer
from megatron_nepa.parallel.parameters import sum_split_gradients
from megatron_nepa.parallel.topology import TensorGroup, Topology
from megatron_nepa.training.engine.compiled_blocks import compile_blocks
from tests.distributed.cases import Case, Mutation, Outcome, differences, train_case
from tests.distributed.jepa_cases import CASE as JEPA
from tests.distributed.ranks import run_ranks
from tests.distributed.test_objectives import CASES

# three steps of two micro-batches, whose rows travel in four chunks
PLAIN = Case().on(tensor_size=2, chunk_bytes=4096)
ROWS = Case().on(tensor_size=2, sequence_parallel=True, chunk_bytes=4096)
SELECTIVE = ROWS.on(tensor_size=2, sequence_parallel=True, activation_checkpointing="selective", chunk_bytes=4096)
NAMESPACES = ("_c10d_functional", "megatron_nepa")
PRODUCTS = ("mm", "addmm")


@dataclass
class Compiled:
    """What a compiled run gave, and what it was compiled to.

    Attributes:
        outcome: its numbers.
        graphs: how many graphs Dynamo took from Python.
        breaks: where one ended before its block.
        operations: products and what waits for other ranks, in the forward and in the backward graph.
    """

    outcome: Outcome
    graphs: int
    breaks: dict[str, int]
    operations: dict[str, dict[str, int]] = field(default_factory=dict)


def compiled(case: Case, mutation: Mutation | None, backend: str | None) -> Compiled:
    """Run a case with compiled blocks, by a named back-end or one that runs its graphs as they are and counts them."""
    torch._dynamo.reset()
    counters.clear()
    found: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def count(part: str, graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        operators = [node.target for node in graph.graph.nodes if isinstance(node.target, OpOverload)]
        found[part].update(
            each.overloadpacket.__name__
            for each in operators
            if each.namespace in NAMESPACES or each.overloadpacket.__name__ in PRODUCTS
        )
        return make_boxed_func(graph.forward)

    counting = aot_autograd(
        fw_compiler=partial(count, "forward"),
        bw_compiler=partial(count, "backward"),
        partition_fn=min_cut_rematerialization_partition,
    )

    def mutate_and_compile(model: nn.Module, topology: Topology) -> None:
        if mutation is not None:
            mutation(model, topology)
        compile_blocks(model, backend or counting)

    outcome = train_case(case, mutate_and_compile)
    operations = {part: dict(counts) for part, counts in found.items()}
    return Compiled(outcome, counters["stats"]["unique_graphs"], dict(counters["graph_break"]), operations)


def compare(case: Case, mutation: Mutation | None = None, backend: str | None = None) -> tuple[Outcome, Compiled]:
    return train_case(case), compiled(case, mutation, backend)


def problems(eager: Outcome, run: Compiled, graphs: int = 1) -> list[str]:
    """Where a compiled run has not these graphs for all its blocks, steps and micro-batches, or not eager numbers."""
    found = [f"{run.graphs} graphs"] * (run.graphs != graphs) + [f"graph break: {reason}" for reason in run.breaks]
    if run.outcome.losses != eager.losses or run.outcome.grad_norms != eager.grad_norms:
        found.append(f"losses {run.outcome.losses} and {eager.losses}")
    for ours, theirs in ((run.outcome.gradients, eager.gradients), (run.outcome.state, eager.state)):
        assert ours.keys() == theirs.keys()
        found += [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    return found


def test_tensor_parallel_blocks_are_one_graph_and_equal_eager_ones_bit_by_bit() -> None:
    for eager, run in run_ranks(2, compare, PLAIN):
        assert problems(eager, run) == []
        # of one block, compiled once for both; the operation of qkv and up sums the gradient of their rows itself
        assert run.operations["forward"] == {"addmm": 2, "summed_product": 2}
        backward = {"replicated_product_backward": 2, "mm": 4, "all_reduce": 1, "wait_tensor": 1}
        assert run.operations["backward"] == backward


@pytest.mark.parametrize("case", [ROWS, SELECTIVE], ids=["kept", "selective"])
def test_sequence_parallel_blocks_are_one_graph_and_equal_eager_ones_bit_by_bit(case: Case) -> None:
    for eager, run in run_ranks(2, compare, case):
        assert problems(eager, run) == []
        assert run.operations["forward"] == {"gathered_product": 2, "scattered_product": 2}
        # the gradients of qkv's and up's products with their collectives, of out and down, and of vectors; nothing else
        # is computed again
        backward = {"gathered_product_backward": 2, "mm": 4, "all_gather_into_tensor": 2, "all_reduce": 1}
        assert run.operations["backward"] == backward | {"wait_tensor": 3}


@pytest.mark.parametrize(
    ("case", "graphs"),
    [(CASES["mae"], 2), (JEPA, 3)],  # trunk and decoder; trunk, predictor and targets
    ids=["mae", "jepa"],
)
def test_an_objectives_own_blocks_are_compiled_too(case: Case, graphs: int) -> None:
    for eager, run in run_ranks(2, compare, case.on(tensor_size=2, sequence_parallel=True)):
        assert problems(eager, run, graphs) == []


def break_the_graph(model: nn.Module, topology: Topology) -> None:
    def mutated(
        parameters: Sequence[Tensor | None], split: Collection[str], tensor: TensorGroup
    ) -> list[Tensor | None]:
        print("a side effect", end="")
        return sum_split_gradients(parameters, split, tensor)

    transformer.sum_split_gradients = mutated


def count_calls(model: nn.Module, topology: Topology) -> None:
    """A number that Python changes from call to call, and that the block's result depends on."""
    forward = transformer.Block.forward

    def mutated(self: Any, stream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, stream + (self.calls - self.calls), *arguments)

    transformer.Block.forward = mutated  # type: ignore[assignment]


@pytest.mark.parametrize(("mutation", "sign"), [(break_the_graph, "graph break"), (count_calls, "graphs")])
def test_a_mutation_is_seen(mutation: Mutation, sign: str) -> None:
    found = problems(*run_ranks(2, compare, PLAIN, mutation)[0])
    assert any(sign in problem for problem in found), found


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    for eager, run in run_ranks(2, compare, ROWS, None, "inductor"):
        assert (run.graphs, run.breaks) == (1, {})
        assert differences(run.outcome, eager) == []
