"""Shards in an S3 bucket, served by moto: the samples of local ones, credentials and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.index_file import load_index
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.write_shards import write_shards
from megatron_nepa.data.loaders.pretraining import build_index
from tests.data.test_loader import make_loader, take

pytestmark = pytest.mark.slow  # moto serves some 25 reads a second
pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
STEPS = 3


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        yield patch


@pytest.fixture(scope="module")
def bucket(
    photographs: Path, environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A client of a server whose bucket "photographs" holds four shards under train/."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(scan_folder(photographs), folder, 10, progress=False)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    environment.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port()))
    client = boto3.client("s3")
    client.create_bucket(Bucket="photographs")
    for path in folder.iterdir():
        client.upload_file(str(path), "photographs", f"train/{path.name}")
    yield client
    running.stop()


def test_a_bucket_gives_the_samples_of_local_shards(
    photographs: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_nepa.data.decoding.sample_reader._REMOTE_AHEAD", 16)
    build_and_save_index(open_source("s3://photographs/train"), tmp_path / "index", workers=1, progress=False)
    index = load_index(tmp_path / "index")
    assert str(index.root) == "s3://photographs/train"
    assert index.classes == ("ant", "bee", "cow")
    expected = scan_folder(photographs)  # in whose order the shards were written
    assert (list(index.names), index.label[:].tolist()) == (list(expected.names), expected.label.tolist())
    images = torch.cat([batch.images for batch in take(make_loader(photographs, index=index), STEPS)])
    assert torch.equal(
        images, torch.cat([batch.images for batch in take(make_loader(photographs, index=expected), STEPS)])
    )

    store = ImageStore(index)
    store.read(0)
    bucket.put_object(Bucket="photographs", Key="train/shard_000003.tar", Body=b"another" * 1000)
    with pytest.raises(ConfigError, match=r"s3://photographs/train/shard_000003\.tar was replaced or changed"):
        build_index(DataConfig(path=str(tmp_path / "index")), verbose=True)
    bucket.delete_object(Bucket="photographs", Key="train/shard_000003.tar")
    with pytest.raises(
        ConfigError, match=r"^s3://photographs/train/shard_000003\.tar cannot be read: there is no such"
    ):
        build_index(DataConfig(path=str(tmp_path / "index")), verbose=True)


@pytest.mark.parametrize("source", ["s3://photographs/none", "s3://no-such-bucket/train", "s3://photographs/none.tar"])
def test_what_is_not_there_is_said(bucket: Any, source: str) -> None:
    with pytest.raises(ConfigError, match=f"^{source}/? cannot be read: there is no such file.$"):
        open_source(source)


def test_credentials_that_are_missing_are_said(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^s3://photographs/train/ cannot be read: there are no credentials \(cred"):
        open_source("s3://photographs/train")
