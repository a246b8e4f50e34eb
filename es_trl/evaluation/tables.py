"""Tables of `eval.json` beside the main ones: methods over training runs, groups of prompts, and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import EvaluationRow
from .runs import runs_difference
from .statistics import overall_mean


if TYPE_CHECKING:
    from .result import Evaluation


GROUPINGS = ("category", "challenge")
EXPLORATORY_NOTE = (
    "Exploratory: many small groups were looked at and nothing was corrected for that. One in twenty intervals misses "
    "its true value; use these tables to ask questions, not to answer them."
)


def methods(result: Evaluation) -> list[dict[str, Any]]:
    """Every method against the base and against every other method, over its training runs, at equal steps."""
    bases = {row.num_inference_steps: row for row in result.rows if row.kind == "base"}
    runs: dict[tuple[str | None, int | None], list[EvaluationRow]] = {}
    for row in result.rows:
        if row.kind == "adapter":
            runs.setdefault((result.method_of(row), row.num_inference_steps), []).append(row)
    entries = []
    for (method, steps), rows in runs.items():
        against: list[tuple[str | None, list[EvaluationRow]]] = []
        if steps in bases:
            against.append((bases[steps].name, [bases[steps]]))
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


def exploratory(result: Evaluation) -> dict[str, Any] | None:
    """Differences to the base within each category and challenge; `None` without such columns."""
    groupings = [name for name in GROUPINGS if name in result.columns]
    plain = {row.name for row in result.rows if row.kind in ("adapter", "base")}
    comparisons = result.comparisons()  # those of plain rows with the first base
    pairs = [(row, against) for row, against in comparisons if row in plain and against == comparisons[0][1]]
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
                    found = result.difference(model, base)
                    entries.append({
                        "by": by, "value": value, "row": row, "against": against, "reward": reward,
                        "prompts": found.prompts, "delta": found.delta, "ci_low": found.low, "ci_high": found.high,
                        "win_rate": found.win_rate,
                        "row_mean": overall_mean(model), "against_mean": overall_mean(base),
                    })  # fmt: skip
    return {"note": EXPLORATORY_NOTE, "entries": entries}


def checks(result: Evaluation) -> dict[str, Any]:
    """What must hold whatever the adapter is: at LoRA scale 0 it is the base."""
    bases = {row.num_inference_steps: row for row in result.rows if row.kind == "base"}
    for row in result.rows:
        if row.adapter and row.adapter_scale == 0.0 and row.num_inference_steps in bases:
            difference = np.abs(result.scores[row.name] - result.scores[bases[row.num_inference_steps].name])
            largest = float(np.nanmax(difference)) if np.isfinite(difference).any() else None
            return {"scale_zero_equals_base": {"row": row.name, "max_score_difference": largest}}
    return {}
