"""Several runs: which of them are training seeds of one method, and what holds for the method."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import curves, wording
from .folder import Folder


SEEDS = ("seed", "data_seed")  # what sets two runs of one method apart


@dataclass
class Method:
    """The runs of one method, one per training seed, what the page calls it, and the number of its colour."""

    label: str
    runs: list[Folder]
    colour: int = 0


def group(folders: Sequence[Folder], labels: Sequence[str] | None = None) -> list[Method]:
    """
    Runs of one label, or without labels runs that differ in nothing but their seed, are one method.

    Raises:
        ValueError: Another number of labels than of runs.
    """
    if labels is not None and len(labels) != len(folders):
        raise ValueError(f"there are {len(labels)} labels for {len(folders)} runs; give one per run.")
    groups: dict[str, list[Folder]] = {}
    for folder, key in zip(folders, labels or map(_fingerprint, folders), strict=True):
        groups.setdefault(key, []).append(folder)
    names = list(groups) if labels else _labels(groups)
    return [Method(name, runs, i) for i, (name, runs) in enumerate(zip(names, groups.values(), strict=True))]


def _settings(folder: Folder) -> dict[str, Any]:
    """The settings that change what is trained; the run itself says which of its settings do not."""
    others = folder.config.get("changes")
    others = others if isinstance(others, dict) else {"output_dir": "output"}
    own = {name: value for name, value in folder.settings.items() if name not in others and name not in SEEDS}
    top = ("method", "base_model", "reward_funcs", "reward_weights", "train_prompts")
    return own | {name: folder.config.get(name) for name in top}


def _fingerprint(folder: Folder) -> str:
    if not folder.config:
        return str(folder.path.resolve())
    return json.dumps(_settings(folder), sort_keys=True, default=str)


def _labels(groups: dict[str, list[Folder]]) -> list[str]:
    """The method's name, and what sets it apart from another group of that method."""
    firsts = [runs[0] for runs in groups.values()]
    labels = []
    for folder in firsts:
        if not folder.config:
            labels.append(folder.name)
            continue
        method, mine = folder.config["method"], _settings(folder)
        others = [_settings(f) for f in firsts if f is not folder and f.config.get("method") == method]
        different = [key for key in mine if any(mine[key] != other.get(key) for other in others)]
        note = ", ".join(f"{key} {_short(mine[key])}" for key in different[:3])
        labels.append(f"{wording.method(folder.config)}{f' ({note})' if note else ''}")
    return [label if labels.count(label) == 1 else f"{label} {i + 1}" for i, label in enumerate(labels)]


def _short(value: Any) -> str:
    return wording.setting(value)[:40]


def same_protocol(methods: Sequence[Method]) -> bool:
    """Whether every evaluated run was measured on the same prompts and noise; only then may they be compared."""
    keys = ("prompts_sha256", "images_per_prompt", "seed")
    protocols = [run.evaluation.get("protocol") or {} for method in methods for run in method.runs if run.evaluation]
    return len({json.dumps([protocol.get(key) for key in keys]) for protocol in protocols}) <= 1


def result_of(method: Method, reward: str, comparable: bool = True) -> dict[str, Any] | None:
    """
    What a method gains over its base under one reward, over its training seeds; `over` is what the interval covers.

    With every run's `scores.parquet` the interval covers prompts and seeds ([`~es_trl.evaluation.runs_difference`]);
    without, several runs give Student's interval of the mean over seeds, and one run its own interval over prompts.
    `None` when no run was evaluated under this reward.
    """
    means, own = [], []
    for run in method.runs:
        model, base = wording.main_rows(run.evaluation)
        entry = wording.paired_entry(run.evaluation, model["name"], base["name"], reward) if model and base else None
        if model is None or entry is None or entry.get("delta") is None or entry.get("win_rate") is None:
            continue
        means.append(model["rewards"][reward]["mean"])
        own.append(entry)
    if not own:
        return None
    deltas = [entry["delta"] for entry in own]
    low, high, over = own[0].get("ci_low"), own[0].get("ci_high"), "prompts"
    if len(deltas) > 1:
        found = _over_prompts_and_seeds(method, reward) if comparable and len(deltas) == len(method.runs) else None
        low, high = found or _over_seeds(deltas)
        over = "prompts and training seeds" if found else "training seeds"
    return {
        "mean": float(np.mean(means)), "delta": float(np.mean(deltas)), "low": low, "high": high, "deltas": deltas,
        "over": over, "win_rate": float(np.mean([entry["win_rate"] for entry in own])),
    }  # fmt: skip


def _over_seeds(deltas: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import t

    half = float(t.ppf(0.975, len(deltas) - 1)) * float(np.std(deltas, ddof=1)) / math.sqrt(len(deltas))
    return float(np.mean(deltas)) - half, float(np.mean(deltas)) + half


def _over_prompts_and_seeds(method: Method, reward: str) -> tuple[float, float] | None:
    scores = _scores(method, reward)
    if scores is None:
        return None
    found = _difference(method, scores[0], scores[1][:1])
    return found.low, found.high


def difference(first: Method, second: Method, reward: str):
    """
    How far one method is ahead of another on the same prompts and noise, over prompts and training seeds.

    Returns:
        [`~es_trl.evaluation.RunsDifference`]; `None` where a run has no `scores.parquet` with this reward.
    """
    one, other = _scores(first, reward), _scores(second, reward)
    return None if one is None or other is None else _difference(first, one[0], other[0])


def _difference(method: Method, models: list, references: list):
    from ..evaluation import runs_difference

    seed = (method.runs[0].evaluation.get("protocol") or {}).get("seed")
    return runs_difference(models, references, seed=seed if isinstance(seed, int) else 0)


def _scores(method: Method, reward: str) -> tuple[list, list] | None:
    """Per run (prompts, images) of the trained model, and of the base."""
    models: list[Any] = []
    references: list[Any] = []
    for run in method.runs:
        scores, column = run.scores(), f"reward/{reward}"
        model, base = wording.main_rows(run.evaluation)
        if scores is None or column not in scores.columns or model is None or base is None:
            return None
        for row, kept in ((model, models), (base, references)):
            mine = scores[scores["row"] == row["name"]]
            kept.append(mine.pivot(index="prompt_index", columns="image", values=column).to_numpy())
    return models, references


def budget(method: Method) -> tuple[float | None, float | None]:
    """Images and seconds of training, the mean over runs."""
    spent = zip(*(curves.spent(run.history) for run in method.runs), strict=True)
    images, seconds = ([value for value in values if value is not None] for values in spent)
    return float(np.mean(images)) if images else None, float(np.mean(seconds)) if seconds else None
