"""Windows over an image: a model that works pixel by pixel must not notice them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_nepa.models.sliding_window import sliding_window_logits, whole_image_logits, window_starts


def pixelwise(image: Tensor) -> Tensor:
    """A known function of each pixel alone, [1, 3, h, w] to [1, 2, h, w]."""
    return torch.stack((image.sum(1), image.prod(1)), dim=1)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (20, 53), (47, 31), (12, 41), (7, 9)])
def test_windows_equal_the_direct_computation(height: int, width: int) -> None:
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sliding_window_logits(pixelwise, image, 20, 13), pixelwise(image))
    torch.testing.assert_close(whole_image_logits(pixelwise, image, 14), pixelwise(image))


def test_overlaps_are_averaged() -> None:
    """A model that numbers its calls: each pixel holds the mean number of the windows that cover it."""
    calls: list[tuple[int, ...]] = []

    def numbering(image: Tensor) -> Tensor:
        calls.append(tuple(image.shape))
        return torch.full((1, 1, *image.shape[2:]), float(len(calls)))

    logits = sliding_window_logits(numbering, torch.zeros(1, 3, 4, 9), window=4, stride=3)
    assert calls == [(1, 3, 4, 4)] * 3  # at 0, 3 and 5
    assert logits[0, 0, 0].tolist() == [1, 1, 1, 1.5, 2, 2.5, 2.5, 3, 3]


def test_models_see_padded_images() -> None:
    """Images smaller than a window, or no multiple of the patch, are padded with zeros at the right and bottom."""
    seen: list[Tensor] = []

    def recording(image: Tensor) -> Tensor:
        seen.append(image)
        return image[:, :1]

    image = torch.ones(1, 3, 10, 15)
    assert sliding_window_logits(recording, image, 14, 14).shape == (1, 1, 10, 15)
    assert whole_image_logits(recording, image, 14).shape == (1, 1, 10, 15)
    assert [tuple(x.shape[2:]) for x in seen] == [(14, 14), (14, 14), (14, 28)]
    assert seen[2].sum() == image.sum()


def test_windows_cover_a_side() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(854, 512, 341) == [0, 341, 342]
    for length, window, stride in ((10, 20, 5), (20, 5, 6), (20, 5, 0)):
        with pytest.raises(ValueError, match="do not cover"):
            window_starts(length, window, stride)
