"""A trunk's weights for another patch size or image size."""

from __future__ import annotations

import torch
from torch import nn

from megatron_nepa.models.resampling import resample_patch_kernel, resample_positions

GENERATOR = torch.Generator().manual_seed(0)


def test_larger_patches_keep_their_embedding() -> None:
    """The enlarged patch under the new kernel has the embedding of the patch under the old one."""
    weight = torch.randn(5, 3, 14, 14, generator=GENERATOR)
    patches = torch.randn(7, 3, 14, 14, generator=GENERATOR)
    enlarged = nn.functional.interpolate(patches, (16, 16), mode="bilinear")
    new = resample_patch_kernel(weight, 16)
    assert new.shape == (5, 3, 16, 16)
    torch.testing.assert_close(
        nn.functional.conv2d(enlarged, new), nn.functional.conv2d(patches, weight), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(resample_patch_kernel(weight, 14), weight)
    assert resample_patch_kernel(weight, 8).shape == (5, 3, 8, 8)


def test_positions_follow_the_grid() -> None:
    """A smooth field stays the same field; prefix tokens stay as they are; rows and columns are not confused."""

    def field(grid: int) -> torch.Tensor:
        centres = (torch.arange(grid) + 0.5) / grid
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        return torch.stack((rows, columns**2), dim=-1).flatten(0, 1)  # [grid**2, 2]

    bos = torch.tensor([[9.0, -9.0]])
    resampled = resample_positions(torch.cat((bos, field(16))), 16, 37)
    assert torch.equal(resampled[:1], bos)
    inner = field(37).view(37, 37, 2)[4:-4, 4:-4]  # at the border the interpolation repeats the last position
    torch.testing.assert_close(resampled[1:].view(37, 37, 2)[4:-4, 4:-4], inner, rtol=0, atol=6e-3)
    assert torch.equal(resample_positions(field(4), 4, 4), field(4))
