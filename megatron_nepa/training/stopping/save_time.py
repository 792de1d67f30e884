"""How long a save takes, known before a signal leaves little time for one."""

from __future__ import annotations

from torch import nn

# between SIGTERM and SIGKILL: the deepspeed launcher, torchrun and Slurm's default KillWait all leave this much
GRACE_SECONDS = 30.0
# of all ranks together, taken until a save was measured: a shared file system under load
ASSUMED_BYTES_PER_SECOND = 1e9


class SaveTime:
    """Expected duration of a save: guessed from the checkpoint's size, then as the last one was measured.

    Args:
        num_bytes: size of a checkpoint.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.seconds = num_bytes / ASSUMED_BYTES_PER_SECOND
        self._measured = False
        self._warned = False

    def measured(self, seconds: float) -> None:
        """Take the duration of a save that was just made."""
        self.seconds, self._measured = seconds, True

    def warning(self, step_seconds: float = 0.0) -> str | None:
        """What to tell the user where a stop would outlast the 30 seconds' grace; at most once, else None.

        Args:
            step_seconds: duration of a training step, which a stop waits for.
        """
        stop_seconds = self.seconds + step_seconds
        if self._warned or stop_seconds <= GRACE_SECONDS:
            return None
        self._warned = True
        source = "as the last one was" if self._measured else "at an assumed 1 GB/s"
        return (
            f"warning: a stop takes about {stop_seconds:.0f} s here (a checkpoint of {self.num_bytes / 1e9:.1f} GB "
            f"saved in {self.seconds:.0f} s, {source}, after a step of {step_seconds:.0f} s), but launchers kill "
            f"{GRACE_SECONDS:.0f} s after SIGTERM: have the signal sent earlier (sbatch --signal=USR1@"
            f"{round(2 * stop_seconds + 60)}), or lower --save_every to lose less."
        )


def checkpoint_bytes(module: nn.Module, tensor_size: int, has_ema: bool) -> int:
    """Size of a checkpoint: fp32 masters, two moments and the weight average of every logical parameter.

    Args:
        module: the model, whose split parameters are one of ``tensor_size`` equal parts.
        tensor_size: tensor-parallel size.
        has_ema: whether a weight average is kept.
    """
    numbers = 0
    for param in module.parameters():
        whole = param.numel() * (tensor_size if getattr(param, "tensor_model_parallel", False) else 1)
        numbers += whole * (3 + has_ema if param.requires_grad else 1)
    return 4 * numbers
