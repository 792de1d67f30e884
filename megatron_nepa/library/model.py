"""A trained trunk with or without a head, as a plain module.

Shapes: B images, h x w patches, P = h w of them in raster order, T tokens (P, or P + 1 with the BOS token first), D
width, C classes, K classes of pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_nepa.config import ConfigError, ModelConfig, SegmentationEvaluationConfig, require
from megatron_nepa.models.classifier import Classifier
from megatron_nepa.models.resampling import interpolate_positions
from megatron_nepa.models.segmenter import Segmenter
from megatron_nepa.models.sliding_window import sliding_window_logits
from megatron_nepa.models.trunk import Trunk, TrunkOutput


class Features(NamedTuple):
    """What the trunk makes of images, after its final LayerNorm, in the model's dtype.

    Attributes:
        tokens: of all positions, the BOS token first where the model has one, [B, T, D].
        patches: of the patches, [B, P, D].
        last: of the last patch, [B, D]: what the paper classifies; the only one of a causal trunk that saw everything.
        mean: mean of the patches, [B, D].
    """

    tokens: Tensor
    patches: Tensor
    last: Tensor
    mean: Tensor


class NextPatches(NamedTuple):
    """What the trunk expects of patches before it sees them (paper section 3.1).

    Attributes:
        predicted: embedding that the tokens before a patch predict, [B, N, D], of patch ``first`` to the last.
        actual: embedding of that patch, [B, N, D].
        cosine: of the two, fp32 [B, N]; minus its mean is the training loss.
        first: number of the first patch that is predicted: 0 where a BOS token predicts it, else 1.
    """

    predicted: Tensor
    actual: Tensor
    cosine: Tensor
    first: int


class NepaModel(nn.Module):
    """A model of :func:`megatron_nepa.load`; it trains in anyone's loop, compiles and exports.

    Images are floats in [-1, 1], as :attr:`preprocess` gives them; their sides are multiples of the patch's. Another
    size than ``config.image_size`` works as in training: RoPE normalises positions to the image; learned positions are
    resampled, bicubic, in every call. DropPath and RoPE rescale are off in training mode too.

    Args:
        module: a trunk, a classifier or a segmenter.
        origin: what the weights are, in words.
        classes: names of what the head tells apart.
        new_transform: makes :attr:`preprocess`.
        stride: pixels from one window of :meth:`segment` to the next; None takes two thirds of a window.
    """

    def __init__(
        self,
        module: Trunk | Classifier | Segmenter,
        origin: str,
        classes: tuple[str, ...] = (),
        new_transform: Callable[[], Any] | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.origin, self.classes, self.stride = origin, classes, stride
        self._new_transform = new_transform
        self._has_said = False

    @property
    def trunk(self) -> Trunk:
        """The trunk, whose parameters a LoRA or a freeze would name."""
        return self.module if isinstance(self.module, Trunk) else self.module.trunk

    @property
    def config(self) -> ModelConfig:
        """Shape of the trunk."""
        return self.trunk.config

    @cached_property
    def preprocess(self) -> Any:
        """torchvision v2 transform of a PIL image or uint8 tensor [3, H, W] to what the model takes, [3, S, S].

        Raises:
            ConfigError: where torchvision is not installed.
        """
        assert self._new_transform is not None
        try:
            return self._new_transform()
        except ImportError as error:
            raise ConfigError(f"model.preprocess needs torchvision ({error}): pip install torchvision.") from None

    def forward(self, images: Tensor) -> Tensor:
        """One embedding of each image, [B, C, H, W] to [B, D]: the one that the head reads, or the last patch's."""
        features = self.forward_features(images)
        mean = isinstance(self.module, Classifier) and self.module.pooling == "mean"
        return features.mean if mean else features.last

    def forward_features(self, images: Tensor) -> Features:
        """Every token and both pooled embeddings of images [B, C, H, W]."""
        output = self._run(images)
        tokens = self._tokens(output.output, output)
        patches = tokens[:, self._num_prefix :]
        return Features(tokens, patches, tokens[:, -1], patches.mean(dim=1, dtype=torch.float32).to(tokens.dtype))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of blocks, as timm's method of this name.

        Args:
            images: [B, C, H, W].
            indices: blocks, counted from 0, or from the end where negative; a number takes the last so many, None all.
            return_prefix_tokens: return each block's BOS token as well, as a pair (patches, prefix [B, 0 or 1, D]).
            norm: apply the final LayerNorm to each.
            output_fmt: "NCHW" for maps [B, D, h, w], "NLC" for [B, P, D].
            intermediates_only: return the list alone.

        Returns:
            The tokens after the final LayerNorm, [B, T, D], and the list of the blocks' patches, in rising order.

        Raises:
            ConfigError: for a block that the model does not have, or another format.
        """
        require(output_fmt in ("NCHW", "NLC"), f"output_fmt is {output_fmt!r}: take NCHW or NLC.")
        blocks = self._blocks(indices)
        output = self._run(images, blocks)
        height, width = (side // self.config.patch_size for side in images.shape[2:])
        found: list[Any] = []
        for tap in output.taps:
            tokens = self._tokens(self._norm(tap) if norm else tap, output).to(output.output.dtype)
            prefix, patches = tokens[:, : self._num_prefix], tokens[:, self._num_prefix :]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, (height, width))
            found.append((patches, prefix) if return_prefix_tokens else patches)
        return found if intermediates_only else (self._tokens(output.output, output), found)

    def predict_next(self, images: Tensor) -> NextPatches:
        """The predicted embedding of every next patch of images [B, C, H, W], and its cosine with the true one.

        Raises:
            ConfigError: where the model is bidirectional: it has seen what it would predict.
        """
        require(self.config.causal, "predict_next needs a causal model: this one sees what it would predict.")
        output = self._run(images)
        predicted = self._tokens(output.output, output)[:, :-1]
        actual = self._tokens(output.embedding, output)[:, 1:]
        cosine = nn.functional.cosine_similarity(predicted.float(), actual.float(), dim=-1)
        return NextPatches(predicted, actual, cosine, first=1 - self._num_prefix)

    def classify(self, images: Tensor) -> Tensor:
        """A classifier's logits of images [B, C, H, W], fp32 [B, C]; ``softmax(-1)`` makes them probabilities.

        Raises:
            ConfigError: where the model has no classifier.
        """
        require(isinstance(self.module, Classifier), self._lacks("classify", "finetune_classification.py"))
        return self._call(images)

    def segment(self, images: Tensor) -> Tensor:
        """A segmenter's logits of every pixel by sliding windows, as the evaluation's; ``argmax(1)`` makes them masks.

        Args:
            images: [B, C, H, W] of any sides; one that is smaller than a window is padded.

        Returns:
            fp32 [B, K, H, W].

        Raises:
            ConfigError: where the model has no decoder.
        """
        require(isinstance(self.module, Segmenter), self._lacks("segment", "finetune_segmentation.py"))
        window = self.config.image_size
        stride = SegmentationEvaluationConfig(stride=self.stride).window_stride(window)
        return sliding_window_logits(self._call, self._cast(images), window, stride)

    def extra_repr(self) -> str:
        """What the weights are."""
        return self.origin

    @property
    def _num_prefix(self) -> int:
        return int(self.config.bos_token)

    def _run(self, images: Tensor, taps: Sequence[int] = ()) -> TrunkOutput:
        images = self._cast(images)
        return cast("TrunkOutput", self._compute(self.trunk, images, taps))

    def _call(self, images: Tensor) -> Tensor:
        return cast("Tensor", self._compute(self.module, self._cast(images))).float()

    def _compute(self, module: nn.Module, images: Tensor, *arguments: Any) -> Any:
        """Call a module, with learned positions of the images' size."""
        positions = self._resampled_positions(images)
        name = "embedding.positions" if isinstance(module, Trunk) else "trunk.embedding.positions"
        numbers = self._numbers(images)
        if positions is None:
            return module(images, numbers, *arguments)
        return functional_call(module, {name: positions}, (images, numbers, *arguments))

    def _cast(self, images: Tensor) -> Tensor:
        require(isinstance(images, Tensor), f"images are {type(images).__name__}: give model.preprocess(image)[None].")
        require(
            images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point(),
            f"images are {images.dtype} {list(images.shape)}: give floats [B, 3, H, W] in [-1, 1], as model.preprocess "
            "makes them.",
        )
        return images.to(self.trunk.norm.weight.dtype)

    def _numbers(self, images: Tensor) -> Tensor:
        """Sample numbers, by which the dropout of a segmenter's head is drawn."""
        shape, device = (images.shape[0],), images.device
        if self.training and isinstance(self.module, Segmenter):
            return torch.randint(2**62, shape, device=device)
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def _resampled_positions(self, images: Tensor) -> Tensor | None:
        """Learned positions for images of another size than the model's, or None."""
        positions, size = self.trunk.embedding.positions, self.config.patch_size
        grid = (images.shape[2] // size, images.shape[3] // size)
        own = self.config.grid_size
        if positions is None or grid == (own, own) or 0 in grid:
            return None
        if not self._has_said and not torch.compiler.is_compiling():
            self._has_said = True
            warnings.warn(
                f"learned positions of {own} x {own} patches are resampled to {grid[0]} x {grid[1]}, in every call: "
                "give load(..., image_size=...) to do it once.",
                stacklevel=5,
            )
        return interpolate_positions(positions, (own, own), grid).to(positions.dtype)

    def _tokens(self, rows: Tensor, output: TrunkOutput) -> Tensor:
        """Token rows [B T, D] to [B, T, D]."""
        return rows.view(-1, output.period, rows.shape[-1])

    def _norm(self, stream: Tensor) -> Tensor:
        trunk = self.trunk
        weight, bias = cast("Tensor", trunk.norm.weight), cast("Tensor", trunk.norm.bias)
        return trunk.kernels.layer_norm(stream, weight, bias, self.config.layer_norm_eps)

    def _blocks(self, indices: int | Sequence[int] | None) -> list[int]:
        count = self.config.num_layers
        if indices is None:
            indices = count
        if isinstance(indices, int):
            require(1 <= indices <= count, f"the last {indices} blocks of {count} are asked for: take 1 to {count}.")
            return list(range(count - indices, count))
        wrong = [index for index in indices if not -count <= index < count]
        require(not wrong, f"block {wrong[:1]} is not there: the model has {count}, numbered from 0.")
        return sorted({index % count for index in indices})

    def _lacks(self, method: str, script: str) -> str:
        return (
            f"{method} needs a head, which the model ({self.origin}) does not have: train one with examples/{script}."
        )
