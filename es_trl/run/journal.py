"""journal.jsonl: one line per step with all that its update followed from, so that a run can be replayed."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import append_whole, read_lines, sync, write_lines


if TYPE_CHECKING:
    import torch


JOURNAL = "journal.jsonl"


def encode_scores(scores: torch.Tensor) -> str:
    """fp64 scores as base64 of their little-endian bytes: exact, NaN and infinities included."""
    return base64.b64encode(scores.contiguous().numpy().astype("<f8").tobytes()).decode("ascii")


def decode_scores(shape: Sequence[int], text: str) -> torch.Tensor:
    """Inverse of [`encode_scores`]. Raises `ValueError` for anything else."""
    if not isinstance(text, str) or not isinstance(shape, list) or len(shape) != 3:
        raise ValueError("scores are base64 text with a shape of three numbers")
    if not all(type(n) is int and 0 <= n <= 2**31 for n in shape):
        raise ValueError(f"the shape {shape} is not made of counts")
    import numpy as np
    import torch

    data = base64.b64decode(text, validate=True)
    if len(data) != 8 * shape[0] * shape[1] * shape[2]:
        raise ValueError(f"{len(data)} bytes are not the scores of a shape {shape}")
    return torch.from_numpy(np.frombuffer(data, "<f8").astype(np.float64).reshape(shape))


class Journal:
    """
    Appends to `journal.jsonl` of a run folder, where this process writes (`enabled`).

    A `start` line opens every `train()` call with the settings; each training step adds one line per prompt batch:
    `{"step", "micro", "prompts", "theta", "shape", "scores"}`, where `theta` is the digest of the adapter that the
    population was drawn around. Noise and latents are functions of the seed and need no line.

    A line that the disk refuses leaves no trace in the file; it is kept, and written before the next one. The
    `OSError` goes to the context manager that `may_fail` makes.
    """

    def __init__(self, folder: str | os.PathLike, enabled: bool, may_fail: Callable[[str], AbstractContextManager]):
        self.path, self.enabled, self.may_fail = Path(folder, JOURNAL), enabled, may_fail
        self._unwritten = ""

    def start(self, step: int, run: Mapping[str, Any]) -> None:
        """Opens the journal at `step`: lines of later steps, which the resumed run will write again, are cut off."""
        if not self.enabled:
            return
        self._unwritten = ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut(step)
        self._append({"start": step, "run": run})

    def write(self, step: int, micro: int, prompts: Sequence[str], theta: str, scores: torch.Tensor) -> None:
        """
        The line of a prompt batch: `J` prompts, and `(N, J, K)` fp64 scores of what was drawn around the adapter
        `theta`.
        """
        if self.enabled:
            entry = {"step": step, "micro": micro, "theta": theta, "prompts": list(prompts)}
            self._append(entry | {"shape": list(scores.shape), "scores": encode_scores(scores)})

    def sync(self) -> None:
        """Brings all lines to the disk, or raises `OSError`, so that a checkpoint never stands without them."""
        self._write()
        if self.enabled and self.path.exists():
            sync(self.path)

    def _append(self, entry: dict[str, Any]) -> None:
        self._unwritten += json.dumps(entry, default=str) + "\n"
        with self.may_fail(f"A line of {JOURNAL}"):
            self._write()

    def _write(self) -> None:
        if self._unwritten:
            append_whole(self.path, self._unwritten)
            self._unwritten = ""

    def _cut(self, step: int) -> None:
        if not self.path.exists():
            return
        if step == 0:
            self.path.unlink()
            return
        entries = ((entry.get("start", entry.get("step")), entry) for entry in read_lines(self.path))
        write_lines(self.path, (entry for at, entry in entries if isinstance(at, int) and at < step))
