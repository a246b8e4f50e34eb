"""Stopping on SIGTERM or Ctrl-C: at the next micro-batch, with a checkpoint, and with the signal's exit code."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback


# torchrun passes a terminal's Ctrl-C on to workers that have had it already: an echo is not a second request.
ECHO_SECONDS = 2.0


class StopRequested(Exception):
    """Raised between micro-batches, on every process at once, when the run was asked to stop."""


class TrainingStopped(SystemExit):
    """
    Raised by `train()` once a stopped run's checkpoint is on disk; a program that lets it pass ends with the exit code
    of the signal: 143 for SIGTERM, 130 for Ctrl-C.
    """


class StopSignals:
    """
    While entered, the first SIGTERM or SIGINT is kept in `received` and a second one ends the process at once. A
    handler that stood there before is called too, and is back in place on leaving. Outside the main thread, where
    Python allows no handlers, this does nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < ECHO_SECONDS:
                return
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.received, self._since = signum, time.monotonic()
        # Not through logging: the signal may have come in the middle of a log record.
        os.write(2, b"\nStopping after this micro-batch; a second signal ends the run at once.\n")
        previous = self._previous.get(signum)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(signum, frame)


class Stopping(TrainerCallback):
    """
    Whether the run was asked to stop, and whether it may stop here: `signals` are entered around the training, and
    `theta_is_whole` says whether theta is that of a finished step, and not in the middle of its updates.
    """

    def __init__(self, peers):
        self.peers, self.signals, self.theta_is_whole = peers, StopSignals(), True

    @property
    def requested(self) -> bool:
        """Whether this process got SIGTERM or Ctrl-C."""
        return self.signals.received is not None

    def check(self, step: int) -> None:
        """Raises [`StopRequested`] in every process if one of them was asked to stop. All have to call it."""
        self.peers.stop_if_any(self.requested, f"step {step}")

    def check_own(self) -> None:
        """
        As `check`, for this process alone, inside work that `peers.together` ends for all. A method that has made some
        of a step's several updates finishes the step first.
        """
        if self.requested and self.theta_is_whole:
            raise StopRequested

    def begin_update(self) -> None:
        """Theta is about to change: no checkpoint until the step has ended, or the loop has loaded one."""
        self.theta_is_whole = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.theta_is_whole = True

    def on_step_begin(self, args, state, control, **kwargs):
        self.check(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.begin_update()

    def on_step_end(self, args, state, control, **kwargs):
        self.theta_is_whole = True
