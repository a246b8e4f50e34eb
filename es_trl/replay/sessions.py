"""The sessions of a run, read from its journal; needs nothing but JSON, so that a wrong folder is said at once."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_lines
from ..run.journal import JOURNAL


class ReplayError(ValueError):
    """The journal is missing, incomplete, or not that of this adapter."""


@dataclass
class Session:
    """
    Neighbouring `train()` calls with the same settings: the step it began with, the record its journal opened with,
    and the journal's lines by step and prompt batch.
    """

    start: int
    run: dict[str, Any]
    lines: dict[int, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))


def read_journal(run: str | os.PathLike[str]) -> list[Session]:
    """The sessions of a run. Raises `ReplayError` without a journal, or with one that does not begin at step 0."""
    path = Path(run, JOURNAL)
    if not path.is_file():
        raise ReplayError(f"there is no {JOURNAL} in {os.fspath(run)!r}: give the output_dir of an ES run.")
    sessions: list[Session] = []
    for entry in read_lines(path):
        if isinstance(entry.get("start"), int) and isinstance(entry.get("run"), dict):
            if not sessions or _computed(entry["run"]) != _computed(sessions[-1].run):
                sessions.append(Session(entry["start"], entry["run"]))
        elif sessions and isinstance(entry.get("step"), int) and isinstance(entry.get("micro"), int):
            sessions[-1].lines[entry["step"]][entry["micro"]] = entry
        else:
            raise ReplayError(f"{path} holds a line that is neither a start nor a step: {str(entry)[:80]}.")
    if not sessions or sessions[0].start != 0:
        raise ReplayError(f"{path} does not begin at step 0, so nothing can be replayed from its start.")
    return sessions


def _computed(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that decides what a step computes; the record says which of its settings do not."""
    others, settings = (found if isinstance(found := run.get(key), dict) else {} for key in ("changes", "config"))
    config = {name: value for name, value in settings.items() if name not in others}
    return {"config": config} | {k: run.get(k) for k in ("base_model", "reward_weights", "train_prompts", "lora")}
