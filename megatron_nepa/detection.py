"""Object detection and instance segmentation: a plain Vision Transformer under torchvision's Mask R-CNN.

The neck is ViTDet's simple feature pyramid (Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object
Detection"): every level comes from the trunk's last map alone.

    trunk = timm.create_model("local-dir:nepa_b_timm", pretrained=True, patch_size=16, dynamic_img_size=True,
                              causal=False, num_classes=0)
    model = mask_rcnn(trunk, num_classes=91)
"""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from megatron_nepa.config import require
from megatron_nepa.timm import NepaVisionTransformer


class SimpleFeaturePyramid(nn.Module):
    """Four levels at 4, 2, 1 and 1/2 times a map's size, and one of half the last.

    Args:
        width: channels D of the map.
        out_channels: channels of every level.
    """

    def __init__(self, width: int, out_channels: int = 256) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        scalings: list[tuple[list[nn.Module], int]] = [
            (
                [
                    nn.ConvTranspose2d(width, half, kernel_size=2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(width, half, kernel_size=2, stride=2)], half),
            ([], width),
            ([nn.MaxPool2d(2)], width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scaling,
                nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for scaling, channels in scalings
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """A map [B, D, h, w] to the levels "0" to "3" and "pool", each [B, out_channels, ...], the finest first."""
        found = {str(i): level(x) for i, level in enumerate(self.levels)}
        return found | {"pool": nn.functional.max_pool2d(found["3"], kernel_size=1, stride=2)}


class PyramidBackbone(nn.Module):
    """A trunk and its pyramid, as torchvision's detectors take a backbone.

    Args:
        trunk: of ``timm.create_model`` with ``dynamic_img_size=True`` and a patch size that is a power of 2.
        out_channels: channels of every level.

    Raises:
        ConfigError: for another trunk.
    """

    def __init__(self, trunk: NepaVisionTransformer, out_channels: int = 256) -> None:
        super().__init__()
        patch = trunk.patch_embed.patch_size[0]
        require(
            patch & (patch - 1) == 0,
            f"the trunk has patches of {patch} pixels, but torchvision rounds every level's stride to a power of 2 and "
            "would cut boxes from other places: create it with patch_size=16, to which timm resamples it.",
        )
        require(
            trunk.dynamic_img_size,
            "the trunk serves one image size, and detectors show it many: create it with dynamic_img_size=True.",
        )
        self.trunk = trunk
        self.pyramid = SimpleFeaturePyramid(trunk.embed_dim, out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W], sides multiples of the patch's, to the levels of the pyramid."""
        (last,) = self.trunk.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        levels: dict[str, Tensor] = self.pyramid(last)
        return levels


def mask_rcnn(trunk: NepaVisionTransformer, num_classes: int, out_channels: int = 256, **settings: Any) -> MaskRCNN:
    """torchvision's Mask R-CNN on a trunk, whose heads and pyramid are new.

    It takes a list of images in [0, 1] of any size, and in training a target for each: boxes [n, 4], labels [n], masks
    [n, H, W].

    Args:
        trunk: as of :class:`PyramidBackbone`.
        num_classes: with the background, which is class 0.
        out_channels: channels of the pyramid.
        **settings: of ``torchvision.models.detection.MaskRCNN``, such as min_size and max_size.

    Raises:
        ConfigError: for a trunk that detectors cannot use.
    """
    backbone = PyramidBackbone(trunk, out_channels)
    defaults: dict[str, Any] = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        # of the coarsest level that pools two patches into one
        "size_divisible": 2 * trunk.patch_embed.patch_size[0],
    }
    return MaskRCNN(backbone, num_classes, **{**defaults, **settings})
