"""What lies in a run folder or an evaluation folder; whatever is missing or damaged is simply not there."""

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_lines
from ..hub import adapter_digest, judged


logger = logging.getLogger(__name__)


@dataclass
class Folder:
    """
    A folder that training or `es-trl eval` left.

    Args:
        path (`Path`): Where it lies.
        evaluation (`dict`): `eval.json`; empty when it judged another adapter than the one in the folder.
        config (`dict`): What ran (`es_config.json`): method, base model, rewards and settings; empty for evaluations.
        env (`dict`): Versions and hardware.
        history (`list[dict]`): The log of the run, in order; empty for evaluations.
        samples (`list[dict]`): `samples/metadata.jsonl`: `file_name`, `step`, `prompts`, and `members` and `tiles` for
            pictures of the population.
        refused (`str`, *optional*): Why an `eval.json` that is there is not shown.
    """

    path: Path
    evaluation: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run; empty for evaluations."""
        return self.config.get("config") or {}

    @property
    def trained(self) -> list[str]:
        """Names of the rewards that were optimised, as far as the folder says."""
        if self.config.get("reward_funcs"):
            return list(self.config["reward_funcs"])
        parts = (self.evaluation.get(name) for name in ("rewards", "protocol"))
        rewards, protocol = (found if isinstance(found, dict) else {} for found in parts)
        marked = [name for name, entry in rewards.items() if isinstance(entry, dict) and entry.get("optimised")]
        return marked or list(protocol.get("trained_rewards") or [])

    @property
    def weights(self) -> dict[str, float]:
        """The optimised rewards with their weights, 1 where nobody said otherwise."""
        evaluation = self.evaluation
        said = self.config.get("reward_weights") or [
            (evaluation.get("rewards") or {}).get(name, {}).get("weight") for name in self.trained
        ]
        return {name: 1.0 if weight is None else weight for name, weight in zip(self.trained, said, strict=False)}

    @property
    def watched(self) -> list[str]:
        """Names of the rewards that the run measured while it trained, and did not optimise."""
        return [str(name) for name in self.config.get("eval_reward_funcs") or []]

    def file(self, name: str) -> Path | None:
        """A file below this folder by its relative name; `None` when there is none, or the name leads out."""
        path = self.path / name
        inside = path.resolve().is_relative_to(self.path.resolve())
        return path if inside and path.is_file() else None

    def scores(self):
        """`scores.parquet` as a `pandas.DataFrame`, one line per row, prompt and image; `None` without it."""
        return _frame(self.file("scores.parquet"))

    def said(self):
        """The newest `images/images_<step>.parquet`, what rewards said of a step's images; `None` without one."""
        names = sorted(path.name for path in self.path.glob("images/images_*.parquet"))
        return _frame(self.file(f"images/{names[-1]}")) if names else None


def _frame(path: Path | None):
    """A parquet file as a `pandas.DataFrame`; a damaged one costs the page a part, not the run."""
    if path is None:
        return None
    import pandas

    try:
        return pandas.read_parquet(path)
    except Exception as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None


def read_folder(path: str | os.PathLike) -> Folder:
    """
    Reads a folder.

    Raises:
        ValueError: `path` is no folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder; give one that training or `es-trl eval` wrote.")
    evaluation = _json(path / "eval.json", dict) or {}
    if evaluation and not isinstance(evaluation.get("rows"), list):
        logger.warning("%s has no rows; it is left out.", path / "eval.json")
        evaluation = {}
    refused, digest = None, adapter_digest(path)
    if evaluation and digest is not None and not judged(evaluation, digest):
        refused = (
            "The eval.json in this folder judged another adapter than the one here, so nothing of it is shown. "
            f"This adapter has not been evaluated: es-trl eval --adapter {path} does that."
        )
        logger.warning("%s: %s", path, refused)
        evaluation = {}
    checkpoints = sorted((file.parent for file in path.glob("checkpoint-*/trainer_state.json")), key=_step_of)
    places = [path, *reversed(checkpoints)]  # what a run that was killed left is in its newest checkpoint
    states = (_json(place / "trainer_state.json", dict) for place in places)
    state: dict[str, Any] = next(filter(None, states), {})
    history = state.get("log_history") or []
    files = [file for place in places for file in sorted(place.glob("*_config.json"))]
    config: dict[str, Any] = next((found for file in files if (found := _json(file, dict))), {})
    sheets = path / "samples" / "metadata.jsonl"
    samples = read_lines(sheets) if sheets.is_file() else ()
    return Folder(
        path,
        evaluation,
        config if "method" in config else {},
        _json(path / "env.json", dict) or {},
        [entry for entry in history if isinstance(entry, dict) and "step" in entry],
        [entry for entry in samples if {"file_name", "step"} <= set(entry)],
        refused,
    )


def _step_of(path: Path) -> int:
    found = re.search(r"checkpoint-(\d+)", path.name)
    return int(found.group(1)) if found else -1


def _json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is left out: %s", path, error)
        return None
    return found if isinstance(found, kind) else None
