"""PrefGRPOTrainer: GRPO whose reward is how often an image beats the others of its group."""

import math

import numpy as np

from ..hub.methods import Method, Paper
from ..names import checked
from ..rewards.preferences import GroupJudge, win_rates
from .advantages import combine, group_advantages
from .base import DiffusionTrainer
from .group_rollout import Judge, Rollout
from .grpo import GRPOTrainer
from .pref_grpo_config import PrefGRPOConfig


class PrefGRPOTrainer(GRPOTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline with Pref-GRPO (arXiv 2508.20751).

    All images of a group are compared in pairs; an image's reward is the share of the others it beats, and its
    advantage that share against the group's mean. Win rates depend on the order of a group more than on the spread of
    its scores, so small differences of a score are not blown up by the division by their standard deviation.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`PrefGRPOConfig`]. The reward functions are logged
    and evaluated; they decide the pairs themselves unless `pairwise_judge` is set.

    Example:
        ```python
        from es_trl import PrefGRPOConfig, PrefGRPOTrainer

        trainer = PrefGRPOTrainer(
            model="tiny-sana-sprint",
            reward_funcs="tiny-pickscore",
            args=PrefGRPOConfig(output_dir="outputs/pref", max_steps=20, guidance_scale=2.0, max_sequence_length=16),
            train_dataset="tiny-train",
        )
        trainer.train()
        trainer.save_model()
        ```
    """

    config_class = PrefGRPOConfig
    method_name = "pref_grpo"
    about = Method(
        "Pref-GRPO",
        tags=("pref-grpo", "grpo", "reinforcement-learning"),
        papers=(Paper("2508.20751",
                      "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement "
                      "Learning",
                      "wang2025prefgrpo", 2025, "Wang, Yibin and others"),),
    )  # fmt: skip

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config: PrefGRPOConfig = self.args
        self._judge = None
        if config.pairwise_judge is not None:
            where = config.scorer_place["device"]
            judge, temperature = config.pairwise_judge, config.win_rate_temperature
            self._judge = GroupJudge(judge, temperature, where, **config.reward_calls)
            self._judge.load()

    def judge(self) -> Judge | None:
        """`pairwise_judge`, if there is one."""
        return self._judge

    def advantages(self, rollout: Rollout) -> np.ndarray:
        """`(P, G)` group advantages of win rates: the judge's, or those of the rewards."""
        if rollout.preferences is not None:
            self.check_judged(rollout)
            self._log_spread(rollout.preferences)
            advantages = group_advantages(rollout.preferences, self.args.scale_rewards)
            return np.where(np.isfinite(advantages), advantages, 0.0)

        def normalise(rewards: np.ndarray) -> np.ndarray:
            wins = win_rates(rewards, self.args.win_rate_temperature)
            self._log_spread(wins)
            return group_advantages(wins, self.args.scale_rewards)

        return combine(rollout.scores, self.rewards.weights, normalise, self.args.multi_objective_aggregation)

    def check_judged(self, rollout: Rollout) -> None:
        """Raises `RuntimeError` if the judge gave more than `max_invalid_fraction` of the images no verdict."""
        assert self._judge is not None and rollout.preferences is not None
        missing = float(1 - np.isfinite(rollout.preferences).mean())
        names, prompt = [self._judge.name], rollout.batch.prompts[0]
        self.refuse_missing(missing, "images", rollout.preferences[..., None], names, prompt)

    def _log_spread(self, wins: np.ndarray) -> None:
        spreads = [row[np.isfinite(row)].std() for row in wins if np.isfinite(row).any()]
        self.add_metric("policy/win_rate_std", float(np.mean(spreads)) if spreads else math.nan)
