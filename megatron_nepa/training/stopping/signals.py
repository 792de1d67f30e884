"""Which signals end a run: in training after a save (:mod:`.preemption`), outside of it at once (:mod:`.process`)."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def heard_signals() -> list[signal.Signals]:
    """Those that a run listens to: SIGHUP stays ignored where nohup has it so."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
