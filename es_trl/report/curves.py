"""Learning curves out of the log of a run: every reward against images and against seconds."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


TRAINING, VALIDATION = "training", "validation"


def learning_curves(history: Sequence[dict[str, Any]]):
    """
    The rewards in a log (`trainer_state.json`, entries with `step`) as a `pandas.DataFrame` of `step`, `images`,
    `seconds` (budget so far; NaN where the log does not tell), `kind` (`"training"`: the step's batch;
    `"validation"`: the unperturbed adapter on the evaluation prompts), `name` (the reward, or `"diversity"`), `value`.
    """
    import pandas

    budget = _budget(history)
    rows = []
    for entry in history:
        step = entry["step"]
        for key, value in entry.items():
            found = _meaning(key)
            if found is None or not isinstance(value, int | float):
                continue
            rows.append((step, budget(entry, "num_images"), budget(entry, "train_time"), *found, float(value)))
    frame = pandas.DataFrame(rows, columns=["step", "images", "seconds", "kind", "name", "value"])
    frame = frame.astype({"step": float, "images": float, "seconds": float, "value": float})
    # A resumed run may log a step twice, and the last evaluation may repeat one: the later entry counts.
    return frame.drop_duplicates(["step", "kind", "name"], keep="last").reset_index(drop=True)


def reward_names(curves, trained: Sequence[str] = ()) -> list[str]:
    """Rewards that have a curve: held out, trained, and diversity last."""
    names = list(dict.fromkeys(curves["name"]))
    return sorted(names, key=lambda name: (name == "diversity", name in trained, names.index(name)))


def spent(history: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Images and seconds of the whole run, as far as the log tells."""
    if not history:
        return None, None
    budget, last = _budget(history), max(history, key=lambda entry: entry["step"])
    images, seconds = budget(last, "num_images"), budget(last, "train_time")
    return images if 0 < images < np.inf else None, seconds if 0 < seconds < np.inf else None


def _meaning(key: str) -> tuple[str, str] | None:
    kind = VALIDATION if key.startswith("eval_") else TRAINING
    name = key.removeprefix("eval_")
    if name.startswith("rewards/") and name.endswith("/mean"):
        return kind, name.removeprefix("rewards/").removesuffix("/mean")
    return (VALIDATION, "diversity") if key == "eval_diversity" else None


def _budget(history: Sequence[dict[str, Any]]):
    """A function (entry, "num_images" or "train_time") -> what was spent; entries that do not say are in between."""
    steps = sorted((e for e in history if "step_time" in e or "num_images" in e), key=lambda entry: entry["step"])
    known: dict[str, tuple[list[float], list[float]]] = {}
    for name in ("num_images", "train_time"):
        points = {entry["step"]: float(entry[name]) for entry in steps if isinstance(entry.get(name), int | float)}
        known[name] = (list(points), list(points.values()))
    if not known["train_time"][0]:
        timed = [entry for entry in steps if isinstance(entry.get("step_time"), int | float)]
        at = [entry["step"] for entry in timed]
        spans = [e["step_time"] * (e["step"] - before) for e, before in zip(timed, [0, *at], strict=False)]
        known["train_time"] = (at, list(itertools.accumulate(spans)))

    def spent_at(entry: dict[str, Any], name: str) -> float:
        own = entry.get(name)
        if isinstance(own, int | float):
            return float(own)
        at, values = known[name]
        return float(np.interp(entry["step"], [0, *at], [0.0, *values])) if at else float("nan")

    return spent_at
