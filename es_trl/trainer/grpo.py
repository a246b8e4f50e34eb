"""GRPOTrainer: group-relative policy optimisation over the denoising steps."""

from functools import partial

import numpy as np
import torch

from ..hub.methods import Method, Paper
from ..pipelines import Gaussian
from .advantages import combine, group_advantages
from .group_rollout import Rollout
from .grpo_config import GRPOConfig
from .policy_gradient import PolicyGradientTrainer


class GRPOTrainer(PolicyGradientTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline with GRPO (Flow-GRPO, arXiv 2505.05470).

    The advantage of an image is its reward minus the mean of its group, over a standard deviation (`scale_rewards`).

    Args: as in [`DiffusionTrainer`], with `args` a [`GRPOConfig`].

    Example:
        ```python
        from es_trl import GRPOConfig, GRPOTrainer

        trainer = GRPOTrainer(
            model="tiny-sana-sprint",
            reward_funcs="tiny-pickscore",
            args=GRPOConfig(output_dir="outputs/grpo", max_steps=20, guidance_scale=2.0, max_sequence_length=16),
            train_dataset="tiny-train",
        )
        trainer.train()
        trainer.save_model()
        ```
    """

    config_class = GRPOConfig
    method_name = "grpo"
    about = Method(
        "GRPO",
        tags=("grpo", "flow-grpo", "reinforcement-learning"),
        papers=(Paper("2505.05470", "Flow-GRPO: Training Flow Matching Models via Online RL", "liu2025flowgrpo", 2025,
                      "Liu, Jie and others"),
                Paper("2402.03300",
                      "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
                      "shao2024deepseekmath", 2024, "Shao, Zhihong and others")),
    )  # fmt: skip

    @property
    def beta(self) -> float:
        """Weight of the KL divergence from the frozen base."""
        return self.args.beta

    def advantages(self, rollout: Rollout) -> np.ndarray:
        """`(P, G)` group advantages (Flow-GRPO, arXiv 2505.05470)."""
        normalise = partial(group_advantages, scale=self.args.scale_rewards)
        return combine(rollout.scores, self.rewards.weights, normalise, self.args.multi_objective_aggregation)

    def log_ratio(
        self, gaussian: Gaussian, state: torch.Tensor, old: torch.Tensor, old_mean: torch.Tensor
    ) -> torch.Tensor:
        """`(B,)`; with `loss_type="grpo_guard"` centred and rescaled (GRPO-Guard, arXiv 2510.22319)."""
        log_ratio = super().log_ratio(gaussian, state, old, old_mean)
        if self.args.loss_type == "grpo":
            return log_ratio
        # log r = (d . e) / std - |d|^2 / (2 std^2) with d = mean - old mean: the second term is never positive.
        return gaussian.std * (log_ratio + gaussian.kl(old_mean))
