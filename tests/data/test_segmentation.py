"""Image and mask stay aligned through scale, crop and flip; evaluation sees whole images."""

from __future__ import annotations

import colorsys
import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_nepa.config import IGNORED, ConfigError, CropConfig, DataConfig, MaskConfig
from megatron_nepa.data.augmentation.photometric import _saturate_and_turn, distort
from megatron_nepa.data.decoding.masks import check_masks, choose_crop, load_mask, scaled_size
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.pairs import class_names, pair_index
from megatron_nepa.data.index.sources import open_source
from megatron_nepa.data.indexing.build import build_and_save_index
from megatron_nepa.data.loaders import segmentation as module
from megatron_nepa.data.loaders.pretraining import Batch
from megatron_nepa.data.loaders.segmentation import SegmentationLoader, evaluate_segmentation
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.order import image_of_sample
from megatron_nepa.data.sampling.rank_share import Share

SEED, CPU = 3, torch.device("cpu")
CROPS, MASKS, SIDE = CropConfig(shorter_side=96, longer_side=256), MaskConfig(num_classes=4), 64
NAMES = tuple("abcde")
COLOURS = np.array([[0, 0, 0], [220, 30, 30], [30, 200, 60], [40, 60, 230], [230, 220, 40]], np.uint8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    """11 images in which every class has its colour, in patches of some 15 pixels; class 0 is no class."""
    root = tmp_path_factory.mktemp("pairs")
    for folder in ("images", "annotations"):
        (root / folder / "training").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(11):
        width, height = int(rng.integers(90, 220)), int(rng.integers(90, 220))
        coarse = rng.integers(0, 5, (-(-height // 15), -(-width // 15)), dtype=np.uint8)
        labels = np.kron(coarse, np.ones((15, 15), np.uint8))[:height, :width]
        Image.fromarray(labels).save(root / "annotations" / "training" / f"{number:02d}.png")
        picture = Image.fromarray(COLOURS[labels])
        picture.save(root / "images" / "training" / f"{number:02d}.jpg", quality=95, subsampling=0)
    return build_and_save_index(open_source(root), root / "index", "header", workers=1, progress=False)


def take(
    index: DatasetIndex, count: int, share: Share | None = None, consumed: int = 0, threads: int = 2
) -> list[Batch]:
    """Some training batches, global batch 8."""
    share = share or Share(8, 8, 1, 0, 1, 0, 1)
    feed = Feed(share, SEED, CPU, torch.float32, consumed)
    loader = SegmentationLoader(index, DataConfig(num_threads=threads), CROPS, MASKS, SIDE, feed)
    batches = list(islice(loader, count))
    loader.close()
    return batches


def join(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Images and labels of all batches."""
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_labels_follow_the_pixels(pairs: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from borders between classes, the pixel's colour is its label's, mirrored or not; padding is ignored."""
    monkeypatch.setattr(module, "distort", lambda images, samples, seed: images)
    images, labels = join(take(pairs, 6))
    pixels = ((images + 1) * 127.5).round()
    centres = torch.from_numpy(COLOURS).float()
    nearest = (pixels[:, None] - centres[None, :, :, None, None]).square().sum(2).argmin(1)  # [n, S, S]
    known = labels != IGNORED
    assert known.float().mean() > 0.5
    assert (nearest[known] == labels[known] + 1).float().mean() > 0.93
    shifted = torch.roll(nearest, 4, dims=2)
    assert (shifted[known] == labels[known] + 1).float().mean() < 0.9  # the measure notices four pixels
    assert set(labels.unique().tolist()) == {0, 1, 2, 3, IGNORED}
    # an image smaller than the crop leaves the right and bottom empty: exact zeros, ignored
    padded = (labels[:, -1, -1] == IGNORED) & (images[:, :, -1, -1] == 0).all(1)
    assert 0 < padded.sum() < len(images)


def test_pixels_match_resize_then_crop(pairs: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's resize of the whole image, cropped where the labels were cropped."""
    monkeypatch.setattr(module, "distort", lambda images, samples, seed: images)
    monkeypatch.setattr(module, "flips", lambda seed, samples: np.zeros(len(samples), bool))
    crops: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def recording(mask: np.ndarray, size: np.ndarray, *rest: object) -> tuple[np.ndarray, np.ndarray]:
        corner, crop = choose_crop(mask, size, *rest)  # type: ignore[arg-type]
        crops.append((mask, size, corner))
        return corner, crop

    monkeypatch.setattr(module, "choose_crop", recording)
    share = Share(1, 1, 1, 0, 1, 0, 1)
    images, labels = join(take(pairs, 12, share, threads=1))  # one thread, so that the record is in order
    of_mask = {load_mask(pairs, i, MASKS).tobytes(): i for i in range(len(pairs))}
    differences = []
    for image, label, (mask, size, corner) in zip(images, labels, crops, strict=False):
        with Image.open(pairs.where(of_mask[mask.tobytes()])) as picture:
            scaled = np.asarray(picture.resize((int(size[1]), int(size[0])), Image.Resampling.BILINEAR), np.float32)
        y, x = corner
        expected = scaled[y : y + 64, x : x + 64].transpose(2, 0, 1)
        height, width = expected.shape[1:]
        differences.append(np.abs((image.numpy()[:, :height, :width] + 1) * 127.5 - expected).ravel())
        assert (label[height:] == IGNORED).all()
        assert (label[:, width:] == IGNORED).all()
    assert np.concatenate(differences).mean() < 0.6
    assert np.concatenate(differences).max() <= 20


@pytest.mark.parametrize(("data_size", "tensor_size", "micro"), [(2, 1, 2), (1, 2, 4), (2, 2, 1)])
def test_grids_and_restarts_see_the_same_run(pairs: DatasetIndex, data_size: int, tensor_size: int, micro: int) -> None:
    """Scale, crop, flip and distortion belong to the sample."""
    images, labels = join(take(pairs, 3))
    for data_rank in range(data_size):
        for tensor_rank in range(tensor_size):
            accumulation = 8 // (micro * data_size)
            share = Share(micro, 8, accumulation, data_rank, data_size, tensor_rank, tensor_size)
            for batch in take(pairs, 2 * accumulation, share, consumed=8):
                local = batch.sample_index[share.local_start :][: share.local_size]
                assert torch.equal(batch.images, images[local])
                assert torch.equal(batch.labels, labels[local])


def test_crops_avoid_a_dominant_class() -> None:
    """With tries left, a crop of one class is refused; without, the last one is taken."""
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 60:] = 1
    size = np.array([100, 100])
    draws = np.array([[0.1, 0.0], [0.5, 0.99], [0.3, 0.62]])  # all 0, all 1, both
    corner, crop = choose_crop(mask, size, draws, 20, 0.75)
    assert corner.tolist() == [24, 50]
    assert crop.mean() == 0.5
    corner, crop = choose_crop(mask, size, draws[:2], 20, 0.75)
    assert (crop == 1).all()
    mask[:] = IGNORED  # ignored pixels are no class
    mask[:50] = 2
    corner, _ = choose_crop(mask, size, draws, 20, 0.75)
    assert corner.tolist() == [24, 50]


def test_scaled_size() -> None:
    """mmcv's rule: into 2048 x 512, whichever side binds, times the ratio."""
    width, height = np.array([683, 512, 3000, 100]), np.array([512, 683, 300, 100])
    assert scaled_size(width, height, (2048, 512), np.ones(4)).tolist() == [
        [512, 683],
        [683, 512],
        [205, 2048],
        [512, 512],
    ]
    assert scaled_size(width[:1], height[:1], (2048, 512), np.array([0.5])).tolist() == [[256, 342]]


def test_saturation_and_hue_are_hsvs() -> None:
    """Against Python's own HSV conversion."""
    rng = np.random.default_rng(1)
    pixels = rng.random((1, 3, 8, 8)).astype(np.float32)
    pixels[0, :, 0, 0] = 0.4  # grey
    for factor, degrees in ((1.0, 0.0), (0.5, 0.0), (1.4, 0.0), (1.0, 30.0), (1.3, -25.0)):
        ours = _saturate_and_turn(torch.from_numpy(pixels) * 255, torch.tensor(factor), torch.tensor(degrees)) / 255
        for y in range(8):
            for x in range(8):
                hue, saturation, value = colorsys.rgb_to_hsv(*pixels[0, :, y, x].tolist())
                expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(saturation * factor, 1), value)
                np.testing.assert_allclose(ours[0, :, y, x].numpy(), expected, atol=2e-5)


def test_distortion_is_moderate_and_keyed() -> None:
    """One image in sixteen stays as it is, none leaves its range, and each belongs to its sample."""
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(640, 3, 8, 8)
    samples = torch.arange(640)
    result = distort(image, samples, SEED)
    same = (result == image).flatten(1).all(1).float().mean()
    assert 0.03 < same < 0.10
    assert result.min() >= 0
    assert result.max() <= 255
    assert torch.equal(distort(image[:5], samples[100:105], SEED), result[100:105])


@pytest.mark.parametrize("data_size", [1, 3])
def test_evaluation_sees_whole_images_once(pairs: DatasetIndex, data_size: int) -> None:
    """Each image scaled with its shape kept, labels at their own size."""
    seen: list[int] = []
    rounds = set()
    for rank in range(data_size):
        place = (rank, data_size, CPU, torch.float32)
        items = list(evaluate_segmentation(pairs, DataConfig(), CROPS, MASKS, SIDE, *place))
        rounds.add(len(items))
        for item in items:
            i = item.image_index
            assert item.labels.shape == (pairs.height[i], pairs.width[i])
            size = scaled_size(pairs.width[i : i + 1], pairs.height[i : i + 1], CROPS.scale(SIDE), np.ones(1))[0]
            assert item.images.shape == (1, 3, *size)
            with Image.open(pairs.where(i)) as picture:
                scaled = np.asarray(picture.resize((int(size[1]), int(size[0])), Image.Resampling.BILINEAR), np.float32)
            assert np.abs((item.images[0].numpy() + 1) * 127.5 - scaled.transpose(2, 0, 1)).mean() < 0.6
            seen += [i] * item.valid
    assert len(rounds) == 1
    assert sorted(seen) == list(range(len(pairs)))


def test_bad_pairs_are_named(pairs: DatasetIndex, photographs: Path, tmp_path: Path) -> None:
    """No masks, a coloured mask, a mask of another size."""
    with pytest.raises(ConfigError, match="has no masks"):
        take(scan_folder(photographs), 1)
    index = DatasetIndex(tmp_path, pairs.names, pairs.width, pairs.height, pairs.label, masks=pairs.masks)
    mask = tmp_path / pairs.masks[0]
    mask.parent.mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(mask)
    with pytest.raises(UnreadableImageError, match="pixels of mode RGB, not one label each"):
        load_mask(index, 0, MASKS)
    Image.new("L", (5, 6)).save(mask)
    with pytest.raises(UnreadableImageError, match=r"its mask annotations/training/00.png 5 x 6"):
        load_mask(index, 0, MASKS)
    with pytest.raises(UnreadableImageError, match="cannot be read"):
        load_mask(index, 1, MASKS)


def test_bad_pairs_are_replaced(pairs: DatasetIndex, tmp_path: Path) -> None:
    """A damaged image, a damaged mask and a vanished one give way to the same pairs on every grid; evaluation stops."""
    shutil.copytree(pairs.root, tmp_path / "data")
    index, log = replace(pairs, root=tmp_path / "data"), tmp_path / "bad_images.jsonl"
    image, mask, gone = index.root / index.names[2], index.root / index.masks[5], index.root / index.masks[9]
    image.write_bytes(image.read_bytes()[:700])  # header kept, no pixel left
    mask.write_bytes(mask.read_bytes()[:60])
    gone.unlink()
    share = Share(8, 8, 1, 0, 1, 0, 1)
    feed = Feed(share, SEED, CPU, torch.float32, bad_image_log=log)
    loader = SegmentationLoader(index, DataConfig(), CROPS, MASKS, SIDE, feed)
    images, labels = join(list(islice(loader, 2)))  # 16 samples: an epoch of 11 and a half
    assert loader.num_bad_images >= 3
    loader.close()

    samples = np.arange(16)
    shown = image_of_sample(SEED, samples, len(index))
    replaced = np.isin(shown, [2, 5, 9])
    whole_images, whole_labels = join(take(pairs, 2))
    assert torch.equal(images[~replaced], whole_images[~replaced])
    assert torch.equal(labels[~replaced], whole_labels[~replaced])
    assert not any(torch.equal(images[k], whole_images[k]) for k in np.flatnonzero(replaced))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    of_bad = {(row["sample"], row["image"]) for row in rows if row["sample"] < 16}
    assert of_bad >= set(zip(samples[replaced].tolist(), shown[replaced].tolist(), strict=True))
    reasons = " ".join(row["reason"] for row in rows)
    assert all(name in reasons for name in (index.names[2], index.masks[5], index.masks[9]))

    for rank in range(2):  # another grid, restarted within the first epoch
        for batch in take(index, 2, Share(2, 8, 2, rank, 2, 0, 1), consumed=8):
            assert torch.equal(batch.images, images[batch.sample_index])
            assert torch.equal(batch.labels, labels[batch.sample_index])

    loader = SegmentationLoader(
        index, DataConfig(on_bad_image="fail"), CROPS, MASKS, SIDE, Feed(share, SEED, CPU, torch.float32)
    )
    with pytest.raises(ConfigError, match=r"cannot be decoded.*data.on_bad_image is fail"):
        list(islice(loader, 2))
    loader.close()
    with pytest.raises(ConfigError, match=r"(02|05|09).*cannot be (decoded|evaluated)"):
        list(evaluate_segmentation(index, DataConfig(), CROPS, MASKS, SIDE, 0, 1, CPU, torch.float32))


def test_values_that_are_no_class_are_named(pairs: DatasetIndex) -> None:
    """A mask of four classes against two, and value 0 as a class; a share of unusable masks may be allowed."""
    check_masks(pairs, MASKS, 0.0, NAMES)
    with pytest.raises(ConfigError, match=r"holds the value [34], but the classes are 1 to 2"):
        check_masks(pairs, MaskConfig(num_classes=2), 0.0, NAMES)
    with pytest.raises(ConfigError, match="holds the value 4, but the classes are 0 to 3"):
        check_masks(pairs, MaskConfig(num_classes=4, reduce_zero_label=False), 0.0, NAMES)
    assert load_mask(pairs, 0, MaskConfig(num_classes=5, reduce_zero_label=False)).max() == 4
    wrong = replace(pairs, width=np.where(np.arange(11) == 7, 1, pairs.width).astype(np.int32))
    check_masks(wrong, MASKS, 0.1, NAMES)
    with pytest.raises(ConfigError, match=r"1 of 11 .*; the first: .*07.jpg is 1 x \d+, its mask"):
        check_masks(wrong, MASKS, 0.0, NAMES)


def test_folders_of_pairs(pairs: DatasetIndex, tmp_path: Path) -> None:
    """ADE20K's layout by split, and images/ with annotations/ without splits; class names from a file or numbers."""
    assert len(pair_index(str(pairs.root), "training")) == 11
    with pytest.raises(ConfigError, match="holds no images/validation"):
        pair_index(str(pairs.root), "validation")
    for folder in ("images", "annotations"):
        (tmp_path / folder).symlink_to(pairs.root / folder / "training")
    flat = pair_index(str(tmp_path), "validation")
    assert len(flat) == 11
    assert flat.masks[3] == "annotations/03.png"
    assert np.array_equal(load_mask(flat, 3, MASKS), load_mask(pairs, 3, MASKS))

    assert class_names(tmp_path, MaskConfig(num_classes=3)) == ("class 0", "class 1", "class 2")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tdoor;double door \n")
    assert class_names(tmp_path, MaskConfig(num_classes=2)) == ("wall", "door")
    (tmp_path / "classes.txt").write_text("sky\ngrass\n")
    assert class_names(tmp_path, MaskConfig(num_classes=2)) == ("sky", "grass")
    with pytest.raises(ConfigError, match="names 2 classes"):
        class_names(tmp_path, MaskConfig(num_classes=3))
