"""The segmenter in fp64, without DeepSpeed: loss, logits and gradients of every grid equal one rank's to 1e-11."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nepa.config import IGNORED, ModelConfig, ParallelConfig
from megatron_nepa.models.build import Build
from megatron_nepa.models.segmenter import Segmenter, tapped_blocks
from megatron_nepa.parallel.batch_norm import BatchNorm
from megatron_nepa.parallel.parameters import layout_of
from megatron_nepa.parallel.rows import holds_whole_samples
from megatron_nepa.parallel.topology import TensorGroup
from tests.distributed.cases import MODEL, SEED, sample_images, spread_vectors
from tests.distributed.ranks import run_ranks

CLASSES = 5
CONFIG = replace(MODEL, image_size=42, num_layers=3, position_embedding="none", causal=False)
# grid: tensor-parallel size and sequence parallelism on two of four ranks or all, batch of a replica
GRIDS = [(2, True, 4), (2, False, 4), (2, True, 3), (2, False, 3), (4, True, 4)]


def test_tapped_blocks() -> None:
    """mmsegmentation's for B and L, the last block always."""
    assert tapped_blocks(12) == (3, 5, 7, 11)
    assert tapped_blocks(24) == (7, 11, 15, 23)
    assert tapped_blocks(2)[-1] == 1


@torch.no_grad()
def test_heads_read_raw_block_outputs() -> None:
    """The final norm of the last tap is the trunk's output; maps leave the BOS token out and keep rows and columns."""
    model = build(ParallelConfig(), TensorGroup(), None).eval()
    image = sample_images(range(2), replace(CONFIG, image_size=56), torch.float64)[..., :28]
    output = model.trunk(image, torch.arange(2), (2,))
    norm = model.trunk.norm
    normed = torch.nn.functional.layer_norm(output.taps[0], (64,), norm.weight, norm.bias, CONFIG.layer_norm_eps)
    torch.testing.assert_close(normed, output.output)
    maps = model._map(output.taps[0], output.rows, image.shape[2:], on_share=False)
    assert maps.shape == (2, 64, 4, 2)
    tokens = output.taps[0].view(2, 1 + 8, 64)
    assert torch.equal(maps[1, :, 3, 1], tokens[1, 8])
    assert torch.equal(maps[1, :, 1, 0], tokens[1, 3])


def sample_labels(samples: range) -> Tensor:
    shape = (CONFIG.image_size, CONFIG.image_size)
    labels = [torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(k)) for k in samples]
    for k, label in zip(samples, labels, strict=True):
        label[: 5 + 3 * (k % 3)] = IGNORED  # each sample ignores another share
    return torch.stack(labels)


def build(parallel: ParallelConfig, tensor: TensorGroup, norm_group: dist.ProcessGroup | None) -> Segmenter:
    model = Segmenter(CONFIG, CLASSES, Build(parallel, tensor, seed=SEED), partial(BatchNorm, group=norm_group))
    spread_vectors(model)
    return model.double()


def run(model: Segmenter, first: int, batch: int, tensor: TensorGroup) -> tuple[Tensor, Tensor]:
    """Loss and its parts of one replica's micro-batch, and its gradients added to the model's."""
    share = batch // tensor.size if batch % tensor.size == 0 else batch
    start = first + (tensor.rank * share if share < batch else 0)
    mine = range(start, start + share)
    output = model(sample_images(mine, CONFIG, torch.float64), torch.arange(first, first + batch), sample_labels(mine))
    output.loss.backward()
    return output.loss.detach(), output.parts


def compare() -> list[str]:
    """Every grid among four ranks against one rank that sees all replicas' samples at once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problems = []
    for size, sequence_parallel, batch in GRIDS:
        tensor_groups = [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)]
        data_groups = [dist.new_group(list(range(i, world, size))) for i in range(size)]
        tensor = TensorGroup(rank % size, size, tensor_groups[rank // size])
        replica, num_replicas = rank // size, world // size
        on_share = holds_whole_samples(batch, tensor, sequence_parallel)
        norm_group = dist.group.WORLD if on_share else data_groups[rank % size]
        model = build(ParallelConfig(size, sequence_parallel), tensor, norm_group)
        loss, parts = run(model, replica * batch, batch, tensor)
        found = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        means = torch.cat((loss[None], parts[:2]))
        for value in (means, *found.values()):
            dist.all_reduce(value, group=data_groups[rank % size])
            value /= num_replicas

        alone = build(ParallelConfig(), TensorGroup(), None)
        loss, parts = run(alone, 0, batch * num_replicas, TensorGroup())
        expected = {
            name: layout_of(param).take_shard(param.grad, tensor)
            for name, param in alone.named_parameters()
            if param.grad is not None
        }
        assert found.keys() == expected.keys()
        pairs = [("loss", means, torch.cat((loss[None], parts[:2])))]
        pairs += [(name, found[name], expected[name]) for name in found]
        pairs += [(name, value, alone.get_buffer(name)) for name, value in model.named_buffers()]
        problems += [
            f"TP {size}, SP {sequence_parallel}, batch {batch}: {name} differs by {(a - b).norm():.3g}"
            for name, a, b in pairs
            if not (a - b).norm() <= 1e-11 * max(1.0, b.norm().item())
        ]
        problems += compare_logits(model.eval(), alone.eval(), tensor)
    return problems


@torch.no_grad()
def compare_logits(model: Segmenter, alone: Segmenter, tensor: TensorGroup) -> list[str]:
    """One image on every rank of the group, as an evaluation gives it, of another size than training's."""
    config: ModelConfig = replace(CONFIG, image_size=56)
    image = sample_images(range(1), config, torch.float64)[..., :28]
    found, expected = (m(image, torch.zeros(1, dtype=torch.int64)) for m in (model, alone))
    if (found - expected).norm() <= 1e-11 * expected.norm() and found.shape == (1, CLASSES, 56, 28):
        return []
    return [f"TP {tensor.size}: logits {tuple(found.shape)} differ by {(found - expected).norm():.3g}"]


def test_grids_equal_one_rank() -> None:
    assert [problem for problems in run_ranks(4, compare) for problem in problems] == []
