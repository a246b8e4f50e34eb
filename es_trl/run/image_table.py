"""The table of a step's images: prompt, rewards, and what the rewards said of them through `log_extra`."""

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..files import writing
from .processes import Peers
from .trackers import has_tracker, log_table


FOLDER = "images"
TRACKED_ROWS = 64  # of a table that a tracker gets; the file has all


class ImageTable(TrainerCallback):
    """
    The images of the newest step, in the order of its scores `(A, B, K)`: member and column, or prompt and image.

    At every log of `trainer` `images/images_000120.parquet` gets the images of that step, the trackers its first rows,
    as TRL has its table of completions. Only where a reward has something to say: without `log_extra` there is none.
    """

    def __init__(self, reward_names: Sequence[str], trainer=None):
        self.reward_names, self.trainer = list(reward_names), trainer
        self.step = -1
        self._extras: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._batches: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]] = {}

    def extras(self, step: int, micro: int) -> Callable[[Sequence[tuple[int, int]]], Callable[[str, Sequence], None]]:
        """
        A function that gives the `log_extra` for rewards that score some images, named by their places in the scores,
        of the batch `micro` of `step`. It raises `ValueError` for another number of values than images.
        """
        if step != self.step:
            self.step, self._extras, self._batches = step, {}, {}

        def log_extra(keys: Sequence[tuple[int, int]], column: str, values: Sequence) -> None:
            values = list(values)
            if len(values) != len(keys):
                raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {len(keys)} images")
            for key, value in zip(keys, values, strict=True):
                self._extras.setdefault((micro, *key), {})[str(column)] = _plain(value)

        return lambda keys: partial(log_extra, keys)

    def add(self, micro: int, scores: np.ndarray | torch.Tensor, **labels: Any) -> None:
        """
        Once a batch of the step has its scores `(A, B, K)` of all processes; `labels` are further columns, each of a
        shape that broadcasts to `(A, B)`.
        """
        scores = np.asarray(scores)
        labels = {name: np.broadcast_to(np.asarray(values), scores.shape[:2]) for name, values in labels.items()}
        self._batches[micro] = (scores, labels)

    def rows(self, step: int, peers: Peers) -> list[dict[str, Any]]:
        """
        A row per image of the step, of all processes; empty where no reward has called `log_extra`. Every process has
        to call it.
        """
        extras: dict[tuple[int, int, int], dict[str, Any]] = {}
        if step != self.step + 1:  # nothing was drawn in this step
            return []
        for part in peers.gather_json([[*key, said] for key, said in self._extras.items()]):
            for micro, a, b, said in part:
                extras.setdefault((micro, a, b), {}).update(said)
        columns = dict.fromkeys(column for said in extras.values() for column in said)
        rows = []
        for micro, (scores, labels) in sorted(self._batches.items()) if extras else ():
            for a, b in np.ndindex(*scores.shape[:2]):
                row = {"step": step} | {name: _plain(values[a, b]) for name, values in labels.items()}
                row |= {name: _plain(value) for name, value in zip(self.reward_names, scores[a, b], strict=True)}
                said = extras.get((micro, a, b), {})
                rows.append(row | {column: said.get(column) for column in columns if column not in row})
        return rows

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):  # of an evaluation, or the summary at the end
            return
        trainer = self.trainer
        rows = self.rows(state.global_step, trainer.peers)
        if not rows or not trainer.is_world_process_zero():
            return
        path = os.path.join(args.output_dir, FOLDER, f"images_{state.global_step:06d}.parquet")
        with trainer.folder.may_fail("The table of images"):
            write_table(path, rows)
        if has_tracker(trainer):
            log_table(trainer, FOLDER, rows[:TRACKED_ROWS])


def write_table(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as parquet, whole or not at all. A column of several kinds of values becomes text."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            columns[name] = pa.array([None if value is None else str(value) for value in values])
    with writing(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)


def _plain(value: Any) -> Any:
    """A value that JSON and parquet take: numbers and booleans as they are, anything else as text."""
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
