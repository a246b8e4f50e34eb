"""What an evaluation found: the scores, and the tables made of them (`eval.json`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..es.keys import make_seed
from ..files import write_text
from ..rewards.results import weighted_total
from . import statistics
from .looks import LOOKS
from .noise import Noise
from .tables import checks, exploratory, methods


if TYPE_CHECKING:
    from .adapters import AdapterSource
    from .judge import DiversityJudge
    from .rows import EvaluationRow


@dataclass
class Evaluation:
    """
    Scores of every row on the same prompts and initial noise.

    Args:
        rows (`list[EvaluationRow]`): The models, with their steps filled in.
        reward_names (`list[str]`): The K rewards.
        prompts (`list[str]`): The P prompts.
        noise ([`Noise`]): What every image starts from; its first seed also seeds the bootstrap.
        resamples (`int`): Number of bootstrap resamples.
        settings (`dict`): The pipeline's call, from [`~es_trl.pipelines.PipelineAdapter.describe`].
        scores (`dict[str, np.ndarray]`): Per row (P, J, K) float64, NaN where a reward gave none.
        images (`dict[str, list[list[PIL.Image.Image]]]`): Per row the J pictures of the first prompts.
        judge_scores (`dict[str, dict[str, np.ndarray]]`): Per row and metric of the judge (P, J) or (P, 1).
        distances (`dict[str, tuple[float, np.ndarray]]`): Per row the Frechet distance and its bootstrap draws.
        looks (`dict[str, np.ndarray]`): Per row (P, J, 6), how the pictures look ([`LOOKS`]); NaN for those that an
            interrupted evaluation had scored before.
        image_index (`dict[str, np.ndarray]`): Per row (P, J), which drawn image counts; differs for best-of rows only.
        images_drawn (`dict[str, int]`): Per row, how many images it cost.
        trained (`dict[str, float]`, *optional*): The optimised rewards with their weights; `None` when nobody said.
        rising (`Sequence[str]`): Rewards that more sampling steps should improve, from
            [`~es_trl.rewards.RewardSet.rising`]: only they have a gap to close.
        columns (`dict[str, list]`): Further columns of the prompts, of length P: "category", "challenge", ...
        adapters (`list[AdapterSource]`): The adapters that were loaded, if any.
        pictures (`list[dict]`): The pairs of images that were saved.
        strengths (`dict`, *optional*): The pictures at several LoRA strengths, from [`save_pictures`].
        details (`dict`): Further entries of `protocol`: model, command, seconds, ...
    """

    rows: list[EvaluationRow]
    reward_names: list[str]
    prompts: list[str]
    noise: Noise
    resamples: int
    settings: dict[str, Any]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, list[list[Image.Image]]] = field(default_factory=dict)
    judge_scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    distances: dict[str, tuple[float, np.ndarray]] = field(default_factory=dict)
    looks: dict[str, np.ndarray] = field(default_factory=dict)
    image_index: dict[str, np.ndarray] = field(default_factory=dict)
    images_drawn: dict[str, int] = field(default_factory=dict)
    trained: dict[str, float] | None = None
    rising: Sequence[str] = ()
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    adapters: list[AdapterSource] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    strengths: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def bootstrap_seed(self) -> int:
        """Seed of every resampling, so that all intervals of one table come from the same resamples."""
        return make_seed(self.noise.seeds[0], "bootstrap")

    def of(self, row: str, reward: str) -> np.ndarray:
        """Scores (P, J) of one row under one reward."""
        return self.scores[row][:, :, self.reward_names.index(reward)]

    def mean(self, row: str, reward: str) -> float:
        """Mean over prompts of one row under one reward; NaN when nothing was scored."""
        return statistics.overall_mean(self.of(row, reward))

    def mean_total(self, row: str) -> float:
        """Mean over prompts of [`total`] of one row; NaN when nothing was scored."""
        return statistics.overall_mean(self.total(self.scores[row]))

    def difference(self, model: np.ndarray, reference: np.ndarray) -> statistics.PairedDifference:
        """[`paired_difference`] of scores of one shape, over this table's resamples."""
        return statistics.paired_difference(model, reference, self.resamples, self.bootstrap_seed)

    def add_row(
        self, row: EvaluationRow, scores: np.ndarray, features: np.ndarray | None, judge: DiversityJudge | None
    ) -> np.ndarray:
        """
        Adds a row, a best of N (1 for most), from what was drawn for it, M >= J N images per prompt: image n J + j is
        try n of image j. Of these are the scores (P, M, K), and the features (P, M, D) that a judge makes metrics of.

        Returns:
            `np.ndarray`: (P, J) int, the images that count.
        """
        prompts, j, n = len(scores), self.noise.images_per_prompt, row.best_of
        picked = np.tile(np.arange(j), (prompts, 1))
        if n > 1:
            tries = self.total(scores[:, : j * n]).reshape(prompts, n, j)
            best = np.where(np.isfinite(tries), tries, -np.inf).argmax(axis=1)  # the first one where none is scored
            picked = best * j + picked
        self.image_index[row.name], self.images_drawn[row.name] = picked, prompts * j * n
        self.scores[row.name] = np.take_along_axis(scores, picked[:, :, None], axis=1)
        if judge is not None:
            features = np.take_along_axis(features, picked[:, :, None], axis=1)
            unseen = np.isnan(features).any(axis=2)  # pictures without a score have none by the judge either
            judged = judge.prompt_scores(self.prompts, np.nan_to_num(features))
            for values in judged.values():
                values[unseen if values.shape == unseen.shape else unseen.any(axis=1)] = np.nan
            self.judge_scores[row.name] = judged
            if judge.real is not None and not unseen.any():
                draws = judge.real.resample(features, self.bootstrap_seed)
                self.distances[row.name] = judge.real.distance(features), draws
        return picked

    def total(self, scores: np.ndarray) -> np.ndarray:
        """
        The optimised rewards of pictures of the same prompts, weighted and summed as in training (`weighted_total`):
        (P, M, K) -> (P, M). A best-of row chooses by it, and `eval_reward` is its mean.
        """
        own = self.trained or {}
        trained = [k for k, name in enumerate(self.reward_names) if name in own]
        weights = np.array([own[self.reward_names[k]] for k in trained])
        return weighted_total(scores[..., trained], weights)

    def _bases(self) -> list[EvaluationRow]:
        return sorted((row for row in self.rows if row.kind == "base"), key=lambda row: row.num_inference_steps or 0)

    def comparisons(self) -> list[tuple[str, str]]:
        """
        The pairs (row, against): every other row against the base with the fewest steps, then every row with an
        adapter against the remaining base rows and the best-of rows. Empty without a base row.
        """
        bases = self._bases()
        if not bases:
            return []
        first, *others = bases
        others += [row for row in self.rows if row.kind == "best_of"]
        pairs = [(row.name, first.name) for row in self.rows if row is not first]
        return pairs + [(row.name, other.name) for other in others for row in self.rows if row.kind == "adapter"]

    def gap_rows(self) -> list[tuple[str, str, str]]:
        """
        The rows (model, base, target) of the gap closures: every adapter as trained, the base with the fewest steps,
        and the base with the next more; adapters with the base's steps come first. Empty when one of them is missing.
        """
        bases = self._bases()
        models = [row for row in self.rows if row.kind == "adapter"]
        if len(bases) < 2 or not models:
            return []
        base, target = bases[0], bases[1]
        same = [row for row in models if row.num_inference_steps == base.num_inference_steps] or models[:1]
        return [(row.name, base.name, target.name) for row in same]

    def adapter_pairs(self) -> list[tuple[str, str]]:
        """The pairs (adapter as trained, base with as many steps), those with the fewest steps."""
        for base in self._bases():
            steps = base.num_inference_steps
            pairs = [(r.name, base.name) for r in self.rows if r.kind == "adapter" and r.num_inference_steps == steps]
            if pairs:
                return pairs
        return []

    def to_dict(self) -> dict[str, Any]:
        """
        The tables as plain data, ready for JSON. A number that does not exist (nothing scored, no gap) is `None`.

        Returns:
            `dict` with `rows`, `paired`, `gap_closure`, `methods`, `exploratory`, `protocol`, ..., and `paired_judge`
            when there was a judge. docs/evaluation.md explains every field.
        """
        table: dict[str, Any] = {"rows": [self._row(row) for row in self.rows], "paired": self._all_paired()}
        if self.judge_scores:
            table["paired_judge"] = [entry for pair in self.comparisons() for entry in self._paired_judge(*pair)]
        table |= self._gap_closure()
        known, weights = self.trained is not None, self.trained or {}
        table["rewards"] = {
            name: {
                "optimised": name in weights if known else None,
                "weight": weights.get(name),
                "rises_with_steps": name in self.rising,
            }
            for name in self.reward_names
        }
        table |= {
            "objective": self._objective(), "adapters": [adapter.describe() for adapter in self.adapters],
            "methods": methods(self), "exploratory": exploratory(self), "checks": checks(self),
            "pictures": self.pictures, "strengths": self.strengths,
        }  # fmt: skip
        table["protocol"] = {
            "prompts": len(self.prompts),
            "prompts_sha256": prompts_sha256(self.prompts),
            "images_per_prompt": next(iter(self.scores.values())).shape[1],
            "seed": self.noise.seeds[0],
            "seeds": list(self.noise.seeds),
            "resamples": self.resamples,
            "confidence": 0.95,
            "unit": "prompt",
            "trained_rewards": list(weights),
            "pipeline": self.settings,
            **self.details,
        }
        return plain(table)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes [`to_dict`] as JSON, whole or not at all, and returns the path."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        return str(path)

    def _row(self, row: EvaluationRow) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "name": row.name,
            "adapter": row.adapter,
            "num_inference_steps": row.num_inference_steps,
            "adapter_scale": row.adapter_scale,
            "kind": row.kind,
            "label": (row.label or "adapter") if row.adapter else None,
            "method": self.method_of(row),
            "best_of": row.best_of,
            "images_drawn": self.images_drawn[row.name],
            "draw": row.draw.folder,
            "rewards": {reward: self._summary(self.of(row.name, reward)) for reward in self.reward_names},
        }
        if row.name in self.looks:
            means = [statistics.overall_mean(self.looks[row.name][..., i]) for i in range(len(LOOKS))]
            entry["looks"] = dict(zip(LOOKS, means, strict=True))
        if row.name in self.judge_scores:
            entry["judge"] = {name: self._summary(values) for name, values in self.judge_scores[row.name].items()}
            for name in ("retrieval_accuracy", "hard_negative_accuracy"):
                # Resampling an accuracy of 1 gives an interval without width. Wilson's is wide enough for several
                # images too: the mean of a prompt's images varies no more than a single one does.
                if share := entry["judge"].get(name):
                    share["ci_low"], share["ci_high"] = statistics.wilson_interval(share["mean"], share["prompts"])
        if row.name in self.distances:
            value, draws = self.distances[row.name]
            low, high = _centred(value, draws)
            entry["judge"]["frechet_distance"] = {"mean": value, "ci_low": low, "ci_high": high}
        return entry

    def method_of(self, row: EvaluationRow) -> str | None:
        """The method whose training run the row shows; `None` for the base."""
        if not row.adapter:
            return None
        return next((a.method for a in self.adapters if a.label == row.label), row.label or "adapter")

    def _summary(self, scores: np.ndarray) -> dict[str, Any]:
        estimate, means = (
            statistics.mean_estimate(scores, self.resamples, self.bootstrap_seed),
            statistics.known_means(scores),
        )
        return {
            "mean": estimate.value,
            "std": float(means.std(ddof=1)) if len(means) > 1 else math.nan,
            "ci_low": estimate.low,
            "ci_high": estimate.high,
            "prompts": estimate.prompts,
            "missing": int((~np.isfinite(scores)).sum()),
        }

    def _all_paired(self) -> list[dict[str, Any]]:
        """Every comparison under every reward; Holm's correction is over the comparisons under one reward."""
        kinds = {row.name: row.kind for row in self.rows}
        entries = [self._paired(*pair, reward) for pair in self.comparisons() for reward in self.reward_names]
        for reward in self.reward_names:
            family = [e for e in entries if e["reward"] == reward and kinds[e["row"]] != "scale"]
            for entry, adjusted in zip(family, statistics.holm([e["wilcoxon_p"] for e in family]), strict=True):
                entry["holm_p"] = adjusted
        for entry in entries:
            p_value = entry["wilcoxon_p"] if entry["holm_p"] is None else entry["holm_p"]
            entry["verdict"], entry["weaker"] = statistics.verdict(entry["ci_low"], entry["ci_high"], p_value)
        return entries

    def _objective(self) -> dict[str, Any] | None:
        """The weighted sum that was trained, for adapters against the base; `None` where it is one reward as it is."""
        weights = self.trained or {}
        if not weights or (len(weights) == 1 and min(weights.values()) > 0):
            return None
        totals = {name: self.total(scores) for name, scores in self.scores.items()}
        entries = []
        for row, against in self.adapter_pairs():
            found = self.difference(totals[row], totals[against])
            entries.append({"row": row, "against": against, "delta": found.delta, "ci_low": found.low,
                            "ci_high": found.high, "win_rate": found.win_rate, "prompts": found.prompts})  # fmt: skip
        return {"weights": dict(weights), "paired": entries}

    def _paired(self, row: str, against: str, reward: str) -> dict[str, Any]:
        scores = self.of(row, reward), self.of(against, reward)
        found = self.difference(*scores)
        return {
            "row": row, "against": against, "reward": reward,
            "delta": found.delta, "ci_low": found.low, "ci_high": found.high,
            "win_rate": found.win_rate, "win_rate_ci_low": found.win_low, "win_rate_ci_high": found.win_high,
            "wilcoxon_p": statistics.wilcoxon_p(*scores), "holm_p": None,
            "prompts": found.prompts, "missing": found.missing,
        }  # fmt: skip

    def _paired_judge(self, row: str, against: str) -> list[dict[str, Any]]:
        entries = []
        for metric, values in self.judge_scores[row].items():
            found = self.difference(values, self.judge_scores[against][metric])
            entries.append((metric, found.delta, found.low, found.high))
        if row in self.distances:
            (value, draws), (reference, reference_draws) = self.distances[row], self.distances[against]
            delta = value - reference
            entries.append(("frechet_distance", delta, *_centred(delta, draws - reference_draws)))
        names = ("metric", "delta", "ci_low", "ci_high")
        return [{"row": row, "against": against, **dict(zip(names, entry, strict=True))} for entry in entries]

    def _gap_closure(self) -> dict[str, Any]:
        closures, rows = [], self.gap_rows()
        nothing = statistics.Estimate(math.nan, math.nan, math.nan, 0)  # to close where more steps need not raise it
        for model, base, target in rows:
            for reward in self.reward_names:
                mine, start, end = (self.of(row, reward) for row in (model, base, target))
                found = nothing
                if reward in self.rising:
                    found = statistics.gap_closure(mine, start, end, self.resamples, self.bootstrap_seed)
                closures.append({"row": model, "base": base, "target": target, "reward": reward,
                                 "value": found.value, "ci_low": found.low, "ci_high": found.high})  # fmt: skip
        first = [entry for entry in closures[: len(self.reward_names)] if entry["reward"] in self.rising]
        return {
            "gap_closure": {entry["reward"]: entry["value"] for entry in first},
            "gap_closure_ci": {entry["reward"]: [entry["ci_low"], entry["ci_high"]] for entry in first},
            "gap_closure_rows": dict(zip(("model", "base", "target"), rows[0], strict=True)) if rows else None,
            "gap_closures": closures,
        }


def prompts_sha256(prompts: list[str]) -> str:
    """Of the list as JSON, so that order and borders count."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _centred(value: float, draws: np.ndarray) -> tuple[float, float]:
    """
    Interval of a Frechet distance. A resample holds fewer different pictures than the sample, which moves every draw
    upwards, so the draws are moved back to the estimate before their percentiles are taken.
    """
    return statistics.percentile_interval(draws - draws.mean() + value)


def plain(value: Any) -> Any:
    """Python numbers for JSON, `None` for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
