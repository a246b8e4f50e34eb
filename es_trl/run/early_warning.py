"""Early warning: the trained reward rises and what was never optimised falls, as in reward hacking."""

import logging
from dataclasses import dataclass

import numpy as np
from transformers import TrainerCallback

from ..evaluation import LOOKS, MIN_PROMPTS, Evaluation, paired_difference
from ..evaluation.statistics import PairedDifference
from .trackers import send_alert


logger = logging.getLogger(__name__)

CONFIDENCE = 0.99  # wider than the tables' 95 %: a run is looked at many times, each time for several measures
RESAMPLES = 2000
MAX_SHIFT = 1.5  # standard deviations of the base's pictures; a healthy run of the small model moves by 0.9 at most


@dataclass(frozen=True)
class Measures:
    """
    One evaluation, prompt by prompt: the weighted sum that is trained `(P, J)`, each held-out reward `(P, J)`, and the
    diversity `(P, 1)`.
    """

    step: int
    reward: np.ndarray
    watched: dict[str, np.ndarray]


class EarlyWarningCallback(TrainerCallback):
    """
    Compares every evaluation with the best one so far of each held-out reward, and of the diversity, prompt by prompt.
    The base model counts as the evaluation of step 0; it is drawn once, at the first evaluation.

    When the trained reward has risen since then and the held-out measure has fallen, both beyond the 99 % interval of
    the paired difference, it says so in the log and on wandb or trackio, logs `eval_early_warning` 1 (otherwise 0)
    and, with `early_warning="stop"`, ends the training after this evaluation. It also has eyes of its own
    ([`~es_trl.evaluation.LOOKS`]): when the reward has risen and the pictures have moved away from the base's in
    brightness, contrast, saturation, edges, fine detail or entropy, by more than 1.5 standard deviations of the base's
    own pictures. A resumed run, and an evaluation on other prompts, start the comparison from the base again. With
    fewer than 8 evaluation prompts it is silent and says why.

    Args:
        trainer ([`DiffusionTrainer`]): The trainer it watches.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.best: dict[str, Measures] = {}
        self.prompts: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.best = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        result = self.trainer.results.last
        if args.early_warning == "off" or "eval_reward" not in (metrics or {}) or result is None:
            return
        now = self.measures(result, "adapter", state.global_step)
        if len(result.prompts) < MIN_PROMPTS:
            if not self.prompts:
                logger.info("%d evaluation prompts are too few for the early warning; give %d.",
                            len(result.prompts), MIN_PROMPTS)  # fmt: skip
            self.prompts = list(result.prompts)
            return
        shape, prompts = now.reward.shape, list(result.prompts)
        known = prompts == self.prompts and now.watched.keys() <= self.best.keys()
        if not known or any(measures.reward.shape != shape for measures in self.best.values()):
            self.best, self.prompts = dict.fromkeys(now.watched, self._base(result)), prompts
        fallen = [line for name in now.watched if (line := self._compare(name, self.best[name], now))]
        fallen += self._look(result, now)
        for name, values in now.watched.items():
            if _mean(values) > _mean(self.best[name].watched[name]):
                self.best[name] = now
        warned = {"eval_early_warning": float(bool(fallen))}
        metrics.update(warned)
        self.trainer.log(warned)
        if fallen:
            text = (
                f"Early warning at step {state.global_step}: the trained reward rises and what was not trained falls "
                f"({'; '.join(fallen)}). The run may be hacking its reward: look at samples/, go less far (travel, "
                "or the learning rate), or add a reward."
            )
            stops = " Stopping, as early_warning='stop' asks." if args.early_warning == "stop" else ""
            logger.warning("%s%s", text, stops)
            send_alert(self.trainer, "Early warning", text)
            if args.early_warning == "stop":
                control.should_training_stop = True

    def measures(self, result: Evaluation, row: str, step: int) -> Measures:
        """What is compared of one row: the trained sum, the rewards beside it, the diversity."""
        trained = len(self.trainer.rewards)
        scores = result.scores[row]
        watched = {name: result.of(row, name) for name in result.reward_names[trained:]}
        if "diversity" in result.judge_scores.get(row, {}):
            watched["diversity"] = result.judge_scores[row]["diversity"]
        return Measures(step, result.total(scores), watched)

    def _base(self, result: Evaluation) -> Measures:
        return self.measures(self.trainer.results.base(result.prompts, result.columns), "base", 0)

    def _look(self, result: Evaluation, now: Measures) -> list[str]:
        """One line per way in which the pictures have left the range of the base's, if the trained reward rose."""
        base = self.trainer.results.base(result.prompts, result.columns)
        reward = _difference(now.reward, self._base(result).reward)
        if not _rose(reward):
            return []
        lines = []
        for i, (name, (less, more)) in enumerate(LOOKS.items()):
            before, after = base.looks["base"][..., i], result.looks["adapter"][..., i]
            moved, spread = float(np.nanmean(after) - np.nanmean(before)), float(np.nanstd(before))
            if abs(moved) > MAX_SHIFT * max(spread, 0.01):
                lines.append(
                    f"pictures go {more if moved > 0 else less} ({name} {np.nanmean(after):.3g}, the base's "
                    f"{np.nanmean(before):.3g} with a spread of {spread:.2g}) while reward {reward.delta:+.4g}"
                )
        return lines

    @staticmethod
    def _compare(name: str, before: Measures, now: Measures) -> str | None:
        """One line when the trained reward rose and `name` fell."""
        reward = _difference(now.reward, before.reward)
        if not (_rose(reward) and _rose(_difference(before.watched[name], now.watched[name]))):
            return None
        watched = _difference(now.watched[name], before.watched[name])
        return f"{name} {_shown(watched)} while reward {_shown(reward)} since step {before.step}"


def _difference(values: np.ndarray, others: np.ndarray) -> PairedDifference:
    return paired_difference(values, others, resamples=RESAMPLES, confidence=CONFIDENCE)


def _shown(found: PairedDifference) -> str:
    interval = f" [{found.low:.4g}, {found.high:.4g}]" if np.isfinite(found.low) else " on every prompt"
    return f"{found.delta:+.4g}{interval}"


def _rose(found: PairedDifference) -> bool:
    """Surely above zero: by its interval, or where all prompts differ alike and it has none, by their share."""
    return found.low > 0 or (not np.isfinite(found.low) and found.win_low > 0.5)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else -np.inf
