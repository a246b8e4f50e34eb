"""What an evaluation found: the scores, and the tables made of them (`eval.json`)."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..es.keys import make_seed
from .statistics import (
    gap_closure,
    mean_estimate,
    paired_difference,
    percentile_interval,
    prompt_means,
    wilson_interval,
)


if TYPE_CHECKING:
    from .judge import ClipJudge
    from .protocol import EvaluationRow


@dataclass
class Evaluation:
    """
    Scores of every row on the same prompts and initial noise.

    Args:
        rows (`list[EvaluationRow]`): The models, with their steps filled in.
        reward_names (`list[str]`): The K rewards.
        prompts (`list[str]`): The P prompts.
        seed, resamples (`int`): Seed of noise and bootstrap; number of bootstrap resamples.
        settings (`dict`): The pipeline's call, from [`~es_trl.pipelines.PipelineAdapter.describe`].
        scores (`dict[str, np.ndarray]`): Per row (P, J, K) float64, NaN where a reward gave none.
        images (`dict[str, list[list[PIL.Image.Image]]]`): Per row the J pictures of the first prompts.
        judge_scores (`dict[str, dict[str, np.ndarray]]`): Per row and metric of the judge (P, J) or (P, 1).
        distances (`dict[str, tuple[float, np.ndarray]]`): Per row the Frechet distance and its bootstrap draws.
    """

    rows: "list[EvaluationRow]"
    reward_names: list[str]
    prompts: list[str]
    seed: int
    resamples: int
    settings: dict[str, Any]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, list[list[Image.Image]]] = field(default_factory=dict)
    judge_scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    distances: dict[str, tuple[float, np.ndarray]] = field(default_factory=dict)

    @property
    def bootstrap_seed(self) -> int:
        """Seed of every resampling, so that all intervals of one table come from the same resamples."""
        return make_seed(self.seed, "bootstrap")

    def of(self, row: str, reward: str) -> np.ndarray:
        """Scores (P, J) of one row under one reward."""
        return self.scores[row][:, :, self.reward_names.index(reward)]

    def mean(self, row: str, reward: str) -> float:
        """Mean over prompts of one row under one reward; NaN when nothing was scored."""
        means = prompt_means(self.of(row, reward))
        return float(np.nanmean(means)) if np.isfinite(means).any() else math.nan

    def judge_row(self, row: str, features: np.ndarray, judge: "ClipJudge"):
        """Adds the judge's metrics of a row from its image features (P, J, D)."""
        self.judge_scores[row] = judge.prompt_scores(self.prompts, features)
        if judge.real is not None:
            self.distances[row] = judge.real.distance(features), judge.real.resample(features, self.bootstrap_seed)

    def comparisons(self) -> list[tuple[str, str]]:
        """
        The pairs (row, against): every other row against the base with the fewest steps, then every row with an
        adapter against the remaining base rows. Empty without a base row.
        """
        bases = sorted((row for row in self.rows if not row.adapter), key=lambda row: row.num_inference_steps)
        if not bases:
            return []
        first, *others = bases
        pairs = [(row.name, first.name) for row in self.rows if row is not first]
        return pairs + [(row.name, other.name) for other in others for row in self.rows if row.adapter]

    def gap_rows(self) -> tuple[str, str, str] | None:
        """
        The rows (model, base, target) of the gap closure: the first row with an adapter, the base with the fewest
        steps, and the base with the next more. `None` when one of them is missing.
        """
        bases = sorted((row for row in self.rows if not row.adapter), key=lambda row: row.num_inference_steps)
        models = [row for row in self.rows if row.adapter]
        targets = [row for row in bases if row.num_inference_steps > bases[0].num_inference_steps]
        return (models[0].name, bases[0].name, targets[0].name) if models and targets else None

    def to_dict(self) -> dict[str, Any]:
        """
        The tables as plain data, ready for JSON. A number that does not exist (nothing scored, no gap) is `None`.

        Returns:
            `dict` with `rows`, `paired`, `gap_closure`, `gap_closure_ci`, `gap_closure_rows`, `protocol`, and
            `paired_judge` when a judge was given. docs/evaluation.md explains every field.
        """
        table = {
            "rows": [self._row(row) for row in self.rows],
            "paired": [self._paired(*pair, reward) for pair in self.comparisons() for reward in self.reward_names],
        }
        if self.judge_scores:
            table["paired_judge"] = [entry for pair in self.comparisons() for entry in self._paired_judge(*pair)]
        table |= self._gap_closure()
        table["protocol"] = {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest(),
            "images_per_prompt": next(iter(self.scores.values())).shape[1],
            "seed": self.seed,
            "resamples": self.resamples,
            "confidence": 0.95,
            "unit": "prompt",
            "pipeline": self.settings,
        }
        return _plain(table)

    def save(self, path: str | os.PathLike) -> str:
        """Writes [`to_dict`] as JSON, whole or not at all, and returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
        return str(path)

    def _row(self, row: "EvaluationRow") -> dict[str, Any]:
        entry = {
            "name": row.name,
            "adapter": row.adapter,
            "num_inference_steps": row.num_inference_steps,
            "adapter_scale": row.adapter_scale,
            "rewards": {reward: self._summary(self.of(row.name, reward)) for reward in self.reward_names},
        }
        if row.name in self.judge_scores:
            entry["judge"] = {name: self._summary(values) for name, values in self.judge_scores[row.name].items()}
            for name in ("retrieval_accuracy", "hard_negative_accuracy"):
                self._use_wilson(entry["judge"].get(name))
        if row.name in self.distances:
            value, draws = self.distances[row.name]
            low, high = _centred(value, draws)
            entry["judge"]["frechet_distance"] = {"mean": value, "ci_low": low, "ci_high": high}
        return entry

    def _summary(self, scores: np.ndarray) -> dict[str, Any]:
        estimate = mean_estimate(scores, self.resamples, self.bootstrap_seed)
        means = prompt_means(scores)
        means = means[np.isfinite(means)]
        return {
            "mean": estimate.value,
            "std": float(means.std(ddof=1)) if len(means) > 1 else math.nan,
            "ci_low": estimate.low,
            "ci_high": estimate.high,
            "prompts": estimate.prompts,
            "missing": int((~np.isfinite(scores)).sum()),
        }

    @staticmethod
    def _use_wilson(share: dict[str, Any] | None):
        # Resampling an accuracy of 1 gives an interval without width. Wilson's is wide enough for several images too:
        # the mean of a prompt's images varies no more than a single one does.
        if share is not None:
            share["ci_low"], share["ci_high"] = wilson_interval(share["mean"], share["prompts"])

    def _paired(self, row: str, against: str, reward: str) -> dict[str, Any]:
        found = paired_difference(self.of(row, reward), self.of(against, reward), self.resamples, self.bootstrap_seed)
        return {
            "row": row,
            "against": against,
            "reward": reward,
            "delta": found.delta,
            "ci_low": found.low,
            "ci_high": found.high,
            "win_rate": found.win_rate,
            "win_rate_ci_low": found.win_low,
            "win_rate_ci_high": found.win_high,
            "prompts": found.prompts,
            "missing": found.missing,
        }

    def _paired_judge(self, row: str, against: str) -> list[dict[str, Any]]:
        entries = []
        for metric, values in self.judge_scores[row].items():
            found = paired_difference(values, self.judge_scores[against][metric], self.resamples, self.bootstrap_seed)
            entries.append((metric, found.delta, found.low, found.high))
        if row in self.distances:
            (value, draws), (reference, reference_draws) = self.distances[row], self.distances[against]
            delta = value - reference
            entries.append(("frechet_distance", delta, *_centred(delta, draws - reference_draws)))
        names = ("metric", "delta", "ci_low", "ci_high")
        return [{"row": row, "against": against, **dict(zip(names, entry, strict=True))} for entry in entries]

    def _gap_closure(self) -> dict[str, Any]:
        rows = self.gap_rows()
        closures = {}
        for reward in self.reward_names if rows else []:
            model, base, target = (self.of(row, reward) for row in rows)
            closures[reward] = gap_closure(model, base, target, self.resamples, self.bootstrap_seed)
        return {
            "gap_closure": {reward: closure.value for reward, closure in closures.items()},
            "gap_closure_ci": {reward: [closure.low, closure.high] for reward, closure in closures.items()},
            "gap_closure_rows": dict(zip(("model", "base", "target"), rows, strict=True)) if rows else None,
        }


def _centred(value: float, draws: np.ndarray) -> tuple[float, float]:
    """
    Interval of a Frechet distance. A resample holds fewer different pictures than the sample, which moves every draw
    upwards, so the draws are moved back to the estimate before their percentiles are taken.
    """
    return percentile_interval(draws - draws.mean() + value)


def _plain(value):
    """Python numbers for JSON, `None` for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
