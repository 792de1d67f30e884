"""Fine-tuning's augmentations are timm's, and keyed by the sample alone."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from megatron_nepa.config import AugmentationConfig, ConfigError, DataConfig
from megatron_nepa.data.augmentation.timm_augmentation import RandAugmenter, _transform, erase, mix, seeded
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.classification import FinetuningLoader
from megatron_nepa.data.loaders.pretraining import Batch
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share

SEED, SIZE = 5, 32
CONFIG = AugmentationConfig(workers=0, mix_group=2)


def take(
    folder: Path,
    count: int,
    share: Share | None = None,
    config: AugmentationConfig = CONFIG,
    consumed: int = 0,
    flip: bool = True,
) -> list[Batch]:
    """Some batches of a loader over 3 classes, global batch 8."""
    share = share or Share(8, 8, 1, 0, 1, 0, 1)
    loader = FinetuningLoader(
        scan_folder(folder),
        DataConfig(horizontal_flip=flip),
        config,
        SIZE,
        3,
        Feed(share, SEED, torch.device("cpu"), torch.float32, consumed),
    )
    batches = list(islice(loader, count))
    assert loader.consumed_samples == consumed + count * share.global_batch_size // share.accumulation_steps
    loader.close()
    return batches


@pytest.fixture(scope="module")
def reference(photographs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """40 samples on one rank: images and soft targets."""
    batches = take(photographs, 5)
    assert all(batch.labels is not None for batch in batches)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize(("data_size", "tensor_size", "micro"), [(1, 1, 4), (2, 1, 2), (1, 2, 8), (2, 2, 4)])
def test_grids_see_the_same_run(
    photographs: Path, reference: tuple[torch.Tensor, torch.Tensor], data_size: int, tensor_size: int, micro: int
) -> None:
    """RandAugment, erasing noise, mixing ratios and targets do not depend on the grid."""
    images, targets = (torch.full_like(whole, torch.nan) for whole in reference)
    accumulation = 8 // (micro * data_size)
    for data_rank in range(data_size):
        for tensor_rank in range(tensor_size):
            share = Share(micro, 8, accumulation, data_rank, data_size, tensor_rank, tensor_size)
            for batch in take(photographs, 5 * accumulation, share):
                local = batch.sample_index[share.local_start :][: share.local_size]
                images[local], targets[local] = batch.images, batch.labels
    assert torch.equal(images, reference[0])
    assert torch.equal(targets, reference[1])


def test_restart_and_worker_processes_change_nothing(
    photographs: Path, reference: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Started at step 3 with a worker process, the run goes on as it was."""
    for batch in take(photographs, 2, config=replace(CONFIG, workers=1), consumed=24):
        assert torch.equal(batch.images, reference[0][batch.sample_index])
        assert torch.equal(batch.labels, reference[1][batch.sample_index])


def test_randaugment_is_timms() -> None:
    """The same policy under the same generator state gives the same picture; most pictures change."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, SIZE, SIZE, 3), dtype=np.uint8)
    samples = np.arange(100, 124)
    for policy in ("nonsense", "rand-q9"):
        with pytest.raises(ConfigError, match=f"rand_augment {policy} is no policy"):
            RandAugmenter(replace(CONFIG, rand_augment=policy), SEED)
    (future,) = RandAugmenter(CONFIG, SEED).submit(images, samples)
    options = {"translate_const": int(SIZE * 0.45), "img_mean": (128,) * 3, "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    changed = 0
    for image, sample, augmented in zip(images, samples.tolist(), future.result(), strict=True):
        with seeded(SEED, "rand_augment", sample):
            expected = np.asarray(transform(Image.fromarray(image)))
        np.testing.assert_array_equal(augmented, expected)
        changed += not np.array_equal(augmented, image)
    assert changed > 12


def test_global_generators_are_left_alone(photographs: Path) -> None:
    """A loader that augments does not disturb anyone else's draws."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    take(photographs, 2)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_mixing_and_targets() -> None:
    """Each group is mixed with itself reversed, by one ratio, and the targets say the same ratio."""
    config = replace(CONFIG, mix_group=4, cutmix=0.0, label_smoothing=0.0)
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 4, 4).clone()
    labels = torch.arange(8)
    targets = mix(images, labels, np.arange(16, 24), 8, config, SEED)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    ratios = set()
    for i in range(8):
        partner = i // 4 * 4 + 3 - i % 4
        ratio = float(targets[i, i])
        ratios.add(round(ratio, 6))
        torch.testing.assert_close(float(targets[i, partner]), 1 - ratio)
        torch.testing.assert_close(images[i], torch.full((3, 4, 4), i * ratio + partner * (1 - ratio)))
    assert len(ratios) == 2
    # CutMix: every pixel is one of the two, and the target is the share of the area
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16).clone()
    targets = mix(images, labels, np.arange(8), 8, replace(config, mixup=0.0, cutmix=1.0), SEED)
    for i in range(8):
        torch.testing.assert_close(float(targets[i, i]), float((images[i] == i).float().mean()))
    smooth = mix(images, labels, np.arange(8), 8, replace(CONFIG, mixup=0.0, cutmix=0.0), SEED)
    torch.testing.assert_close(smooth, torch.full((8, 8), 0.1 / 8) + 0.9 * torch.eye(8))


def test_erasing_share() -> None:
    """About the asked share of images lose one rectangle; the rest stay."""
    images = torch.zeros(400, 3, 16, 16)
    erase(images, np.arange(400), 0.25, SEED)
    touched = (images != 0).any(1).flatten(1).float().mean(1)
    assert 0.18 < (touched > 0).float().mean() < 0.32
    assert 0.02 < touched[touched > 0].mean() < 0.34
    noise = images[images != 0]
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


def test_plain_crops_without_augmentation(photographs: Path) -> None:
    """Everything off: the crops, their classes, no process."""
    off = AugmentationConfig(None, 0.0, 0.0, 0.0, label_smoothing=0.0)
    index = scan_folder(photographs)
    for batch in take(photographs, 2, config=off, flip=False):
        assert batch.labels is not None
        assert batch.images.abs().max() <= 1
        assert set(batch.labels.unique().tolist()) == {0.0, 1.0}
        from megatron_nepa.data.sampling.order import image_of_sample

        expected = index.label[image_of_sample(SEED, batch.sample_index.numpy(), len(index))]
        assert batch.labels.argmax(1).tolist() == expected.tolist()


def test_labels_and_groups_that_do_not_fit_are_refused(photographs: Path) -> None:
    """A flat folder, too few classes, and a group that a rank's share would cut."""
    with pytest.raises(ConfigError, match="images without a label"):
        take(photographs / "ant", 1)
    with pytest.raises(
        ConfigError, match=r"mix_group 16 does not divide the 8 images .*take --augmentation.mix_group 8"
    ):
        take(photographs, 1, config=replace(CONFIG, mix_group=16))
    with pytest.raises(ConfigError, match="mix_group is 3"):
        replace(CONFIG, mix_group=3)
    feed = Feed(Share(8, 8, 1, 0, 1, 0, 1), SEED, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="has label 2, but the classifier has 2 classes"):
        FinetuningLoader(scan_folder(photographs), DataConfig(), CONFIG, SIZE, 2, feed)


def test_the_strongest_posterisation_is_black() -> None:
    """Magnitude 10 keeps 0 bits, which newer releases of Pillow refuse."""
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    strongest = [op for op in _transform("rand-m10-inc1", 8).ops if op.name == "PosterizeIncreasing"]
    assert len(strongest) == 1
    strongest[0].prob = 1.0
    assert np.asarray(strongest[0](image)).max() == 0
