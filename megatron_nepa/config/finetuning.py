"""What training on top of a pre-trained trunk configures besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_nepa.config.checks import require, require_finite
from megatron_nepa.config.model import ModelConfig
from megatron_nepa.config.run import RunConfig

CROP_SHARE = 0.875  # of the resized image's shorter side, as everywhere on ImageNet: 224 of 256 pixels


@dataclass(frozen=True)
class LayerDecayConfig:
    """Learning rates that fall from the head to the patch embedding (paper table 5; the release's scripts)."""

    # factor between the learning rates of neighbouring layers; 1 gives all layers the same
    rate: float = 1.0
    # the factor at the end of training, which it moves to from rate; none keeps it fixed
    rate_end: float | None = None
    # shape of that movement: linear (the paper's text) or cosine, a half-cosine (release)
    ramp: Literal["linear", "cosine"] = "linear"
    # which power a layer has: beit (BEiT and MAE: head 0, last block 1) or release (last block 0)
    convention: Literal["beit", "release"] = "beit"
    # deep layers warm up longer than high ones: W - W * factor steps instead of W (release)
    layerwise_warmup: bool = False
    # learning rate of the head and the final norm, unscaled by the batch; none takes the run's
    head_lr: float | None = None

    def __post_init__(self) -> None:
        require_finite(self, "layer_decay.")
        for name in ("rate", "rate_end"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"layer_decay.{name} is {value}; it must lie in (0, 1].")
        require(
            self.head_lr is None or self.head_lr > 0, f"layer_decay.head_lr is {self.head_lr}; it must be positive."
        )


@dataclass(frozen=True)
class AugmentationConfig:
    """What fine-tuning does to a crop (as in the release)."""

    # timm's RandAugment policy; none switches it off
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    # share of images that lose a rectangle to noise (release; the paper's table has none)
    random_erasing: float = 0.25
    # Beta parameter of Mixup; 0 switches it off
    mixup: float = 0.8
    # Beta parameter of CutMix; 0 switches it off
    cutmix: float = 1.0
    # share of mixed groups that take CutMix where both are on
    cutmix_share: float = 0.5
    # probability mass that the target spreads over all classes
    label_smoothing: float = 0.1
    # consecutive samples of the run that share one mixing ratio and are mixed among themselves
    mix_group: int = 16
    # RandAugment processes of each rank; 0 augments in the training process
    workers: int = 4

    def __post_init__(self) -> None:
        require_finite(self, "augmentation.")
        require(self.rand_augment != "", "augmentation.rand_augment is empty; give a policy, or none to switch it off.")
        for name in ("mixup", "cutmix", "workers"):
            require(getattr(self, name) >= 0, f"augmentation.{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("random_erasing", "cutmix_share"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"augmentation.{name} is {share}; it must lie in [0, 1].")
        require(
            0 <= self.label_smoothing < 1,
            f"augmentation.label_smoothing is {self.label_smoothing}; it must lie in [0, 1).",
        )
        require(
            self.mix_group >= 2 and self.mix_group % 2 == 0,
            f"augmentation.mix_group is {self.mix_group}; samples are mixed in pairs, so it must be even.",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """On what and how often a run is evaluated."""

    # labelled validation images, in the layouts of --data; none trains without evaluating
    data: str | None = None
    # steps between evaluations (one is always made at the end); none evaluates once an epoch
    every: int | None = None
    # evaluate, write evaluation.json and end; nothing is trained
    only: bool = False

    def __post_init__(self) -> None:
        require(self.data != "", "validation_data is empty; give a folder (an unset shell variable?).")
        require(self.every is None or self.every >= 1, f"evaluation.every is {self.every}; it must be at least 1.")
        require(
            not self.only or self.data is not None,
            "--evaluate_only needs images to evaluate on: give --validation_data.",
        )


@dataclass(frozen=True)
class EvaluationConfig(ValidationConfig):
    """On what, how often and how a classifier is evaluated."""

    # images of a batch on each replica
    batch_size: int = 64
    # length of the shorter side before the centre crop, pixels; none takes the crop's / 0.875: 256 for 224
    resize_size: int | None = None
    # resize to a square of that length, whatever the image's shape (release, for L)
    squash: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "resize_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluation.{name} is {value}; it must be at least 1.")

    def shorter_side(self, image_size: int) -> int:
        """Length that the shorter side is resized to before the centre crop of ``image_size``, pixels."""
        return round(image_size / CROP_SHARE) if self.resize_size is None else self.resize_size

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a size that is smaller than the crop which the model takes."""
        require(
            self.shorter_side(model.image_size) >= model.image_size,
            f"evaluation.resize_size {self.resize_size} is smaller than the crop of model.image_size "
            f"{model.image_size}: choose at least that.",
        )


@dataclass(frozen=True)
class HeadConfig:
    """The classifier on top of the trunk."""

    # what is classified: last, the last token's output (paper), or mean, the patches' mean after a LayerNorm (release)
    pooling: Literal["last", "mean"] = "last"
    # number of classes; none takes those of the training data
    num_classes: int | None = None

    def __post_init__(self) -> None:
        require(
            self.num_classes is None or self.num_classes >= 2,
            f"head.num_classes is {self.num_classes}; it must be at least 2.",
        )


@dataclass(frozen=True)
class FinetuningConfig(RunConfig):
    """A run that starts from a pre-trained trunk (``init_from``), or from nothing to compare with."""

    layer_decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    evaluation: ValidationConfig = field(default_factory=ValidationConfig)
    # draw the head anew, whatever head init_from holds (one of other classes is refused without this)
    reset_head: bool = False


@dataclass(frozen=True)
class ClassificationConfig(FinetuningConfig):
    """Fine-tuning to image classification (paper section 4.3, table 5)."""

    head: HeadConfig = field(default_factory=HeadConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.evaluation.check_model(self.model)
