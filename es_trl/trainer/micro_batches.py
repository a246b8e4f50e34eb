"""The scores of finished micro-batches, written as they come, so that a killed run draws none of them again."""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..run.journal import append_whole, decode_scores, encode_scores, read_lines


logger = logging.getLogger(__name__)


class MicroBatches:
    """
    Asked by the rollout before every micro-batch and told after it. It stops the run between two of them, and with a
    folder it keeps their scores in `in_flight-<process>.jsonl` from one checkpoint to the next.

    Scores are taken again only under the very key they were written with: the settings, the step, the adapter and the
    prompts, on all of which they depend.

    Args:
        folder (`str`, *optional*): The run folder; nothing is kept without one.
        process_index (`int`, *optional*): This process.
        check_stop (`Callable`, *optional*): Raises [`StopRequested`] when the run was asked to stop.
        log_metric (`Callable`, *optional*): Where the metrics go that reward functions log.
        may_fail (`Callable`, *optional*): Makes a context manager that takes `OSError` from keeping scores; without it
            they are raised.

    Attributes:
        settings (`str`): What all micro-batches of the run have in common, for their keys.
        num_reused (`int`): Micro-batches that were not drawn again.
    """

    def __init__(
        self,
        folder: str | None = None,
        process_index: int = 0,
        check_stop: Callable[[], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        may_fail: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.folder, self.process_index, self.check_stop, self.may_fail = folder, process_index, check_stop, may_fail
        self.settings, self.num_reused = "", 0
        self._forward_metric = log_metric
        self._key = ""
        self._metrics: list[tuple[str, float]] = []
        self._known: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, list]] = {}

    def load(self) -> None:
        """Reads what the processes of a killed run left, however many they were."""
        self._known = {}
        for path in self._files():
            for entry in read_lines(path):
                try:
                    scores = decode_scores(entry["shape"], entry["scores"])
                    metrics = [(str(name), float(value)) for name, value in entry.get("metrics", [])]
                    self._known[entry["key"], tuple(entry["members"])] = scores, metrics
                except (KeyError, TypeError, ValueError) as error:
                    logger.warning("Leaving out a line of %s that holds no scores (%s).", path, error)

    def clear(self) -> None:
        """Forgets everything."""
        self._known, self._metrics = {}, []
        self.empty_files()

    def empty_files(self) -> None:
        """A checkpoint holds what the scores were for; what was found of later steps is still known."""
        if self.folder is not None:
            for path in self._files() if self.process_index == 0 else [self._file()]:
                path.unlink(missing_ok=True)

    def begin(
        self, theta: str, step: int, micro: int, prompts: Sequence[str], columns: Mapping[str, Sequence] | None = None
    ) -> None:
        """Says what the next rollout is drawn from."""
        self._key = digest_of([self.settings, theta, step, micro, list(prompts), columns])
        self._metrics = []

    def earlier(self, members: Sequence[int]) -> torch.Tensor | None:
        """The scores of `members` if this micro-batch was finished before; raises [`StopRequested`] if asked to."""
        if self.check_stop is not None:
            self.check_stop()
        scores, metrics = self._known.pop((self._key, tuple(members)), (None, []))
        for name, value in metrics:
            self._forward_metric(name, value)
        self.num_reused += scores is not None
        return scores

    def log_metric(self, name: str, value: float) -> None:
        """A reward function's metric: passed on, and kept with the scores."""
        self._metrics.append((name, float(value)))
        self._forward_metric(name, value)

    def finished(self, members: Sequence[int], scores: torch.Tensor) -> None:
        """Keeps the `(len(members), J, K)` scores of a micro-batch."""
        if self.folder is None:
            return
        metrics, self._metrics = self._metrics, []
        entry = {"key": self._key, "members": list(members), "metrics": metrics}
        entry |= {"shape": list(scores.shape), "scores": encode_scores(scores)}
        with self.may_fail(f"A line of {self._file().name}"):
            os.makedirs(self.folder, exist_ok=True)  # another machine's may not be there yet
            append_whole(self._file(), json.dumps(entry) + "\n")

    def _file(self) -> Path:
        return Path(self.folder, f"in_flight-{self.process_index}.jsonl")

    def _files(self) -> list[Path]:
        return sorted(Path(self.folder).glob("in_flight-*.jsonl")) if self.folder is not None else []


def digest_of(data: Any) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def source_of(function: str | Callable) -> str:
    """The text of a reward function, so that scores of an older version of it are not taken for its own."""
    try:
        if isinstance(function, str):
            path = function.rpartition(":")[0]
            return f"{function} {Path(path).read_text()}" if path.endswith(".py") else function
        return inspect.getsource(function)
    except (OSError, TypeError, UnicodeDecodeError):
        return str(getattr(function, "__qualname__", type(function).__name__))
