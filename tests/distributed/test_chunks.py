"""Rows that travel in chunks: the same bytes and numbers, and a chunk on its way while another is multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nepa.config import ParallelConfig
from megatron_nepa.parallel import products
from megatron_nepa.parallel.collectives import wait
from megatron_nepa.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_nepa.parallel.parameters import initialize_parameters
from megatron_nepa.parallel.topology import TensorGroup
from megatron_nepa.planning.counting import Recorder, Traffic
from tests.distributed.cases import Case, differences, train_case
from tests.distributed.ranks import run_ranks

ROWS, WIDTH = 10, 16  # of a rank; fp64
WHOLE = 2**26
THREE = 2 * ROWS * WIDTH * 8 // 3  # chunks of 4, 3 and 3 of a rank's rows, or of 7, 7 and 6 of all
STARTS = {"all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce_"}


class Order(TorchDispatchMode):
    """The order in which collectives start, are waited for, and products run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in STARTS:
            self.calls.append("start")
        elif name in ("mm", "addmm"):
            self.calls.append("product")
        elif name == "wait_tensor":
            self.calls.append("wait")
        return func(*args, **(kwargs or {}))


def layers(sequence_parallel: bool, chunk_bytes: int) -> tuple[ColumnParallelLinear, RowParallelLinear, Tensor]:
    """A layer of each kind, and a rank's input of the first; whole numbers, whose sums do not depend on their order."""
    tensor = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    parallel = ParallelConfig(tensor.size, sequence_parallel, chunk_bytes=chunk_bytes)
    column, row = ColumnParallelLinear(WIDTH, 24, tensor, parallel), RowParallelLinear(24, WIDTH, tensor, parallel)
    for layer in (column, row):
        initialize_parameters(layer, 1, 4.0, tensor)
        layer.double()
        with torch.no_grad():
            layer.weight.round_()
    x = torch.randint(-9, 9, (tensor.size * ROWS, WIDTH), generator=torch.Generator().manual_seed(3)).double()
    return column, row, x[tensor.rank * ROWS :][:ROWS] if sequence_parallel else x


def numbers(sequence_parallel: bool, chunk_bytes: int) -> list[Tensor]:
    """Output and gradients of a layer of each kind."""
    column, row, x = layers(sequence_parallel, chunk_bytes)
    x.requires_grad_()
    inside = column(x)
    output = row(inside)
    (output * torch.arange(output.numel(), dtype=x.dtype).view_as(output)).sum().backward()
    weights = (column.weight, column.bias, row.weight)
    return [inside.detach(), output.detach(), x.grad, *(weight.grad for weight in weights)]  # type: ignore[list-item]


def differing(sequence_parallel: bool) -> list[int]:
    whole, cut = numbers(sequence_parallel, WHOLE), numbers(sequence_parallel, THREE)
    return [i for i, (a, b) in enumerate(zip(whole, cut, strict=True)) if not torch.equal(a, b)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_chunks_change_no_bit_of_two_layers(sequence_parallel: bool) -> None:
    assert run_ranks(2, differing, sequence_parallel) == [[], []]


def forward_traffic(sequence_parallel: bool, chunk_bytes: int) -> Traffic:
    column, row, x = layers(sequence_parallel, chunk_bytes)
    with torch.no_grad(), Recorder() as recorder:
        row(column(x))
    return recorder.traffic


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_chunks_are_calls_and_no_more_bytes(sequence_parallel: bool) -> None:
    kinds = ("all_gather", "reduce_scatter") if sequence_parallel else ("all_reduce",)
    for chunk_bytes, chunks in ((WHOLE, 1), (THREE, 3), (1, ROWS)):
        for traffic in run_ranks(2, forward_traffic, sequence_parallel, chunk_bytes):
            assert traffic.calls == {(kind, 2): chunks for kind in kinds}
            assert traffic.bytes == {(kind, 2): 2 * ROWS * WIDTH * 8 for kind in kinds}


def forward_order(sequence_parallel: bool, mutation: bool = False) -> tuple[list[str], list[str]]:
    column, row, x = layers(sequence_parallel, THREE)
    if mutation:
        for name in ("start_all_gather", "start_reduce_scatter", "start_all_reduce"):
            start = getattr(products, name)
            setattr(products, name, lambda *arguments, start=start: wait(start(*arguments)))
    with torch.no_grad(), Order() as of_column:
        hidden = column(x)
    with torch.no_grad(), Order() as of_row:
        row(hidden)
    return of_column.calls, of_row.calls


def travels_behind_products(column: list[str], row: list[str], sequence_parallel: bool) -> bool:
    """Whether every chunk but the first of the gathered ones, and the last of the summed ones, has a product beside it:
    nobody has waited for it when another chunk's product starts.
    """
    gathers = ["start"] * 3 + ["wait", "product"] * 3 if sequence_parallel else ["product"]
    return column == gathers and row == ["product", "start"] * 3 + ["wait"] * 3


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_chunk_is_on_its_way_while_another_is_multiplied(sequence_parallel: bool) -> None:
    for column, row in run_ranks(2, forward_order, sequence_parallel):
        assert travels_behind_products(column, row, sequence_parallel)
    for column, row in run_ranks(2, forward_order, sequence_parallel, True):
        assert not travels_behind_products(column, row, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_twelve_steps_in_chunks_are_those_in_one_piece(sequence_parallel: bool) -> None:
    case = Case(steps=12).on(tensor_size=2, sequence_parallel=sequence_parallel)
    cut = case.on(tensor_size=2, sequence_parallel=sequence_parallel, chunk_bytes=4096)
    whole, found = run_ranks(2, train_case, case)[0], run_ranks(2, train_case, cut)[0]
    assert differences(found, whole) == []
