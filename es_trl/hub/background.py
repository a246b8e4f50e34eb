"""Work on the Hub beside the training: one thing after the other, and nothing that could hold the program."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """
    Runs functions in turn in a daemon thread. huggingface_hub waits for an answer without a limit; here who waits has
    one, and a Hub that never answers neither stops the training nor the end of the program.
    """

    def __init__(self):
        self._tasks: queue.Queue | None = None

    def submit(self, work: Callable[[], Any]) -> Future:
        """Runs `work` after what was submitted before it."""
        if self._tasks is None:
            self._tasks = queue.Queue()
            threading.Thread(target=_run, args=(self._tasks,), name="es_trl-hub", daemon=True).start()
        future: Future = Future()
        self._tasks.put((work, future))
        return future

    def wait(self, future: Future, seconds: float) -> Any:
        """
        The result of `future`.

        Raises:
            TimeoutError: It is not there within `seconds`. What was submitted is given up, and later work does not
                wait for it.
        """
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            if future.done():  # the work itself raised one
                raise
            self._tasks = None
            raise TimeoutError(f"the Hub did not answer for {seconds:g} seconds") from None


def _run(tasks: queue.Queue) -> None:
    while True:
        work, future = tasks.get()
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
