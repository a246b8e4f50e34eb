"""Finished rows on disk: what `resume=True` takes again, once the settings are the same, field by field."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_text, writing
from .result import Evaluation, plain, prompts_sha256
from .rows import Draw
from .sharing import PromptShare


if TYPE_CHECKING:
    from ..pipelines import LoadedAdapters, PipelineAdapter
    from ..rewards import RewardSet


logger = logging.getLogger(__name__)

FOLDER, SETTINGS = "journal", "settings.json"
# What an evaluation leaves in its folder, and what steps aside for another one.
LEFT_BEHIND = ("eval.json", "eval.md", "scores.parquet", "prompts.jsonl", "images", "report", FOLDER)


class Journal:
    """
    The folder `journal/` of an evaluation: its settings, and the scores of every row that was finished.

    Nothing of it is read unless `resume` asks for it. Without, what another evaluation left in `output_dir` is moved
    into `output_dir/earlier-<n>` and this one starts afresh.

    Args:
        output_dir (`str` or `Path`): The evaluation's folder, seen by all processes, of which the first writes.
        settings (`dict`): What was asked for, as plain data, from [`settings_of`].
        resume (`bool`): Whether finished rows of these very settings are taken again.
        share ([`PromptShare`]): Of the processes.

    Raises:
        ValueError: `resume` where there is nothing to go on with, or with other settings; the message says which.
    """

    def __init__(self, output_dir: str | os.PathLike[str], settings: dict[str, Any], resume: bool, share: PromptShare):
        self.folder, self.resume = Path(output_dir, FOLDER), resume
        self.writes = share.process_index == 0
        if resume:
            _refuse_others(self.folder / SETTINGS, settings)
        elif self.writes:
            _move_aside(Path(output_dir))
            self.folder.mkdir(parents=True)
            write_text(self.folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        share.barrier()

    def read(self, draw: Draw) -> dict[str, np.ndarray] | None:
        """The arrays (P, M, ...) of a finished row, by name; `None` without it."""
        path = self.folder / f"{draw.folder}.safetensors"
        if not (self.resume and path.is_file()):
            return None
        from safetensors.numpy import load_file

        logger.info("%s: taken from %s, as resume asks", draw.folder, path)
        return load_file(path)

    def write(self, draw: Draw, arrays: dict[str, np.ndarray]) -> None:
        """Keeps a finished row, whole or not at all."""
        if not self.writes:
            return
        from safetensors.numpy import save_file

        whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        with writing(self.folder / f"{draw.folder}.safetensors") as path:
            save_file(whole, path)


def settings_of(
    result: Evaluation, rewards: RewardSet, drawer: PipelineAdapter | LoadedAdapters, batch_size: int
) -> dict[str, Any]:
    """
    What was asked for, as plain data that can be compared with what is on disk. Names stand for what they name:
    whether weights, a server or a function are still the same is seen by [`Measurement`], from their scores.
    """
    scheduler = getattr(drawer.pipe, "scheduler", None)
    settings = {
        "model": result.details.get("model"),
        "dtype": result.details.get("dtype"),
        "pipeline": result.settings,
        "pipeline_kwargs": drawer.settings.extra,
        "scheduler": {"class": type(scheduler).__name__, **dict(getattr(scheduler, "config", {}))},
        "adapters": {adapter.label: adapter.sha256 for adapter in result.adapters},
        "rows": [row.name for row in result.rows],
        "prompts": prompts_sha256(result.prompts),
        "columns": {name: _sha256(list(values)) for name, values in result.columns.items()},
        "seeds": list(result.noise.seeds),
        "images_per_prompt": result.noise.images_per_seed,
        "batch_size": batch_size,
        "rewards": rewards.specs,
        "trained_rewards": result.trained,
        "judge": result.details["judge"],
        "diversity_features": result.details["diversity_features"],
    }
    return json.loads(json.dumps(plain(settings), default=str))


def _sha256(values: list[Any]) -> str | None:
    """Of texts, numbers, dates, arrays, pictures, lists and dicts of them; `None` with anything else among them."""

    def described(value: Any) -> Any:
        if hasattr(value, "tobytes") and str(getattr(value, "dtype", "")) != "object":  # an array or a picture
            kind = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
            return [*kind, hashlib.sha256(value.tobytes()).hexdigest()]
        if hasattr(value, "isoformat"):
            return value.isoformat()
        raise TypeError(type(value).__name__)

    try:
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=described).encode()).hexdigest()
    except TypeError:
        return None


def _refuse_others(path: Path, settings: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"resume: {str(path.parent.parent)!r} holds no evaluation to go on with: leave resume out.")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"resume: {path} cannot be read ({error}): leave resume out to start afresh.") from error
    unknown = [name for name, digest in settings["columns"].items() if digest is None]
    if unknown:
        raise ValueError(
            f"resume: column {unknown[0]!r} holds values that cannot be compared with those of the first attempt "
            "(texts, numbers, dates, arrays and pictures can): leave resume out to start afresh."
        )
    names = [name for name in sorted({*saved, *settings}) if saved.get(name) != settings.get(name)]
    changed = [f"{name}: {_short(saved.get(name))} -> {_short(settings.get(name))}" for name in names]
    if changed:
        raise ValueError(
            f"resume: {str(path.parent.parent)!r} holds another evaluation ({'; '.join(changed)}): give the same "
            "command, or leave resume out to start afresh."
        )


def _move_aside(folder: Path) -> None:
    found = [folder / name for name in LEFT_BEHIND if (folder / name).exists()]
    if not found:
        return
    aside = next(path for n in itertools.count(1) if not (path := folder / f"earlier-{n}").exists())
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    text = "%s holds an earlier evaluation: it is now %s, and this one starts afresh (resume=True, --resume, goes on "
    logger.warning(text + "with an interrupted one).", folder, aside)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
