"""Checking images and keeping the index while workers die, commands are interrupted, and mistakes are made."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import crashing_worker
import numpy as np
import pytest
from index_tool import TOOL, run_tool

from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.index.listing import Known
from megatron_nepa.data.index.sources import list_source, open_source
from megatron_nepa.data.indexing import build as indexing
from megatron_nepa.data.indexing import verify
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.indexing.lock import claimed


def test_full_verification_decodes_every_pixel(photographs: Path, tmp_path: Path) -> None:
    """A file cut at half passes the header check and not the full one."""
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    victim = folder / "bee" / "01.jpg"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    listing = open_source(folder)
    header = build_and_save_index(listing, tmp_path / "header", "header", workers=1, progress=False)
    assert len(header) == 37
    result = run_tool(folder, "--out", tmp_path / "full", "--verify", "full", "--workers", 1)
    assert result.returncode == 0
    assert "left out bee/01.jpg: the decoder refuses it" in result.stdout
    assert len(load_index(tmp_path / "full")) == 36


def test_an_image_that_kills_the_decoder_costs_itself_alone(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that die are replaced, and the image that killed them is found."""
    listing = list_source(photographs)
    monkeypatch.setattr(verify, "_check", crashing_worker.check)
    rows = np.arange(len(listing))
    chunks = [verify.Chunk(0, part, listing.select(part)) for part in np.array_split(rows, 4)]
    found = [checked for _, checked in verify.check_images(iter(chunks), "header", "cpu", 2)]
    assert sorted(np.concatenate([checked.rows for checked in found]).tolist()) == rows.tolist()
    reasons = {row: reason for checked in found for row, reason in checked.reasons.items()}
    assert reasons == dict.fromkeys(crashing_worker.FATAL_ROWS, "crashes the decoder")
    assert sum(int(checked.width.sum()) for checked in found) == len(rows) - 3


def test_an_interrupted_index_continues(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished chunks are not checked again; another listing is refused."""
    monkeypatch.setattr("megatron_nepa.data.indexing.build._CHUNK", 10)
    listing = Known(list_source(photographs))
    real = verify.check_images

    def stopped(*arguments: object) -> object:
        yield next(real(*arguments))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_nepa.data.indexing.build.check_images", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    assert not (tmp_path / "index").exists()
    with pytest.raises(ConfigError, match="begun with other images"):
        build_and_save_index(open_source(photographs / "ant"), tmp_path / "index", workers=1, progress=False)
    asked: list[int] = []

    def counted(chunks: Iterator[verify.Chunk], *rest: object) -> object:
        for chunk, checked in real(chunks, *rest):  # type: ignore[arg-type]
            asked.append(len(chunk.rows))
            yield chunk, checked

    monkeypatch.setattr("megatron_nepa.data.indexing.build.check_images", counted)
    index = build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    assert sum(asked) == 27
    assert index.fingerprint() == scan_folder(photographs).fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_two_commands_do_not_write_the_same_index(photographs: Path, tmp_path: Path) -> None:
    listing = open_source(photographs)
    facts = indexing._identity(listing, "header")
    with (
        claimed(tmp_path / "index.partial/listing.json", facts, ""),
        pytest.raises(ConfigError, match=r"another process is writing .*index\.partial: wait for its end"),
    ):
        build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    (tmp_path / "index.partial/listing.json").write_text("")  # killed before it wrote what it had begun with
    build_and_save_index(listing, tmp_path / "index", workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_no_worker_outlives_a_killed_tool(photographs: Path, tmp_path: Path) -> None:
    """kill -9 of the parent ends its workers, those that were still starting too."""
    code = (
        "import numpy as np, sys, time\n"
        "from megatron_nepa.data.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    pool = worker_pool(2)\n"
        "    tasks = [pool.submit(time.sleep, 60) for _ in range(4)]\n"
        "    time.sleep(1)\n"
        "    print(*pool._processes, flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert workers
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(worker) for worker in workers)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_tool_refuses_before_it_works(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is indexed, or written elsewhere, for a command that cannot end well."""
    tool = runpy.run_path(str(TOOL))
    index = tmp_path / "index"
    save_index(scan_folder(photographs), index)
    out = ["--out", str(tmp_path / "new")]
    cases = {
        "out is empty": [photographs, "--out", ""],
        "to_shards is empty": [photographs, *out, "--to_shards", ""],
        "give --to_shards to pack its images": [index, *out],
        "explains the numbers of --labels": [photographs, *out, "--devkit_meta", "meta.mat"],
        "the shard size is 0": [photographs, *out, "--to_shards", tmp_path / "shards", "--shard_size", "0"],
    }
    for message, arguments in cases.items():
        monkeypatch.setattr("sys.argv", ["index_dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            tool["main"]()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_the_tool_says_what_is_wrong(tmp_path: Path) -> None:
    """One sentence and a non-zero exit."""
    result = run_tool(tmp_path / "nowhere", "--out", tmp_path / "index")
    assert result.returncode == 2
    assert result.stderr.strip() == f"index_dataset: the data folder {tmp_path / 'nowhere'} does not exist."
