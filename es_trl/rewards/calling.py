"""Calling one reward function: only the keywords it takes, retries, a time limit, and errors that say where."""

from __future__ import annotations

import asyncio
import copy
import difflib
import functools
import inspect
import logging
import re
import signal
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..pictures import private_copy
from .results import shorten


logger = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 5.0
FAILED = object()  # what a call returns whose failure is not to end the run


def function_name(func: Callable) -> str:
    """The name of a callable for metrics: its `__name__`, that of a partial's function, or its class."""
    while isinstance(func, functools.partial) and not hasattr(func, "__name__"):
        func = func.func
    name = re.sub(r"[^\w.-]+", "_", getattr(func, "__name__", type(func).__name__)).strip("_")
    return name or "reward"


def is_ours(func: Callable) -> bool:
    """Whether a reward is one of this package, which leave pictures and columns as they are."""
    return (getattr(func, "__module__", None) or type(func).__module__ or "").startswith("es_trl.")


class RewardCall:
    """
    One named reward function, ready to be called with keywords.

    Args:
        name (`str`): the name in messages.
        func (`Callable`): `f(prompts=..., images=..., **others)`, `def` or `async def`.
        retries (`int`, *optional*, defaults to `0`): how often an exception is answered by another attempt.
        timeout (`float`, *optional*): seconds after which an attempt has failed.
        failure (`str`, *optional*, defaults to `"raise"`): `"invalid"` logs the last attempt's failure and returns
            `FAILED` instead of raising.
    """

    def __init__(
        self, name: str, func: Callable, retries: int = 0, timeout: float | None = None, failure: str = "raise"
    ):
        self.name, self.func, self.retries, self.timeout, self.failure = name, func, retries, timeout, failure
        self.is_async = inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
            getattr(func, "__call__", None)  # noqa: B004 - an instance whose __call__ is async
        )
        self.is_ours = is_ours(func)
        self.is_groupwise = bool(getattr(func, "groupwise", False))
        try:
            self.parameters = list(inspect.signature(func).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature: give them everything
            self.parameters = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]

    def keywords(self, available: dict[str, Any], groups: Sequence | None = None) -> dict[str, Any]:
        """
        Those of `available` that the function takes; `groups` and `step_prompts` only if it names them, as others
        would take them for columns of the dataset. Raises `ValueError` if it needs others.
        """
        named = {parameter.name for parameter in self.parameters}
        available = {name: value for name, value in available.items() if name != "step_prompts" or name in named}
        if "groups" in named:
            available = {**available, "groups": groups}
        for parameter in self.parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ValueError(f"reward function {self.name!r} must take {parameter.name!r} as a keyword")
            if parameter.default is parameter.empty and parameter.name not in available:
                near = difflib.get_close_matches(parameter.name, available, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"reward function {self.name!r} needs an argument {parameter.name!r} that it is not given: {hint}"
                    f"Given are {', '.join(available)}; every further column of the dataset is passed by its name"
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters):
            return available
        return {key: value for key, value in available.items() if key in named}

    def _given(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """
        What one attempt gets. A function of the user's gets copies: whatever it draws on a picture or appends to a
        column, the next attempt, the next reward, the judge and the kept pictures see what was drawn.
        """
        if self.is_ours:
            return keywords
        shared = ("log_extra", "log_metric")
        return {
            key: value if key in shared else copy.copy(value) if key == "trainer_state" else private_copy(value)
            for key, value in keywords.items()
        }

    def run(self, keywords: dict[str, Any], where: str, wait: Callable[[Awaitable], Any]) -> Any:
        """Call the function; `wait` finishes an awaitable that a plain function may return."""
        for attempt in range(self.retries + 1):
            try:
                given = self._given(keywords)
                with time_limit(self.timeout):
                    result = self.func(**given)
                    return wait(_awaited(result)) if inspect.isawaitable(result) else result
            except Exception as error:
                if attempt == self.retries:
                    return self._fail(error, keywords, where)
                time.sleep(self._backoff(attempt, error, where))

    async def run_async(self, keywords: dict[str, Any], where: str) -> Any:
        """As `run`, for an `async def`."""
        for attempt in range(self.retries + 1):
            try:
                return await self._in_time(self.func(**self._given(keywords)))
            except Exception as error:
                if attempt == self.retries:
                    return self._fail(error, keywords, where)
                await asyncio.sleep(self._backoff(attempt, error, where))

    async def _in_time(self, awaitable: Awaitable) -> Any:
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                return await awaitable
        except TimeoutError as error:
            if not limit.expired():  # one of the function's own
                raise
            raise TimeoutError(f"no result within reward_timeout={self.timeout:g} s") from error

    def _fail(self, error: Exception, keywords: dict[str, Any], where: str) -> Any:
        prompts = keywords.get("prompts", ())
        tries = f" after {self.retries + 1} attempts" if self.retries else ""
        message = (
            f"reward function {self.name!r} failed{_at(where)}{tries} (first prompt of {len(prompts)}: "
            f"{shorten(prompts)}): {type(error).__name__}: {error}"
        )
        if self.failure == "invalid":
            logger.warning("%s; its images have no score", message)
            return FAILED
        raise RuntimeError(message) from error

    def _backoff(self, attempt: int, error: Exception, where: str) -> float:
        """Log the failed attempt and return the seconds to wait before the next one."""
        cause = f"{type(error).__name__}: {error}"
        logger.warning("reward %r failed%s, attempt %d: %s; trying again", self.name, _at(where), attempt + 1, cause)
        return min(0.1 * 2**attempt, MAX_BACKOFF_SECONDS)


def _at(where: str) -> str:
    return f" at {where}" if where else ""


async def _awaited(awaitable: Awaitable) -> Any:
    return await awaitable


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


async def gather_or_cancel(coroutines: Iterable[Awaitable]) -> list:
    """Results of all in order; the first failure ends the others too."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class AsyncRunner:
    """
    One event loop in a thread of its own, started when first needed.

    The same loop serves every call, so that a client opened by a reward (an HTTP session, say) stays usable; a thread,
    so that it also works where a loop is already running, as in notebooks.
    """

    def __init__(self):
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine):
        """Start `coroutine` and return its `concurrent.futures.Future`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name="es_trl-rewards", daemon=True).start()
            self.close = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine) -> Any:
        """Run `coroutine` to its end and return its result."""
        future = self.submit(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()  # does nothing to one that has ended


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
