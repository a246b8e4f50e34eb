"""Tables of `eval.json` beside the main ones: methods over training runs, groups of prompts, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .rows import EvaluationRow
from .runs import runs_difference
from .statistics import paired_difference, prompt_means


GROUPINGS = ("category", "challenge")
EXPLORATORY_NOTE = (
    "Exploratory: many small groups were looked at and nothing was corrected for that. One in twenty intervals misses "
    "its true value; use these tables to ask questions, not to answer them."
)


class Scored(Protocol):
    """What the tables are made of; [`~es_trl.evaluation.Evaluation`] is one."""

    rows: list[EvaluationRow]
    reward_names: list[str]
    columns: dict[str, Sequence[Any]]
    resamples: int
    scores: dict[str, np.ndarray]

    @property
    def bootstrap_seed(self) -> int: ...

    def of(self, row: str, reward: str) -> np.ndarray: ...

    def comparisons(self) -> list[tuple[str, str]]: ...

    def method_of(self, row: EvaluationRow) -> str | None: ...


def methods(result: Scored) -> list[dict[str, Any]]:
    """Every method against the base and against every other method, over its training runs, at equal steps."""
    bases = {row.num_inference_steps: row for row in result.rows if row.kind == "base"}
    runs: dict[tuple[str | None, int | None], list[EvaluationRow]] = {}
    for row in result.rows:
        if row.kind == "adapter":
            runs.setdefault((result.method_of(row), row.num_inference_steps), []).append(row)
    entries = []
    for (method, steps), rows in runs.items():
        against: list[tuple[str | None, list[EvaluationRow]]] = (
            [(bases[steps].name, [bases[steps]])] if steps in bases else []
        )
        later = list(runs)[list(runs).index((method, steps)) + 1 :]
        against += [(other, runs[other, s]) for other, s in later if s == steps]
        for name, others in against:
            for reward in result.reward_names:
                found = runs_difference(
                    [result.of(row.name, reward) for row in rows],
                    [result.of(row.name, reward) for row in others],
                    result.resamples,
                    result.bootstrap_seed,
                )
                entries.append({
                    "method": method, "against": name, "num_inference_steps": steps, "reward": reward,
                    "runs": found.runs, "labels": [row.label or "adapter" for row in rows], "delta": found.delta,
                    "ci_low": found.low, "ci_high": found.high, "deltas": found.deltas, "run_std": found.run_std,
                    "prompts": found.prompts,
                })  # fmt: skip
    return entries


def exploratory(result: Scored) -> dict[str, Any] | None:
    """Differences to the base within each category and challenge; `None` without such columns."""
    groupings = [name for name in GROUPINGS if name in result.columns]
    pairs = [pair for pair in result.comparisons() if _plain_pair(result, *pair)]
    if not groupings or not pairs:
        return None
    entries = []
    for by in groupings:
        values = np.array([str(value) for value in result.columns[by]])
        for value in dict.fromkeys(values.tolist()):
            members = values == value
            for row, against in pairs:
                for reward in result.reward_names:
                    model, base = result.of(row, reward)[members], result.of(against, reward)[members]
                    found = paired_difference(model, base, result.resamples, result.bootstrap_seed)
                    entries.append({
                        "by": by, "value": value, "row": row, "against": against, "reward": reward,
                        "prompts": found.prompts, "delta": found.delta, "ci_low": found.low, "ci_high": found.high,
                        "win_rate": found.win_rate, "row_mean": _mean(model), "against_mean": _mean(base),
                    })  # fmt: skip
    return {"note": EXPLORATORY_NOTE, "entries": entries}


def checks(result: Scored) -> dict[str, Any]:
    """What must hold whatever the adapter is: at LoRA scale 0 it is the base."""
    bases = {row.num_inference_steps: row for row in result.rows if row.kind == "base"}
    for row in result.rows:
        if row.adapter and row.adapter_scale == 0.0 and row.num_inference_steps in bases:
            difference = np.abs(result.scores[row.name] - result.scores[bases[row.num_inference_steps].name])
            largest = float(np.nanmax(difference)) if np.isfinite(difference).any() else None
            return {"scale_zero_equals_base": {"row": row.name, "max_score_difference": largest}}
    return {}


def _plain_pair(result: Scored, row: str, against: str) -> bool:
    """An adapter as trained, or the base with more steps, against the first base."""
    kinds = {r.name: r.kind for r in result.rows}
    return kinds[row] in ("adapter", "base") and against == result.comparisons()[0][1]


def _mean(scores: np.ndarray) -> float:
    means = prompt_means(scores)
    return float(np.nanmean(means)) if np.isfinite(means).any() else float("nan")
