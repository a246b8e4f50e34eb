"""DDPOTrainer: PPO over the denoising steps, with the statistics of every prompt as baseline."""

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..hub.methods import Method, Paper
from ..names import checked
from .advantages import EPSILON, PromptStatistics, combine
from .base import DiffusionTrainer
from .ddpo_config import DDPOConfig
from .group_rollout import Rollout
from .policy_gradient import PolicyGradientTrainer


class DDPOTrainer(PolicyGradientTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline with DDPO (arXiv 2305.13301): PPO, with denoising steps
    as actions.

    The advantage of an image is its reward, centred and scaled by what its prompt has scored lately
    (`per_prompt_stat_tracking`), or by the batch. There is no value network, as in DDPO.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DDPOConfig`]. A reward written for TRL's DDPOTrainer
    fits through [`from_ddpo`].

    Example:
        ```python
        from es_trl import DDPOConfig, DDPOTrainer

        trainer = DDPOTrainer(
            model="tiny-sana-sprint",
            reward_funcs="tiny-pickscore",
            args=DDPOConfig(output_dir="outputs/ddpo", max_steps=20, guidance_scale=2.0, max_sequence_length=16),
            train_dataset="tiny-train",
        )
        trainer.train()
        trainer.save_model()
        ```
    """

    config_class = DDPOConfig
    method_name = "ddpo"
    about = Method(
        "DDPO",
        tags=("ddpo", "reinforcement-learning"),
        papers=(Paper("2305.13301", "Training Diffusion Models with Reinforcement Learning", "black2023ddpo", 2023,
                      "Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey"),),
    )  # fmt: skip

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config: DDPOConfig = self.args
        apart = config.multi_objective_aggregation == "normalize_then_sum"
        self.statistics = [
            PromptStatistics(config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count)
            for _ in range(len(self.rewards) if apart else 1)
        ]
        self.add_callback(PromptStatisticsState(self))

    def advantages(self, rollout: Rollout) -> np.ndarray:
        """`(P, G)`; takes the rewards of `rollout` into the prompts' statistics first."""
        trackers = iter(self.statistics)

        def normalise(rewards: np.ndarray) -> np.ndarray:
            if self.args.per_prompt_stat_tracking:
                return next(trackers).advantages(rollout.batch.prompts, rewards)
            finite = rewards[np.isfinite(rewards)]
            return (rewards - finite.mean()) / (finite.std() + EPSILON) if len(finite) else rewards

        return combine(rollout.scores, self.rewards.weights, normalise, self.args.multi_objective_aggregation)


class PromptStatisticsState(TrainerCallback, ExportableState):
    """Keeps the prompts' statistics in the checkpoint's `trainer_state.json`: a resumed run goes on with them."""

    def __init__(self, trainer: DDPOTrainer):
        self.trainer = trainer

    def state(self) -> dict:
        return {"args": {}, "attributes": {"statistics": [tracker.to_json() for tracker in self.trainer.statistics]}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        kept = (
            saved["attributes"]["statistics"] if saved and state.global_step else [{}] * len(self.trainer.statistics)
        )
        for tracker, values in zip(self.trainer.statistics, kept, strict=True):
            tracker.restore(values)
