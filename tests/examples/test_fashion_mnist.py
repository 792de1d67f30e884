"""The Fashion-MNIST example: its data from idx files, the fractions of labels, the table and the plot."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.fashion_mnist import data, report
from megatron_nepa.config import ConfigError
from megatron_nepa.data.index.index_file import load_index


def write_idx(path: Path, values: np.ndarray) -> None:
    header = np.array([8 << 8 | values.ndim, *values.shape], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of the same layout with 1,000 training and 10 test images."""
    monkeypatch.setattr(data, "SPLITS", {"train": ("train", 1000), "test": ("t10k", 10)})
    folder = tmp_path / "source"
    folder.mkdir()
    for prefix, count in (("train", 1000), ("t10k", 10)):
        images = np.broadcast_to((np.arange(count) % 10 * 20).astype(np.uint8)[:, None, None], (count, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", np.ascontiguousarray(images))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return folder


def test_images_labels_and_fractions(source: Path, tmp_path: Path) -> None:
    data.prepare(source, tmp_path / "data")
    sizes = {"train": 1000, "train_10": 100, "train_1": 10, "test": 10}
    for name, size in sizes.items():
        index = load_index(tmp_path / "data" / f"{name}.index")
        assert len(index) == size
        assert index.classes == data.CLASSES
        assert np.bincount(index.label).tolist() == [size // 10] * 10  # every class alike
        for row in (0, size - 1):
            pixels = np.asarray(Image.open(index.where(row)))
            assert pixels.shape == (28, 28)
            assert abs(float(pixels.mean()) - 20 * int(index.label[row])) < 2
    before = (tmp_path / "data/test.index/index.json").stat().st_mtime_ns
    data.prepare(source, tmp_path / "data")  # once
    assert (tmp_path / "data/test.index/index.json").stat().st_mtime_ns == before


def test_what_is_not_the_data_set_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"install Debian.s package"):
        data.prepare(tmp_path / "nowhere", tmp_path / "data")
    write_idx(source / "train-labels-idx1-ubyte.gz", np.zeros(7, np.uint8))
    with pytest.raises(ConfigError, match=r"\(7,\) values, not the \(1000,\)"):
        data.prepare(source, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]  # nothing half-made is left


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [(1, True, 0.80), (1, True, 0.82), (1, False, 0.70), (1, False, 0.70), (10, True, 0.9), (10, False, 0.89)]
    report.write_report(results, tmp_path, minutes=3.0)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[2] == "| 1 % (600) | 70.00 ± 0.00 | 81.00 ± 1.41 | +11.00 |"
    assert table[3].startswith("| 10 % (6,000) | 89.00")
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md", "accuracy.png"}
    assert "3 minutes" in capsys.readouterr().out
