"""Fine-tuning to semantic segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_nepa.config.checks import require, require_finite
from megatron_nepa.config.finetuning import FinetuningConfig, ValidationConfig

# label of the pixels that count for nothing
IGNORED = 255


@dataclass(frozen=True)
class MaskConfig:
    """What the values of a mask mean."""

    # number of classes K
    num_classes: int = 150
    # mask value 0 is no class: it is ignored, and 1 to K are the classes (ADE20K); off, 0 to K - 1 are the classes
    reduce_zero_label: bool = True

    def __post_init__(self) -> None:
        require(
            2 <= self.num_classes <= IGNORED,
            f"masks.num_classes is {self.num_classes}; it must lie in 2 to {IGNORED} ({IGNORED} marks ignored pixels).",
        )


@dataclass(frozen=True)
class CropConfig:
    """Geometry of training crops and evaluation images (mmsegmentation's pipeline for ADE20K)."""

    # shorter side that an image is scaled to, before the random ratio; none takes the crop's side
    shorter_side: int | None = None
    # longer side that a scaled image may have, before the random ratio; none takes four times the crop's side
    longer_side: int | None = None
    # least random ratio that multiplies both in training
    ratio_min: float = 0.5
    # largest random ratio
    ratio_max: float = 2.0
    # largest share of one class in a crop, while there are tries left
    cat_max_ratio: float = 0.75

    def __post_init__(self) -> None:
        require_finite(self, "crops.")
        for name in ("shorter_side", "longer_side"):
            side = getattr(self, name)
            require(side is None or side >= 1, f"crops.{name} is {side}; it must be at least 1.")
        require(
            0 < self.ratio_min <= self.ratio_max,
            f"crops.ratio_min is {self.ratio_min} and crops.ratio_max {self.ratio_max}; they must be a rising range "
            "of positive numbers.",
        )
        require(0 < self.cat_max_ratio <= 1, f"crops.cat_max_ratio is {self.cat_max_ratio}; it must lie in (0, 1].")

    def scale(self, crop_size: int) -> tuple[int, int]:
        """The longer and the shorter side that an image is scaled into, for square crops of ``crop_size``."""
        return self.longer_side or 4 * crop_size, self.shorter_side or crop_size


@dataclass(frozen=True)
class SegmentationEvaluationConfig(ValidationConfig):
    """On what, how often and how a segmentation run is evaluated."""

    # windows of the crop's side that slide over the image (slide), or the whole image at once (whole)
    inference: Literal["slide", "whole"] = "slide"
    # pixels from one window to the next; none takes two thirds of the crop's side
    stride: int | None = None
    # images, spread over the validation set, that are drawn with their labels and predictions
    overlays: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.stride is None or self.stride >= 1, f"evaluation.stride is {self.stride}; it must be at least 1.")
        require(self.overlays >= 0, f"evaluation.overlays is {self.overlays}; it must not be negative.")

    def window_stride(self, crop_size: int) -> int:
        """Pixels from one window of the crop's side to the next."""
        return self.stride or max(1, 2 * crop_size // 3)


@dataclass(frozen=True)
class SegmentationConfig(FinetuningConfig):
    """Fine-tuning to semantic segmentation with UPerNet (paper section 4.3); crops have the side model.image_size."""

    masks: MaskConfig = field(default_factory=MaskConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    evaluation: SegmentationEvaluationConfig = field(default_factory=SegmentationEvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        evaluated = self.evaluation.data is not None  # elsewhere a flag for it would be refused as ignored
        require(
            not evaluated or self.window_stride <= self.model.image_size,
            f"evaluation.stride {self.window_stride} leaves gaps between windows of model.image_size "
            f"{self.model.image_size}: choose at most that.",
        )
        require(
            not evaluated or self.evaluation.inference == "slide" or self.model.position_embedding == "none",
            f"learned positions serve images of model.image_size {self.model.image_size} alone: keep "
            "--evaluation.inference slide.",
        )

    @property
    def window_stride(self) -> int:
        """Pixels from one evaluation window to the next."""
        return self.evaluation.window_stride(self.model.image_size)
