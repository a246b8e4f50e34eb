"""DDPOConfig: the settings of denoising diffusion policy optimisation."""

from dataclasses import dataclass

from ..names import checked
from ..run.facts import setting
from .policy_gradient_config import PolicyGradientConfig


@checked
@dataclass
class DDPOConfig(PolicyGradientConfig):
    r"""
    Settings of [`DDPOTrainer`]: PPO over denoising steps (DDPO, arXiv 2305.13301).

    Fields shared by the policy-gradient methods are documented in [`PolicyGradientConfig`], those of all methods in
    [`DiffusionConfig`]. TRL's DDPOConfig said `train_clip_range` for `epsilon`, `train_num_inner_epochs` for
    `num_iterations`, `train_adv_clip_max` for `advantage_clip`, and `per_prompt_stat_tracking_*` as here.

    Args:
        per_prompt_stat_tracking (`bool`, *optional*, defaults to `True`):
            Centre and scale rewards by the statistics of their own prompt over the last steps, else by the batch's.
        per_prompt_stat_tracking_buffer_size (`int`, *optional*, defaults to `32`):
            Rewards kept per prompt.
        per_prompt_stat_tracking_min_count (`int`, *optional*, defaults to `16`):
            A prompt with fewer kept rewards uses the batch's statistics.
        num_generations (`int`, *optional*, defaults to `16`):
            Images per prompt and step; with `per_prompt_stat_tracking_min_count` images a prompt has statistics of its
            own from the first step on.
        num_iterations (`int`, *optional*, defaults to `1`):
            Passes over a rollout (DDPO's inner epochs).
    """

    per_prompt_stat_tracking: bool = setting(True, "Centre and scale rewards by the statistics of their own prompt.")
    per_prompt_stat_tracking_buffer_size: int = setting(32, "Rewards kept per prompt.")
    per_prompt_stat_tracking_min_count: int = setting(16, "A prompt with fewer rewards uses the batch's statistics.")
    num_generations: int = setting(16, "Images per prompt and step.")
    num_iterations: int = setting(1, "Passes over a rollout (DDPO's inner epochs).")

    def __post_init__(self):
        self.require_integer("per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count", minimum=1)
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} can never be reached "
                f"with per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size}."
            )
        super().__post_init__()
