"""The optimizer of a run, in the fastest form that is there."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megatron_nepa.config import OptimizerConfig


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device, offload: bool, built: bool = True
) -> torch.optim.Optimizer:
    """AdamW in the fastest form that is there, or LARS.

    Args:
        groups: of :meth:`~megatron_nepa.training.engine.learning_rates.LearningRates.groups`.
        config: name, betas and epsilon; the learning rate is set at every step.
        device: where the run trains.
        offload: ZeRO offload keeps masters and moments on the CPU, which takes DeepSpeed's own CPU Adam.
        built: whether the extensions of :func:`optimizer_extensions` are there.

    Returns:
        DeepSpeedCPUAdam under offload; on a GPU apex's FusedAdam where apex is installed, else DeepSpeed's; on a CPU,
        and where DeepSpeed's is not built, torch's fused AdamW. For "lars" timm's LARS.
    """
    if config.name == "lars":
        from megatron_nepa.training.engine.lars import build_lars  # probes alone wait for timm

        return build_lars(groups, momentum=config.beta1)
    betas = (config.beta1, config.beta2)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=config.eps, adamw_mode=True)
    has_apex = device.type == "cuda" and _has_apex()
    if device.type != "cuda" or (not has_apex and not built):
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
    if has_apex:
        from apex.optimizers import FusedAdam as ApexFusedAdam

        return ApexFusedAdam(groups, lr=0.0, betas=betas, eps=config.eps, adam_w_mode=True)
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, lr=0.0, betas=betas, eps=config.eps, adam_w_mode=True)


def optimizer_extensions(device: torch.device, offload: bool) -> list[str]:
    """The op builders of DeepSpeed whose extension :func:`build_optimizer` will load."""
    if offload:
        return ["CPUAdamBuilder"]
    return ["FusedAdamBuilder"] if device.type == "cuda" and not _has_apex() else []


def _has_apex() -> bool:
    # the unrelated project that owns the name on PyPI has no such module, and an Apex built without its CUDA extensions
    # has the module but not amp_C, without which FusedAdam refuses to start
    has_package = (
        importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None
    )
    return has_package and importlib.util.find_spec("amp_C") is not None
