"""The peer of the training benchmark: the release's training step.

The HF Trainer's: fp32 weights under bf16 autocast, torch's AdamW, clipping at 1.0, and an fp32 copy of the weights as
their average.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from megatron_nepa.benchmarks.train.peer_model import PeerModel
from megatron_nepa.benchmarks.train.steps import LEARNING_RATE, PartClock, Setting, loader_of
from megatron_nepa.config import require
from megatron_nepa.tasks.pretraining import PretrainingTask


class PeerSteps:
    """The release's training step.

    Args:
        setting: the run; one rank.
    """

    def __init__(self, setting: Setting) -> None:
        run = setting.run
        require(setting.topology.world_size == 1, "--baseline compares on one device; start one process.")
        torch.manual_seed(run.seed)
        self.device = setting.topology.device
        self.accumulation_steps = run.accumulation_steps(1)
        self.autocast = run.dtype == "bf16"
        self.settings = run.optimizer
        self.model = PeerModel(run.model).to(self.device).train()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": run.optimizer.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(run.optimizer.beta1, run.optimizer.beta2),
            eps=run.optimizer.eps,
        )
        self.average: nn.Module | None = None
        in_fp32 = replace(run, dtype="fp32")
        self.loader = loader_of(PretrainingTask(in_fp32, setting.topology), in_fp32, setting.topology)

    def step(self, clock: PartClock) -> None:
        """One optimizer step."""
        clock.start()
        for _ in range(self.accumulation_steps):
            images = next(self.loader).images
            clock.end("data")
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = self.model(images) / self.accumulation_steps
            clock.end("forward")
            loss.backward()
            clock.end("backward")
        if self.settings.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.settings.ema_decay > 0:
            self._update_average()
        clock.end("optimizer")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:  # the release copies the weights after the first step
            self.average = copy.deepcopy(self.model)
            return
        decay, weights = self.settings.ema_decay, self.model.state_dict()
        for name, average in self.average.state_dict().items():
            average.mul_(decay).add_(weights[name], alpha=1 - decay)
