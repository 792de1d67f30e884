"""Shards behind URLs: the samples and pixels of local ones, whatever the server does; and what ends a run."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.decoding import sample_reader
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.index_file import load_index
from megatron_nepa.data.index.remote_shards import check_remote
from megatron_nepa.data.index.sources import list_source, open_source
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from megatron_nepa.data.loaders.evaluation import EvaluationLoader
from megatron_nepa.data.loaders.pretraining import PretrainingLoader, build_index
from megatron_nepa.data.remote.cache import RangeCache
from megatron_nepa.data.remote.folder import Access, RemoteFolder, SourceLostError, shard_urls
from megatron_nepa.data.sampling.order import crop_boxes
from megatron_nepa.files import Hold
from tests.data.grids import GLOBAL, GRIDS, SEED, Grid, check_grids, seen_on
from tests.data.index_tool import run_tool
from tests.data.range_server import RangeServer, serving
from tests.data.test_loader import make_loader, take

pytest.importorskip("aiohttp")
STEPS = 8


@pytest.fixture(scope="module")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tar files of 10 images, at most, with their classes."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(scan_folder(photographs), folder, 10, progress=False)
    return folder


@pytest.fixture
def server(shards: Path) -> Iterator[RangeServer]:
    with serving(shards) as running:
        yield running


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    path = tmp_path_factory.mktemp("local") / "index"
    build_and_save_index(open_source(shards), path, workers=1, progress=False)
    return load_index(path)


@pytest.fixture(scope="module")
def indexed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """The index of the shards as a server gives them that fails now and then."""
    path = tmp_path_factory.mktemp("remote") / "index"
    with serving(shards, failing=0.1, short=0.1) as running:
        build_and_save_index(open_source(running.url), path, workers=1, progress=False)
    return load_index(path)


def at(index: DatasetIndex, server: RangeServer, **access: Any) -> DatasetIndex:
    """The index of the same shards on another server."""
    return replace(index, root=RemoteFolder(server.url, Access(**({"patience": 20.0} | access))))


@pytest.fixture(scope="module")
def reference(photographs: Path, local: DatasetIndex) -> Tensor:
    """The first steps of a run over the local shards."""
    return torch.cat([batch.images for batch in take(make_loader(photographs, index=local), STEPS)])


def test_the_index_is_that_of_local_shards(local: DatasetIndex, indexed: DatasetIndex) -> None:
    assert isinstance(indexed.root, RemoteFolder)
    assert indexed.fingerprint() == local.fingerprint()
    assert indexed.classes == local.classes == ("ant", "bee", "cow")
    for name in ("shard", "offset", "size", "label"):
        assert (getattr(indexed, name) == getattr(local, name)).all()
    assert [stamp.edges for stamp in indexed.stamps] == [stamp.edges for stamp in local.stamps]
    assert indexed.where(0) == f"{indexed.root}/shard_000000.tar:{local.names[0]}"


@pytest.mark.parametrize(
    "faults",
    [
        {},
        {"delay": 0.05},
        {"failing": 0.1},
        {"short": 0.3},
        {"whole": 0.3},
        {"failing": 0.1, "short": 0.1, "whole": 0.1},
    ],
    ids=lambda faults: "+".join(faults) or "none",
)
def test_a_bad_server_changes_no_sample(
    photographs: Path, indexed: DatasetIndex, server: RangeServer, reference: Tensor, faults: dict[str, float]
) -> None:
    for name, value in faults.items():
        setattr(server.faults, name, value)
    loader = make_loader(photographs, index=at(indexed, server))
    assert torch.equal(torch.cat([batch.images for batch in islice(loader, STEPS)]), reference)
    assert loader.num_bad_images == 0
    loader.close()
    assert faults or server.faults.most_at_once > 4  # the requests do not wait for each other


@pytest.mark.parametrize("grids", [GRIDS[1::2], pytest.param(GRIDS[::2], marks=pytest.mark.slow)])
def test_training_sees_what_it_sees_in_local_shards(
    local: DatasetIndex, indexed: DatasetIndex, server: RangeServer, grids: tuple[Grid, ...]
) -> None:
    """The same samples, boxes and pixels on every grid, and from there on after a restart, by a failing server."""
    pixels, images = seen_on(Grid(), local, 6)
    samples = np.arange(len(images))
    boxes = [crop_boxes(SEED, samples, one.width[images], one.height[images], 0.2) for one in (local, indexed)]
    assert np.array_equal(*boxes)
    server.faults.failing = 0.1
    index = at(indexed, server)
    check_grids(grids, index, pixels, images, 3)


def test_a_server_that_dies_and_returns(
    photographs: Path,
    indexed: DatasetIndex,
    server: RangeServer,
    reference: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample_reader, "_REMOTE_AHEAD", GLOBAL)
    loader = make_loader(photographs, index=at(indexed, server))
    images = [next(loader).images]
    server.faults.dead = True
    refused = server.faults.requests
    threading.Timer(1.0, setattr, (server.faults, "dead", False)).start()
    images += [batch.images for batch in islice(loader, STEPS - 1)]
    assert server.faults.requests > refused
    assert torch.equal(torch.cat(images), reference)
    assert loader.num_bad_images == 0
    loader.close()


@pytest.mark.parametrize("how", ["dead", "refuses", "gone"])
def test_a_source_that_is_lost_is_no_bad_image(
    photographs: Path, indexed: DatasetIndex, server: RangeServer, tmp_path: Path, how: str
) -> None:
    log = tmp_path / "bad_images.jsonl"
    loader = make_loader(photographs, index=at(indexed, server, patience=0.5), bad_image_log=log, max_bad_share=1.0)
    next(loader)
    server.faults.dead, server.faults.status = how == "dead", {"dead": 0, "refuses": 403, "gone": 404}[how]
    with pytest.raises(SourceLostError) as error:
        list(islice(loader, 100))
    said = {"dead": "has given no bytes for 0.5 s", "refuses": "access is denied", "gone": "there is no such file"}[how]
    assert f"{server.url}/shard_" in str(error.value)
    assert said in str(error.value)
    assert loader.num_bad_images == 0
    assert not log.exists()
    loader.close()


def test_a_shard_that_was_replaced_is_noticed(shards: Path, indexed: DatasetIndex, tmp_path: Path) -> None:
    """At the start and in the middle of a run; a copy of a shard, which has another tag and time, serves as well."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy, copy_function=shutil.copy)
    with serving(copy) as server:
        index = at(indexed, server)
        check_remote(index, every_shard=True)
        store = ImageStore(index)
        store.read(0)
        content = bytearray((copy / "shard_000000.tar").read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        (copy / "shard_000000.tar").write_bytes(content)
        said = f"{server.url}/shard_000000.tar was replaced or changed since it was indexed"
        with pytest.raises(ConfigError, match=said):
            store.read(1)  # it begins like no image
        (copy / "shard_000000.tar").write_bytes(content[:5000])
        with pytest.raises(ConfigError, match=said):
            ImageStore(index).read(9)
        with pytest.raises(ConfigError, match=said):
            check_remote(index, every_shard=False)


def run_config(index: Path) -> DataConfig:
    return DataConfig(path=str(index), remote_patience=0.5)


def test_what_cannot_be_read_is_said_before_the_first_step(
    shards: Path, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in one sentence that names the source."""
    index = tmp_path / "index"
    build_and_save_index(open_source(server.url), index, workers=1, progress=False)
    build_index(run_config(index))
    for status, said in ((403, "access is denied"), (401, "access is denied"), (404, "there is no such file")):
        server.faults.status = status
        with pytest.raises(ConfigError, match=f"^{server.url}/shard_000000.tar cannot be read: {said}[^\n]*$"):
            build_index(run_config(index))
    server.faults.status = 0
    server.faults.whole = 1.0
    with pytest.raises(ConfigError, match=rf"^{server.url}/shard_000000.tar lies on a server that gives whole files"):
        build_index(run_config(index))
    with pytest.raises(ConfigError, match="lies on a server that gives whole files alone"):
        list_source(server.url)
    server.faults.whole = 0.0
    server.faults.dead = True
    with pytest.raises(ConfigError, match=rf"^{server.url}/shard_000000.tar has given no bytes for 0.5 s[^\n]*$"):
        build_index(run_config(index))
    server.faults.dead = False
    server.folder = shards.parent  # one of the shards is missing, and it is not the first
    moved = tmp_path / "some"
    shutil.copytree(shards, moved)
    (moved / "shard_000002.tar").unlink()
    server.folder = moved
    with pytest.raises(ConfigError, match=f"^{server.url}/shard_000002.tar cannot be read: there is no such file"):
        build_index(run_config(index))
    with pytest.raises(ConfigError, match="is a URL: index its shards"):
        build_index(DataConfig(path=server.url))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"is read by fsspec: pip install 'megatron_nepa\[remote\]'\.$"):
        build_index(run_config(index))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://", "s3:// names no place"),
        ("http://[::1/a.tar", "is no URL (Invalid IPv6 URL)"),
        ("zip://a.tar::{url}/b.zip", "is a chain of URLs"),
        ("github://folder/a.tar", "cannot be opened (GithubFileSystem.__init__() missing"),
        ("s4://bucket/shards", "begins with s4://, which fsspec does not know"),
        ("{url}/none-{{0..3}}.tar", "{url}/none-0.tar cannot be read: there is no such file"),
        ("{url}/a.tar?signature=1", "with a signature or a password"),
        ("{url}/empty/", "lists no tar files"),
        ("{folder}/list.txt", "in line 2, which is no URL"),
    ],
)
def test_the_tool_refuses_sources_by_name(server: RangeServer, tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "list.txt").write_text(f"{server.url}/shard_000000.tar\n/data/a.tar\n")
    server.folder = tmp_path
    (tmp_path / "empty").mkdir()
    names = {"url": server.url, "folder": tmp_path}
    with pytest.raises(ConfigError) as error:
        list_source(source.format(**names))
    assert said.format(**names) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_tool_takes_a_list_of_shards(server: RangeServer, local: DatasetIndex, tmp_path: Path) -> None:
    shards = tmp_path / "shards.txt"
    shards.write_text(f"{server.url}/shard_{{000000..000001}}.tar\n{server.url}/shard_000003.tar\n")
    done = run_tool(shards, "--out", tmp_path / "index", "--workers", "1")
    assert done.returncode == 0, done.stderr
    index = load_index(tmp_path / "index")
    assert list(index.shards) == ["shard_000000.tar", "shard_000001.tar", "shard_000003.tar"]
    assert str(index.root) == server.url
    assert len(index) == (local.shard[:] != 2).sum()
    refused = run_tool(f"{server.url}/none", "--out", tmp_path / "none")
    assert refused.returncode == 2
    assert refused.stderr == f"index_dataset: {server.url}/none/ cannot be read: there is no such file.\n"


def test_ranges_in_braces() -> None:
    assert shard_urls("s3://b/t-{08..11}.tar") == [f"s3://b/t-{n}.tar" for n in ("08", "09", "10", "11")]
    assert shard_urls("s3://b/{0..1}/{1..2}.tar") == [f"s3://b/{a}/{b}.tar" for a in (0, 1) for b in (1, 2)]
    assert shard_urls("s3://b/folder") is None
    assert shard_urls("/data/a.tar") is None


def test_neighbours_come_by_one_request(photographs: Path, indexed: DatasetIndex, server: RangeServer) -> None:
    """An evaluation, which goes through the images in their order, asks for several at once."""
    index = at(indexed, server)
    arguments = (DataConfig(), 32, 40, False, 37, 0, 1, torch.device("cpu"), torch.float32)
    reader = sample_reader.CONNECTIONS
    images = [batch.images for batch in EvaluationLoader(index, *arguments)]
    assert len(images) == 1
    assert reader > len(index)  # a thread an image: nothing to join
    alone = len([size for _, start, stop in server.faults.ranges if (size := stop - start) != 4096])
    server.faults.ranges.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_reader, "CONNECTIONS", 2)
        again = [batch.images for batch in EvaluationLoader(index, *arguments)]
    joined = len([size for _, start, stop in server.faults.ranges if (size := stop - start) != 4096])
    assert torch.equal(images[0], again[0])
    assert alone == len(index)
    assert joined <= 2 + len(index.shards)


def test_memory_ahead_of_the_decoder_is_bounded(indexed: DatasetIndex) -> None:
    """Some hundred images ahead, however small the batch, and never more than 256 MB of them."""
    assert sample_reader.reading_ahead(indexed, 2, 256) == (64, 1)
    assert sample_reader.reading_ahead(indexed, 2, 8) == (64, 32)
    large = replace(indexed, size=indexed.size * 0 + 2**24)
    assert sample_reader.reading_ahead(large, 2, 4) == (64, 4)
    assert sample_reader.reading_ahead(replace(indexed, root=Path("/data")), 2, 4) == (2, 1)


def test_a_cache_serves_later_epochs(
    photographs: Path, indexed: DatasetIndex, server: RangeServer, reference: Tensor, tmp_path: Path
) -> None:
    index = at(indexed, server, cache=tmp_path / "cache", cache_bytes=10**8)
    take(make_loader(photographs, index=index), STEPS)
    server.faults.ranges.clear()
    loader = make_loader(photographs, index=index)
    assert torch.equal(torch.cat([batch.images for batch in islice(loader, STEPS)]), reference)
    loader.close()
    assert not [start for _, start, stop in server.faults.ranges if stop - start != 4096]
    for file in (tmp_path / "cache").glob("*/*.range"):  # a disk that lost what was in its files, not their length
        file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(torch.cat([b.images for b in take(make_loader(photographs, index=index), STEPS)]), reference)


def fill(folder: Path, first: int) -> None:
    """Read 200 ranges of 1,000 bytes through a cache of 50,000."""
    cache = RangeCache(folder, 50_000)
    for number in range(first, first + 200):
        content = bytes([number % 256]) * 1000
        assert cache.get(f"range {number}", 1000, lambda content=content: content) == content


def test_a_cache_asks_again_where_another_process_trims(tmp_path: Path) -> None:
    """That one may have looked before what was written meanwhile."""
    cache = RangeCache(tmp_path, 50_000)
    other = Hold(tmp_path / "trim.lock")
    for number in range(60):
        cache.get(f"range {number}", 1000, lambda: bytes(1000))
    other.release()
    cache.get("the last", 1000, lambda: bytes(1000))
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.range")) <= 50_000


def test_a_cache_is_bounded_and_shared(tmp_path: Path) -> None:
    """Several processes write, read and remove: none sees a part of a range, and all together stay in bounds."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path, first)) for first in (0, 0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    total = sum(file.stat().st_size for file in tmp_path.glob("*/*"))
    assert 20_000 < total <= 50_000 * (1 + 3 * 0.05) + 3 * 1016
    assert not list(tmp_path.glob("*/*.partial"))
    fill(tmp_path, 300)
    newest = RangeCache(tmp_path, 50_000)
    newest.trim()
    assert newest.get("range 499", 1000, lambda: b"x" * 1000) == bytes([499 % 256]) * 1000  # the oldest went first


def test_a_cache_that_cannot_be_written_is_refused(indexed: DatasetIndex, server: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache .*file/cache cannot be written"):
        check_remote(at(indexed, server, cache=tmp_path / "file" / "cache"), every_shard=False)


def test_a_forked_process_reads_by_connections_of_its_own(indexed: DatasetIndex, server: RangeServer) -> None:
    """And does not drop its parent's, which would close them: the parent would wait half a minute for an answer."""
    gc.collect()  # what other tests have left, here rather than in the child
    store = ImageStore(at(indexed, server))
    expected = [store.read(i).tobytes() for i in range(10)]
    assert store._remote is not None
    parents = weakref.ref(store._remote._files._system)
    child = os.fork()
    if child == 0:
        same = [store.read(i).tobytes() for i in range(10)] == expected
        gc.collect()
        os._exit(0 if same and parents() is not None else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        assert [store.read(i).tobytes() for i in range(10)] == expected
    if ended == (0, 0):
        os.kill(child, 9)
    assert ended == (child, 0)


def test_retries_draw_from_no_generator_that_a_run_has_seeded(indexed: DatasetIndex, server: RangeServer) -> None:
    import random

    states = random.getstate(), torch.get_rng_state().tolist()
    server.faults.failing = 0.5
    store = ImageStore(at(indexed, server))
    for i in range(5):
        store.read(i)
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    assert server.faults.requests > 8


def test_the_loader_is_the_same_without_the_extra(
    photographs: Path, local: DatasetIndex, reference: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fsspec", "aiohttp"):
        monkeypatch.setitem(sys.modules, name, None)
    loader: PretrainingLoader = make_loader(photographs, index=local)
    assert torch.equal(next(loader).images, reference[:GLOBAL])
    loader.close()
