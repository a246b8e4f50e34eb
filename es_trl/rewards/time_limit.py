"""A limit on the time of a plain function call, without a thread that would stay behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _TimeIsUp(BaseException):
    """No `Exception`, so that a function which retries on every error does not swallow it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """
    Interrupts what runs inside after `seconds`, also while it sleeps, waits for a lock or reads from a socket; code
    that never returns to Python is interrupted when it does. A timer that was set before goes on where it stood.

    Args:
        seconds (`float`, *optional*): above 0; None is no limit.

    Raises:
        `TimeoutError`: the time was up.
        `ValueError`: this is not the main thread of a Unix program, where alone a function can be interrupted.
    """
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"reward_timeout={seconds:g} cannot end a plain reward function here: it takes the main thread of a Unix "
            "program. Make the function `async def`, or leave reward_timeout out"
        )

    def on_alarm(*_) -> None:
        raise _TimeIsUp

    previous = signal.signal(signal.SIGALRM, on_alarm)
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeIsUp:
        raise TimeoutError(f"no result within reward_timeout={seconds:g} s") from None
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *earlier)
