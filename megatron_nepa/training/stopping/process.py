"""How a training script starts and ends as a process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType

from megatron_nepa.config import ConfigError, RankConfigError
from megatron_nepa.parallel.launcher import speaks_for_its_node
from megatron_nepa.terminal import foreseen, tolerant_output
from megatron_nepa.training.stopping.errors import RankTrainingError, RunStopped, TrainingError
from megatron_nepa.training.stopping.exit_codes import EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_TRAINING_FAILED
from megatron_nepa.training.stopping.signals import heard_signals


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Run a script's body and turn how it ended into an exit status (:mod:`.exit_codes`).

    A mistake of the user's ends it with one sentence and status 2, a training that cannot go on with 3. Every rank
    sees the same settings, so the first rank of each node speaks for all. A run that a signal stopped ends with 75:
    start the same command again. A path that the system refuses is told as a mistake is; an unforeseen error ends with
    its traceback and 1.
    """
    with tolerant_output():
        _StopAtOnce()
        yield from _ended_in_order()


def _ended_in_order() -> Iterator[None]:
    status = 0
    try:
        yield
    except RunStopped:
        status = EXIT_STOPPED
    except (RankConfigError, RankTrainingError) as error:
        # at once: the process group cannot be taken down while the others wait in its collectives, and they are told
        # by the end of this process (:mod:`.lost_rank`)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_TRAINING_FAILED)
    except (ConfigError, TrainingError) as error:
        if speaks_for_its_node(os.environ):
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_TRAINING_FAILED
    except Exception as error:
        sentence = foreseen(error)
        if sentence is not None:  # at once: where it is so on this machine alone, the other ranks wait
            if speaks_for_its_node(os.environ) or isinstance(error, OSError):
                print(f"error: {sentence}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(EXIT_BAD_INPUT)
        # the cause first, and no orderly farewell, which would wait for ranks that wait for this one
        print(f"rank {os.environ.get('RANK', '0')} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    finally:
        dist = sys.modules.get("torch.distributed")  # what was not imported made no process group
        if dist is not None and dist.is_initialized():
            dist.destroy_process_group()
    if status == EXIT_STOPPED:
        # at once, for the same reason that the ranks left the loop together: all is written
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


class _StopAtOnce:
    """Handler of signals outside of training, where there is nothing to save: they end the process.

    Python runs a handler only when native code returns, and at the start that may be waiting for another rank. So a
    thread is told through a pipe, too. Whichever of the two is first speaks and ends the process; the other lets it.
    """

    def __init__(self) -> None:
        self._ending = threading.Lock()
        for number in heard_signals():
            signal.signal(number, self._end)
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._listen, name="stop-at-once", daemon=True).start()

    def _end(self, number: int, frame: FrameType | None) -> None:
        if not self._ending.acquire(blocking=False):
            return
        if os.environ.get("RANK", "0") == "0":
            line = f"\n{signal.Signals(number).name} outside of training: nothing to save, exits.\n"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, line.encode())
        os._exit(EXIT_STOPPED)

    def _listen(self) -> None:
        while True:
            number = os.read(self._reader, 1)[0]
            if signal.getsignal(number) == self._end:  # training has handlers of its own
                self._end(number, None)
