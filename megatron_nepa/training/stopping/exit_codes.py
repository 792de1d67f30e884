"""What a training process's exit status means; 0 is a finished run, 1 an unforeseen error with its traceback."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
# training cannot go on, or another rank was lost
EXIT_TRAINING_FAILED = 3
# stopped early by a signal or the end of the job's time, state saved: start the same command again
# (EX_TEMPFAIL of sysexits.h)
EXIT_STOPPED = 75
