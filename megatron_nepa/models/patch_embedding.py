"""Images to token rows: the target embedding z and the trunk's input.

Shapes: B samples of the micro-batch, b of them whose images this rank holds, C channels, h x w patches of p x p pixels,
T tokens of a sample, n token rows of this rank, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nepa.config import IMAGE_CHANNELS, ModelConfig, multiples_around, one_of, require
from megatron_nepa.models.build import Build
from megatron_nepa.models.positions import sine_positions
from megatron_nepa.parallel.parameters import parameter, sum_split_gradients
from megatron_nepa.parallel.rows import RowShard, place_rows


class PatchEmbedding(nn.Module):
    """Linear patch embedding, BOS token, positions and mask token.

    The target is the patch embedding before positions and mask, without a norm, as in the release.

    Args:
        config: the model's shape.
        build: the ranks that share the replica.
        masking: whether the objective replaces input patches by a learned mask token.
    """

    def __init__(self, config: ModelConfig, build: Build, masking: bool) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.tensor = build.tensor
        self.sequence_parallel = build.parallel.sequence_parallel
        width = config.hidden_size
        self.weight = parameter((width, IMAGE_CHANNELS, config.patch_size, config.patch_size), "images")
        self.bias = parameter((width,), "images", constant=0.0)
        self.bos_token = parameter((width,), "images") if config.bos_token else None
        self.positions = position_parameter(config)
        self.mask_token = parameter((width,), "rows") if masking else None
        if config.freeze_patch_embedding:
            self.weight.requires_grad_(False)
            self.bias.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        num_samples: int,
        rows: RowShard,
        mask: Tensor | None,
        dtype: torch.dtype,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed a micro-batch.

        Args:
            images: [b, C, H, W] in the weights' dtype: all ``num_samples`` of the micro-batch, or this tensor-parallel
                rank's equal share of them.
            num_samples: samples B of the whole micro-batch.
            rows: the token rows that this rank keeps.
            mask: patches that the mask token replaces, bool [B, patches], or None.
            dtype: dtype of the residual stream.
            kept: the patches of every sample that are embedded, int64 [B, K], or None for all of them.

        Returns:
            The targets z: this rank's rows [n, D], and one halo row more where its rows cut a sample. And
            the trunk's input [n, D] in ``dtype``.
        """
        is_share = images.shape[0] != num_samples
        weight, bias, bos_token, positions, mask_token = self._shared_parameters(is_share)
        patches = self._patches(images)  # [b, h w, C p p]
        num_patches = patches.shape[1]
        if kept is not None:
            own = kept.chunk(self.tensor.size)[self.tensor.rank] if is_share else kept
            patches = patches.gather(1, own[:, :, None].expand(-1, -1, patches.shape[2]))  # [b, K, C p p]
        tokens = self._tokens(patches, weight, bias, bos_token)  # [b, T, D]
        target = place_rows(tokens.flatten(0, 1), is_share, rows, self.tensor, self.sequence_parallel, halo=1)

        trunk_input = target[: rows.count]
        num_prefix = int(self.bos_token is not None)
        if mask_token is not None and mask is not None:
            masked = rows.take(nn.functional.pad(mask, (num_prefix, 0)).flatten())
            trunk_input = torch.where(masked[:, None], mask_token, trunk_input)
        trunk_input = trunk_input.to(dtype)
        if positions is not None:
            require(
                positions.shape[0] == num_patches + num_prefix,
                f"the learned positions are for {positions.shape[0]} tokens but the image has "
                f"{num_patches + num_prefix}: use the image size that the model was built for, or position_embedding "
                "none.",
            )
            index = None if kept is None else token_index(kept, num_prefix)
            trunk_input = trunk_input + self._position_rows(positions.to(dtype), num_samples, rows, index)
        return target, trunk_input

    def _shared_parameters(self, is_share: bool) -> list[Tensor | None]:
        parameters = (self.weight, self.bias, self.bos_token, self.positions, self.mask_token)
        split: tuple[str, ...] = ()
        if self.sequence_parallel:
            split = ("images", "rows")
        elif is_share:  # all rows are rebuilt on every rank before positions and mask, whose gradients are equal there
            split = ("images",)
        return sum_split_gradients(parameters, split, self.tensor)

    def _patches(self, images: Tensor) -> Tensor:
        """[b, C, H, W] to [b, h w, C p p]."""
        height, width = images.shape[2:]
        size = self.patch_size
        require(
            height % size == 0 and width % size == 0,
            f"an image of {height} x {width} pixels is not a whole number of {size} x {size} patches: take sides of "
            f"{one_of(multiples_around(height, size))} x {one_of(multiples_around(width, size))} pixels.",
        )
        return patchify(images, size)

    @staticmethod
    def _tokens(patches: Tensor, weight: Tensor | None, bias: Tensor | None, bos_token: Tensor | None) -> Tensor:
        assert weight is not None
        tokens = nn.functional.linear(patches, weight.flatten(1), bias)  # [b, h w, D]
        if bos_token is None:
            return tokens
        return torch.cat((bos_token.expand(patches.shape[0], 1, -1), tokens), dim=1)  # [b, T, D]

    @staticmethod
    def _position_rows(positions: Tensor, num_samples: int, rows: RowShard, index: Tensor | None) -> Tensor:
        if index is not None:  # sorted before it is summed: the gradient repeats bit for bit
            every_row = nn.functional.embedding(index.flatten(), positions)
        else:  # broadcasting over whole samples keeps the gradient a plain sum: an index would scatter it with atomics
            every_row = positions.expand(num_samples, *positions.shape).flatten(0, 1)
        return rows.take(every_row) if rows.count != rows.num_rows else every_row


def patchify(images: Tensor, size: int) -> Tensor:
    """Images [b, C, H, W] as patches in raster order, [b, h w, C p p]: a row is a patch in the order of its weights."""
    batch, channels, height, width = images.shape
    patches = images.view(batch, channels, height // size, size, width // size, size)  # [b, C, h, p, w, p]
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


def token_index(patches: Tensor, num_prefix: int) -> Tensor:
    """Numbers of the tokens of a sample that holds these patches: its prefix tokens, then they; int64 [B, K] to [B, T].

    Args:
        patches: numbers of patches, counted from 0 in raster order.
        num_prefix: leading tokens that every sample has (BOS).
    """
    prefix = torch.arange(num_prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat((prefix, patches + num_prefix), dim=1)


def position_parameter(config: ModelConfig) -> nn.Parameter | None:
    """The positions of a model's tokens, [T, D], or None where it has none; fixed ones are not trained."""
    shape, num_prefix = (config.sequence_length, config.hidden_size), int(config.bos_token)
    if config.position_embedding == "none":
        return None
    if config.position_embedding == "learned":
        return parameter(shape, "rows")
    fixed = parameter(shape, "rows", values=lambda: sine_positions(config.grid_size, config.hidden_size, num_prefix))
    fixed.requires_grad_(False)
    return fixed
