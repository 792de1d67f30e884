"""The encoder of JEPA's targets: the trunk with the average of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_nepa.models.build import Build
from megatron_nepa.models.trunk import Trunk, TrunkOutput


class AverageSource(Protocol):
    """The average of a module's trained weights, kept by whoever trains it.

    Attributes:
        tensors: of every trained parameter, by its name in the module; they hold the average after :meth:`wait`.
    """

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def start(self) -> None:
        """Begin to bring the tensors up to date, where the average has changed."""

    def wait(self) -> None:
        """Return when they are."""


class TargetEncoder:
    """A second trunk without parameters of its own: in evaluation mode, without gradients.

    Not a ``Module``, so that neither the optimizer, nor a checkpoint, nor DeepSpeed's casts find its weights: they are
    views of the tensors of an :class:`AverageSource`. What the trunk does not train it shares with it.

    Args:
        trained: the trunk whose average it computes with.
        build: ranks and kernels.
    """

    def __init__(self, trained: Trunk, build: Build) -> None:
        self._trained = trained
        self._average: AverageSource | None = None
        with torch.device("meta"):
            self.trunk = Trunk(trained.config, build).eval()

    def attach(self, average: AverageSource) -> None:
        """Compute with this average from now on."""
        self._average = average
        frozen = dict(self._trained.named_parameters())
        buffers = dict(self._trained.named_buffers())
        for path, module in self.trunk.named_modules():
            prefix = f"{path}." if path else ""
            for name in list(module._parameters):
                if module._parameters[name] is not None:
                    tensor = average.tensors.get(prefix + name, frozen[prefix + name].detach())
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
                    vars(module._parameters[name]).update(vars(frozen[prefix + name]))
            for name in list(module._buffers):
                module._buffers[name] = buffers[prefix + name]

    def start(self) -> None:
        """Begin to bring the weights up to date; a collective."""
        assert self._average is not None, "JEPA's targets need the weight average of a training engine"
        self._average.start()

    @torch.no_grad()
    def __call__(self, images: Tensor, sample_index: Tensor) -> TrunkOutput:
        """The trunk's output of whole images; the arguments are those of :meth:`Trunk.forward`."""
        assert self._average is not None
        self._average.wait()
        output: TrunkOutput = self.trunk(images, sample_index)
        return output
