"""The preview shows what training sees, and its summary counts right."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nepa.analysis.data_summary import DataSummary
from megatron_nepa.analysis.preview import first_samples
from megatron_nepa.config import ConfigError, RunConfig
from megatron_nepa.data.index.folder import read_sizes, scan_folder
from megatron_nepa.data.index.mixture import Mixture, Source
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.loaders.pretraining import PretrainingLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.recipes import CLASSIFICATION_RECIPES, PRETRAINING_RECIPES, PROBING_RECIPES, SEGMENTATION_RECIPES

TOOL = Path(__file__).parents[2] / "tools/preview_data.py"
SIZES = [(90, 60), (60, 90), (200, 50), (40, 40), (120, 80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 10 and 5 images in 5 sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(15):
        width, height = SIZES[number % 5]
        target = root / ("ant" if number % 3 else "bee") / f"{number:02d}.jpg"
        target.parent.mkdir(exist_ok=True)
        pixels = np.kron(rng.integers(0, 255, (height // 10, width // 10, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
        Image.fromarray(pixels).save(target, quality=95)
    return root


def small(run: RunConfig) -> RunConfig:
    """The recipe with images of 32 and patches of 8."""
    return replace(run, model=replace(run.model, image_size=32, patch_size=8))


def test_pixels_are_the_training_loaders(folder: Path) -> None:
    """What is shown as seen is what a run's own loader delivers, of another micro-batch."""
    run = small(PRETRAINING_RECIPES["nepa_b_release"]())
    index = scan_folder(folder)
    feed = Feed(Share(2, 4, 2, 0, 1, 0, 1), run.seed, torch.device("cpu"), torch.float32)
    loader = PretrainingLoader(index, run.data, 32, feed)
    expected = torch.cat([batch.images for batch in islice(loader, 3)])
    loader.close()
    samples = first_samples(run, index, 6)
    assert [sample.number for sample in samples] == list(range(6))
    for sample, pixels in zip(samples, expected, strict=True):
        seen = torch.from_numpy(sample.seen).permute(2, 0, 1).float()
        assert torch.allclose(seen, pixels * 127.5 + 127.5, atol=0.51)
        with Image.open(folder / sample.name) as stored:
            assert np.array_equal(sample.original, np.asarray(stored.convert("RGB")))
        assert sample.target.startswith(sample.name.split("/")[0])
        # the framed region, scaled, is the picture but for the filter
        assert sample.box is not None
        x, y, width, height = sample.box
        crop = Image.fromarray(sample.original[y : y + height, x : x + width]).resize(
            (32, 32), Image.Resampling.BILINEAR
        )
        framed = np.asarray(crop)[:, ::-1] if sample.target.endswith("mirrored") else np.asarray(crop)
        assert np.abs(framed.astype(int) - sample.seen).mean() < 1
    assert len({sample.target.endswith("mirrored") for sample in samples}) == 2


def test_masked_patches_are_grey(folder: Path) -> None:
    run = small(PRETRAINING_RECIPES["nepa_b"]())
    masked = replace(run, objective=replace(run.objective, mask_ratio=0.5))  # type: ignore[attr-defined]
    index = scan_folder(folder)
    for plain, covered in zip(first_samples(run, index, 3), first_samples(masked, index, 3), strict=True):
        grey = (covered.seen == 128).all(axis=2).reshape(4, 8, 4, 8).all(axis=(1, 3))
        assert grey.sum() == 8
        seen = ~grey.repeat(8, axis=0).repeat(8, axis=1)
        assert np.array_equal(covered.seen[seen], plain.seen[seen])


@pytest.mark.parametrize(("recipe", "visible"), [("mae_b", 9), ("jepa_b", 9), ("aim_b", 36)])
def test_patches_that_the_trunk_does_not_see_are_grey(recipe: str, visible: int, folder: Path) -> None:
    run = PRETRAINING_RECIPES[recipe]()
    run = replace(run, model=replace(run.model, image_size=48, patch_size=8))
    index = scan_folder(folder)
    samples = first_samples(run, index, 3)
    grey = [(sample.seen == 128).all(axis=2).reshape(6, 8, 6, 8).all(axis=(1, 3)) for sample in samples]
    assert [36 - int(hidden.sum()) for hidden in grey] == [visible] * 3
    if visible < 36:
        assert not np.array_equal(grey[0], grey[1])  # each sample's own


def test_soft_targets_and_augmentation(folder: Path) -> None:
    """Fine-tuning: mixing groups are the run's, so that a sample's target does not depend on how many are shown."""
    run = small(CLASSIFICATION_RECIPES["imagenet_ft_b"]())
    index = scan_folder(folder)
    few, many = first_samples(run, index, 3), first_samples(run, index, 9)
    for one, other in zip(few, many, strict=False):
        assert one.target == other.target
        assert np.array_equal(one.seen, other.seen)
    assert all("ant" in sample.target or "bee" in sample.target for sample in few)


def test_a_probe_has_hard_targets(folder: Path) -> None:
    probe = first_samples(small(PROBING_RECIPES["imagenet_probe_b"]()), scan_folder(folder), 2)
    assert all(sample.target.startswith("1.00 ") for sample in probe)


def test_segmentation_shows_the_labels(tmp_path: Path) -> None:
    """Half of each image is of class 0 and half of class 1: two colours, and the text says so."""
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    for i in range(4):
        Image.new("RGB", (80, 60), (200, 200, 200)).save(tmp_path / f"images/{i}.jpg")
        labels = np.ones((60, 80), np.uint8)
        labels[:, 40:] = 2
        Image.fromarray(labels).save(tmp_path / f"annotations/{i}.png")
    run = small(SEGMENTATION_RECIPES["ade20k_upernet_b"]())
    index = read_sizes(list_source(tmp_path))
    for sample in first_samples(run, index, 2):
        assert sample.box is None
        assert len(np.unique(sample.original.reshape(-1, 3), axis=0)) == 2
        assert "classes in " in sample.target


def test_the_summary_counts(folder: Path) -> None:
    (folder / "ant/broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    try:
        summary = DataSummary.of(scan_folder(folder), 50)
    finally:
        (folder / "ant/broken.jpg").unlink()
    assert (summary.images, summary.left_out) == (15, 1)
    assert summary.per_class.tolist() == [10, 5]
    assert summary.odd() == {
        "smaller than the crops of 50": 3,
        "more than 3 times as long as wide": 3,
        "without a label": 0,
    }
    assert summary.size.sum() == sum(file.stat().st_size for file in folder.glob("*/*.jpg"))
    text = "\n".join(summary.lines())
    assert "15 images" in text
    assert "1 left out" in text
    assert "classes: 2, of 5 to 10 images (median 8)" in text
    assert "width: 40 to 200 pixels, median 90" in text
    assert "odd: 20.00% smaller than the crops of 50, 20.00% more than 3 times" in text


def test_large_sets_are_looked_at_evenly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_nepa.analysis.data_summary._MOST_READ", 5)
    summary = DataSummary.of(scan_folder(folder), 50)
    assert (summary.images, summary.looked_at) == (15, 5)
    assert "classes: of 5 evenly spread ones: 2" in "\n".join(summary.lines())


def test_no_samples_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--count is 0; it must be at least 1"):
        first_samples(PRETRAINING_RECIPES["quickstart"](), scan_folder(folder), 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "sheet.jpg"], "is no PNG file: give a name that ends in .png."),
        (["--out", "nowhere/sheet.png"], "there is no folder nowhere."),
        (["--out", "sheet.png", "--recipe", "nepa_x"], "--recipe nepa_x is unknown; there are quickstart, nepa_b"),
        (["--out", "sheet.png", "--seeed", "1"], "--seeed"),
    ],
)
def test_the_tool_refuses_in_a_sentence(
    arguments: list[str],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["preview_data.py", str(folder), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_tool_draws(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    flags = ["--out", str(sheet), "--count", "5", "--objective.mask_ratio", "0.4"]
    monkeypatch.setattr(sys, "argv", ["preview_data.py", str(folder), *flags])
    runpy.run_path(str(TOOL), run_name="__main__")
    assert "15 images" in capsys.readouterr().out
    with Image.open(sheet) as drawn:
        assert drawn.width > 1500


def test_a_mixture_is_shown_by_source(folder: Path, tmp_path: Path) -> None:
    """What the loader of a run on it delivers, under the names of the sources; its figures are of all images."""
    run = small(PRETRAINING_RECIPES["nepa_b_release"]())
    few = replace(scan_folder(folder).select(np.arange(4)))
    mixture = Mixture((Source("many", scan_folder(folder), 6000), Source("few", few, 4000)))
    feed = Feed(Share(5, 5, 1, 0, 1, 0, 1), run.seed, torch.device("cpu"), torch.float32)
    loader = PretrainingLoader(mixture, run.data, 32, feed)
    expected = next(loader).images
    loader.close()
    samples = first_samples(run, mixture, 5)
    for sample, pixels in zip(samples, expected, strict=True):
        seen = torch.from_numpy(sample.seen).permute(2, 0, 1).float()
        assert (seen - (pixels * 127.5 + 127.5)).abs().max() <= 0.5
    assert {sample.name.partition(": ")[0] for sample in samples} == {"many", "few"}
    summary = DataSummary.joined([DataSummary.of(source.index, 32) for source in mixture.sources])
    assert (summary.images, summary.looked_at, len(summary.width), summary.classes) == (19, 19, 19, ())


def test_a_mixture_is_for_pretraining(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"{folder}/ant=0.5,{folder}/bee=0.5"
    monkeypatch.setattr(
        sys, "argv", ["preview_data", data, "--recipe=imagenet_ft_b", f"--out={tmp_path / 'sheet.png'}"]
    )
    with pytest.raises(ConfigError, match="is a mixture of sets, which pre-training alone draws from, not --recipe"):
        runpy.run_path(str(TOOL))["main"]()
