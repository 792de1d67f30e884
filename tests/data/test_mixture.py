"""A mixture's samples are a pure function of (seed, k): shares in every window, each source in its own order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grids import GRIDS, Grid, seen_on
from PIL import Image
from scipy import stats
from torchvision.transforms import functional

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.index.dataset_index import DatasetIndex, PackedNames
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.mixture import Mixture, Source
from megatron_nepa.data.index.mixture_grammar import BLOCK
from megatron_nepa.data.loaders.pretraining import Batch, PretrainingLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.mixing import Mixing, MixtureOrder, passes
from megatron_nepa.data.sampling.mixture_state import continued, state_of
from megatron_nepa.data.sampling.order import ORDER_VERSION, crop_boxes, flips
from megatron_nepa.data.sampling.rank_share import Share
from tests.runs import make_images

SEED, SIZE, GLOBAL = 3, 32, 8
CPU = torch.device("cpu")
PER_BLOCK = {"large": 7000, "small": 2950, "tiny": 50}
SIZES = {"large": 12_345, "small": 40, "tiny": 3}


def made_index(name: str, images: int) -> DatasetIndex:
    """An index of files that nobody reads."""
    sides = np.full(images, 8, np.int32)
    names = PackedNames.pack(f"{name}{i}" for i in range(images))
    return DatasetIndex(Path("/nowhere"), names, sides, sides, np.full(images, -1, np.int32))


def made_mixture(per_block: dict[str, int] = PER_BLOCK) -> Mixture:
    return Mixture(tuple(Source(name, made_index(name, SIZES[name]), count) for name, count in per_block.items()))


def sources_of(samples: np.ndarray, mixture: Mixture | None = None) -> np.ndarray:
    return Mixing.of(mixture or made_mixture(), SEED).place(samples)[0]


def test_every_block_holds_the_shares_exactly() -> None:
    for number in (0, 1, 99_999):
        source = sources_of(np.arange(number * BLOCK, (number + 1) * BLOCK))
        assert np.bincount(source).tolist() == list(PER_BLOCK.values())


@pytest.mark.parametrize("window", [100, 1000, 3000, BLOCK])
def test_every_window_holds_the_shares_to_two_samples(window: int) -> None:
    counts = np.cumsum(np.eye(3, dtype=np.int64)[sources_of(np.arange(5 * BLOCK))], axis=0)
    found = counts[window:] - counts[:-window]
    assert np.abs(found - window * np.array(list(PER_BLOCK.values())) / BLOCK).max() <= 2


def test_sources_are_met_in_no_pattern() -> None:
    """Blocks and seeds differ, and where a source stands in its turn is uniform."""
    blocks = [sources_of(np.arange(b * BLOCK, (b + 1) * BLOCK)) for b in range(3)]
    for i in range(3):
        agree = (blocks[i] == blocks[(i + 1) % 3]).mean()
        assert agree < 0.75  # of independent ones: 0.7^2 + 0.295^2 + 0.005^2 = 0.58
    places = np.flatnonzero(sources_of(np.arange(100 * BLOCK)) == 2)  # one in 200
    assert stats.kstest(places % 200 / 200, "uniform").pvalue > 1e-4
    other = Mixing.of(made_mixture(), SEED + 1).place(np.arange(BLOCK))[0]
    assert (other == blocks[0]).mean() < 0.75


def test_a_source_shows_its_own_order_epoch_by_epoch() -> None:
    """As if it were alone: every image once an epoch, and the same order whatever the other sources and shares."""
    samples = np.arange(4 * BLOCK)
    mixture = made_mixture()
    images, source = MixtureOrder(mixture, SEED, ORDER_VERSION).images(samples), sources_of(samples)
    for number, (name, size) in enumerate(SIZES.items()):
        own = images[source == number] - mixture.starts[number]
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(whole, axis=1) == np.arange(size)).all()
        if name == "small":
            assert not (whole[0] == whole[1]).all()
            swapped = made_mixture({"small": 4000, "large": 6000})
            other = MixtureOrder(swapped, SEED, ORDER_VERSION).images(samples)[sources_of(samples, swapped) == 0]
            count = min(len(own), len(other))
            assert (own[:count] == other[:count]).all()


def test_a_sample_is_found_without_those_before_it() -> None:
    """At any k, in any batch, in no time; a substitute is of the same source and epoch."""
    mixture = made_mixture()
    order = MixtureOrder(mixture, SEED, ORDER_VERSION)
    for first in (0, 9_990, 10**9 - 7):
        samples = np.arange(first, first + 20)
        together, (source, place) = order.images(samples), Mixing.of(mixture, SEED).place(samples)
        assert [int(order.images(samples[i : i + 1])[0]) for i in range(20)] == together.tolist()
        drawn = Mixing.of(mixture, SEED).drawn_until(first)
        for number in range(3):
            mine = place[source == number]
            assert mine.tolist() == list(range(drawn[number], drawn[number] + len(mine)))
            assert order.choices(number) == mixture.sizes[number]
        for skip in (1, 2):
            for one, other in zip(together.tolist(), order.images(samples, skip).tolist(), strict=True):
                assert one != other
                assert mixture.locate(one)[0] == mixture.locate(other)[0]


def test_equal_sets_have_orders_of_their_own() -> None:
    """Two sets with the same names and sizes may be different pictures."""
    index = made_index("same", 500)
    mixture = Mixture((Source("a", index, 5000), Source("b", index, 5000)))
    images, source = (
        MixtureOrder(mixture, SEED, ORDER_VERSION).images(np.arange(1000)),
        sources_of(np.arange(1000), mixture),
    )
    assert (images[source == 0][:400] != images[source == 1][:400] - 500).mean() > 0.9
    assert len(set(mixture.keys)) == 2


def test_passes_count_what_was_drawn() -> None:
    mixture = made_mixture()
    counts = np.bincount(sources_of(np.arange(34_567)))
    assert passes(mixture, SEED, 34_567) == pytest.approx(dict(zip(SIZES, counts / list(SIZES.values()), strict=True)))


def shown(mixture: Mixture, samples: range) -> list[str]:
    order = MixtureOrder(mixture, SEED, ORDER_VERSION)
    return [mixture.where(image) for image in order.images(np.array(samples)).tolist()]


def test_a_mixture_goes_on_from_its_record() -> None:
    """The same shares go on as if nothing had been, in whatever order they are named."""
    mixture = made_mixture()
    recorded = json.loads(json.dumps(state_of(mixture)))
    turned = Mixture(mixture.sources[::-1])
    for named in (mixture, turned):
        again, said = continued(named, recorded, 25_000, SEED)
        assert said == []
        assert again == mixture
        assert state_of(again) == recorded


def test_changed_shares_go_on_where_each_source_was() -> None:
    """No image of an epoch is lost or shown twice; a source that is new begins, one that is left out is named."""
    mixture, since = made_mixture({"large": 7000, "small": 3000}), 12_344
    before = shown(mixture, range(since))
    named = made_mixture({"large": 2000, "small": 5000, "tiny": 3000})
    changed, said = continued(named, json.loads(json.dumps(state_of(mixture))), since, SEED)
    assert said[0].startswith("large 70.00% -> 20.00%, goes on at pass 0.7")
    assert said[1].startswith("small 30.00% -> 50.00%, goes on at pass 92.")
    assert said[2] == "tiny is new, 30.00%"
    whole = before + shown(changed, range(since, since + 30_000))
    for name, size in SIZES.items():
        own = [place for place in whole if f"/{name}" in place]
        assert len(own) > size or name == "large"
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size
    # and from its own record, at a later place, on and on
    again, said = continued(named, json.loads(json.dumps(state_of(changed))), since + 8000, SEED)
    assert said == []
    assert shown(again, range(since + 8000, since + 8100)) == whole[since + 8000 : since + 8100]
    fewer, said = continued(mixture, state_of(changed), since + 8000, SEED)
    assert said[0] == "tiny is left out"
    assert fewer.since == since + 8000


def test_a_run_on_one_set_may_go_on_with_several() -> None:
    mixture = made_mixture()
    begun, said = continued(mixture, None, 800, SEED)
    assert said == ["they were one set before, and every source begins its first pass"]
    assert shown(begun, range(800, 900)) == shown(mixture, range(100))
    assert continued(mixture, None, 0, SEED) == (mixture, [])


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"since": 0}, "record of its mixture is damaged"),
        ({"since": 0, "sources": [{"key": "a"}]}, "record of its mixture is damaged"),
        (
            {"since": 0, "sources": [{"key": "a", "per_block": 400, "drawn": 0}]},
            "in blocks of 400 samples; this release",
        ),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(state: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        continued(made_mixture(), state, 80, SEED)


def test_columns_and_places_are_those_of_the_sources(two: Mixture) -> None:
    first, second = (source.index for source in two.sources)
    images = np.array([0, len(first), len(two) - 1, 3])
    expected = [first.width[0], second.width[0], second.width[-1], first.width[3]]
    assert two.width[images].tolist() == expected
    assert two.where(len(first) + 2) == second.where(2)
    assert len(two) == len(first) + len(second)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Mixture:
    """Photographs in many sizes, and a few of one size."""
    few = make_images(tmp_path_factory.mktemp("few") / "few", 5)
    return Mixture((Source("many", scan_folder(photographs), 6000), Source("few", scan_folder(few), 4000)))


def loader(mixture: Mixture, log: Path | None = None, **changes: Any) -> PretrainingLoader:
    names = [name for name in changes if name in Share.__dataclass_fields__]
    share = replace(Share(GLOBAL, GLOBAL, 1, 0, 1, 0, 1), **{name: changes.pop(name) for name in names})
    feed = Feed(share, SEED, CPU, torch.float32, changes.pop("consumed_samples", 0), log)
    config = DataConfig(**{"horizontal_flip": True, "num_threads": 1, **changes})
    return PretrainingLoader(mixture, config, SIZE, feed)


def take(loading: PretrainingLoader, count: int) -> list[Batch]:
    batches = list(islice(loading, count))
    loading.close()
    return batches


@pytest.fixture(scope="module")
def whole(two: Mixture) -> list[Batch]:
    """The first 8 steps on one rank: 64 samples, an epoch and more of one source, five of the other."""
    return take(loader(two), 8)


def test_pixels_are_of_the_sample_s_source(two: Mixture, whole: list[Batch]) -> None:
    """Image and crop are those of the source that the sample is drawn from."""
    images = np.concatenate([batch.image_index for batch in whole if batch.image_index is not None])
    assert images.tolist() == MixtureOrder(two, SEED, ORDER_VERSION).images(np.arange(64)).tolist()
    assert (images >= two.sizes[0]).sum() == pytest.approx(0.4 * 64, abs=2)
    mirrored, pixels = flips(SEED, np.arange(64)), torch.cat([batch.images for batch in whole])
    for k in (0, 1, 2, 17, 18, 40):
        source, row = two.locate(int(images[k]))
        index = two.sources[source].index
        side = index.width[row : row + 1], index.height[row : row + 1]
        x, y, width, height = crop_boxes(SEED, np.array([k]), *side, 0.08)[0].tolist()
        with Image.open(index.where(row)) as picture:
            crop = functional.resized_crop(picture.convert("RGB"), y, x, height, width, [SIZE, SIZE])
        cut = np.asarray(functional.hflip(crop) if mirrored[k] else crop, np.float32).transpose(2, 0, 1)
        assert np.abs((pixels[k].numpy() + 1) * 127.5 - cut).max() <= 1.001


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grids_see_the_same_mixture(two: Mixture, grid: Grid) -> None:
    """Samples, images, crops and pixels, on every grid and after a restart."""
    pixels, images = seen_on(Grid(), two, 6)
    again, shown_again = seen_on(grid, two, 4, consumed=2 * GLOBAL)
    assert torch.equal(again, pixels[2 * GLOBAL :])
    assert shown_again.tolist() == images[2 * GLOBAL :].tolist()


@pytest.mark.parametrize(("data_size", "tensor_size", "micro"), [(1, 1, 4), (2, 1, 2), (1, 2, 8), (2, 2, 2)])
def test_weights_add_up_to_the_mean_of_each_source(two: Mixture, data_size: int, tensor_size: int, micro: int) -> None:
    """Over the micro-batches of a step, whatever the grid; tensor-parallel ranks have the same."""
    accumulation, losses = GLOBAL // (micro * data_size), torch.arange(64, dtype=torch.float32) ** 2
    found: dict[tuple[int, int], dict[str, float]] = {}
    for data_rank in range(data_size):
        for tensor_rank in range(tensor_size):
            one = loader(
                two,
                micro_batch_size=micro,
                accumulation_steps=accumulation,
                data_rank=data_rank,
                data_size=data_size,
                tensor_rank=tensor_rank,
                tensor_size=tensor_size,
            )
            for number, batch in enumerate(take(one, 3 * accumulation)):
                step = found.setdefault((number // accumulation, tensor_rank), {})
                for name, weights in batch.source_weights.items():
                    part = (weights * losses[batch.sample_index]).sum().item() / accumulation / data_size
                    step[name] = step.get(name, 0.0) + part
    for (number, _), values in found.items():
        samples = np.arange(number * GLOBAL, (number + 1) * GLOBAL)
        source = sources_of(samples, two)
        means = {one.name: float(losses[samples[source == i]].mean()) for i, one in enumerate(two.sources)}
        assert values == pytest.approx(means)


def test_a_source_without_a_sample_in_a_step_has_no_weights(two: Mixture) -> None:
    """The same names on every rank, so that their scalars are summed together."""
    rare = Mixture((replace(two.sources[0], per_block=9999), replace(two.sources[1], per_block=1)))
    where = int(np.flatnonzero(sources_of(np.arange(BLOCK), rare) == 1)[0]) // GLOBAL * GLOBAL
    for rank in range(2):
        one = loader(rare, consumed_samples=where - GLOBAL, micro_batch_size=4, data_rank=rank, data_size=2)
        before, within = take(one, 2)
        assert list(before.source_weights) == ["many"]
        assert list(within.source_weights) == ["many", "few"]


def damaged(mixture: Mixture, folder: Path, bad: int) -> Iterator[Source]:
    """The sources, copied, of which the second lost its first images."""
    for number, source in enumerate(mixture.sources):
        shutil.copytree(source.index.root, folder / source.name)
        index = replace(source.index, root=folder / source.name)
        for row in range(bad if number else 0):
            (index.root / index.names[row]).write_bytes(b"no image")
        yield replace(source, index=index)


def test_a_bad_image_is_replaced_within_its_source(two: Mixture, whole: list[Batch], tmp_path: Path) -> None:
    mixture, log = Mixture(tuple(damaged(two, tmp_path, 2))), tmp_path / "bad_images.jsonl"
    batches = take(loader(mixture, log), 8)
    source = sources_of(np.arange(64), two)
    images, expected = (
        np.concatenate([batch.image_index for batch in part if batch.image_index is not None])
        for part in (batches, whole)
    )
    changed = images != expected
    assert changed.sum() >= 8  # of 25 or so samples two fifths
    assert (source[changed] == 1).all()
    assert (np.searchsorted(mixture.starts, images, "right") - 1 == source).all()
    assert not np.isin(images, two.sizes[0] + np.arange(2)).any()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(row["source"], row["image"]) for row in rows} == {("few", 0), ("few", 1)}
    again = take(loader(mixture, micro_batch_size=2, accumulation_steps=4, consumed_samples=3 * GLOBAL), 4)
    assert torch.equal(torch.cat([batch.images for batch in again]), batches[3].images)


def test_a_source_that_is_gone_ends_the_run_by_its_name(two: Mixture, tmp_path: Path) -> None:
    mixture = Mixture(tuple(damaged(two, tmp_path, 5)))
    one = loader(mixture, max_bad_share=1.0)
    with pytest.raises(ConfigError, match="none of the 5 images of few can be read or decoded"):
        list(islice(one, 8))
    one.close()


def test_bad_images_are_counted_by_source(two: Mixture, tmp_path: Path) -> None:
    """A source of which too many are bad ends the run, however many good images the others have."""
    many = make_images(tmp_path / "many", 30)
    first = replace(two.sources[0], per_block=5000)
    mixture = Mixture((first, Source("many", scan_folder(many), 5000)))
    shutil.rmtree(many)
    one = loader(mixture)
    with pytest.raises(ConfigError, match=r"11 of the first \d+ images of many of this rank cannot be used"):
        list(islice(one, 20))
    one.close()


def test_what_is_bad_in_two_sources_is_not_added_up(tmp_path: Path) -> None:
    """Six bad images in each of two sources, where ten in one would be let pass: neither is too bad."""
    sources = []
    for name in ("left", "right"):
        index = scan_folder(make_images(tmp_path / name, 9))
        for row in range(6):
            (index.root / index.names[row]).write_bytes(b"no image")
        sources.append(Source(name, index, 5000))
    log = tmp_path / "bad_images.jsonl"
    batches = take(loader(Mixture(tuple(sources)), log, max_bad_share=0.0), 10)  # four epochs of each
    assert len(batches) == 10
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(row["source"], row["image"]) for row in rows} == {
        (name, i) for name in ("left", "right") for i in range(6)
    }
