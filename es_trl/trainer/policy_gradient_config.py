"""PolicyGradientConfig: what DDPO, GRPO and Pref-GRPO share beyond DiffusionConfig."""

import math
from dataclasses import dataclass

from ..names import checked
from ..run.facts import setting
from .gradient_config import GradientConfig


@checked
@dataclass
class PolicyGradientConfig(GradientConfig):
    r"""
    Settings shared by [`DDPOTrainer`], [`GRPOTrainer`] and [`PrefGRPOTrainer`], beside those of [`GradientConfig`] and
    [`DiffusionConfig`].

    Args:
        sample_num_steps (`int`, *optional*):
            Denoising steps of the rollouts. By default 2 when `num_inference_steps` is 1 (one step has no likelihood),
            else `num_inference_steps`. Evaluations, samples and the card keep to `num_inference_steps`.
        intermediate_times (`list[float]`, *optional*):
            Consistency models: the `sample_num_steps - 1` times between first and last step of the rollouts, falling,
            in (0, pi/2); `None` is the scheduler's own, 1.3 for two steps. Lower ones give a stronger signal: the
            drawn latents depend on the prediction by cos(t) and on noise by sin(t).
        output_noise (`float`, *optional*, defaults to `0.0`):
            Noise on the final prediction of rollouts (consistency models: in units of sigma_data), so that the last
            (or only) step has a density as well. Evaluations draw without it.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Flow-matching models: `a` of the rollout's SDE. DDIM: its `eta`, unless `pipeline_kwargs` has one.
            Schedulers with noise of their own (DDPM, Euler ancestral, LCM) keep to it.
        eval_num_inference_steps (`list[int]`, *optional*):
            Step counts of the comparison with the base after training; by default `num_inference_steps`, and
            `sample_num_steps` if that is more.
        init_same_noise (`bool`, *optional*, defaults to `True`):
            The images of a group start from the same latents, so that they differ by the policy's own noise only.
        steps_per_generation (`int`, *optional*, defaults to `1`):
            Updates per pass, each on its share of the groups.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the probability ratio below 1. The log-probability is the mean over dimensions.
        epsilon_high (`float`, *optional*):
            Clip range above 1; `epsilon` unless set.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Largest absolute advantage.
        sde_window_size (`int`, *optional*):
            Train only so many consecutive steps of a rollout, from a window that moves; flow models and DDIM
            draw without noise elsewhere (MixGRPO, Flow-GRPO-Fast). `None` trains all.
        sde_window_interval (`int`, *optional*, defaults to `25`):
            Training steps after which the window moves on by one.
        scale_rewards (`str`, *optional*, defaults to `"batch"`):
            What centred rewards are divided by: the standard deviation of their `"group"`, of the whole `"batch"`, or
            `"none"`.
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            As in TrainingArguments.
        weight_decay (`float`, *optional*, defaults to `1e-4`):
            As in TrainingArguments.
    """

    sample_num_steps: int | None = setting(None, "Denoising steps of the rollouts; None is 2 for one-step models.")
    intermediate_times: list[float] | None = setting(
        None, "Consistency models: times between the first and last step of the rollouts."
    )
    output_noise: float = setting(0.0, "Noise on the rollouts' final prediction.")
    noise_level: float = setting(0.7, "Flow models: noise of the rollouts' SDE; DDIM: eta.")
    eval_num_inference_steps: list[int] | None = setting(
        None, "Step counts of the comparison with the base after training.", "measures"
    )
    init_same_noise: bool = setting(True, "The images of a group start from the same latents.")
    steps_per_generation: int = setting(1, "Updates per pass over a rollout.")
    epsilon: float = setting(1e-4, "Clip range of the probability ratio below 1.")
    epsilon_high: float | None = setting(None, "Clip range of the probability ratio above 1; epsilon unless set.")
    advantage_clip: float = setting(5.0, "Largest absolute advantage.")
    sde_window_size: int | None = setting(None, "Train only so many consecutive steps of a rollout; None is all.")
    sde_window_interval: int = setting(25, "Training steps after which the window moves on by one.")
    scale_rewards: str = setting("batch", "Centred rewards are divided by the std of their group, batch, or none.")
    learning_rate: float = setting(3e-4, "Learning rate.")
    weight_decay: float = setting(1e-4, "Weight decay, as in TrainingArguments.")

    def __post_init__(self):
        super().__post_init__()
        self._check_policy_values()
        if self.sample_num_steps is None:
            if self.num_inference_steps is None:
                raise ValueError(
                    "num_inference_steps=null leaves the number of steps to the pipeline, but the policy needs it: "
                    "give num_inference_steps, or sample_num_steps and eval_num_inference_steps."
                )
            self.sample_num_steps = 2 if self.num_inference_steps == 1 else self.num_inference_steps
        if self.eval_num_inference_steps is None:
            counts = [n for n in (self.num_inference_steps, self.sample_num_steps) if n is not None]
            self.eval_num_inference_steps = list(dict.fromkeys([counts[0], max(counts)]))
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon

    def _check_policy_values(self) -> None:
        self.require_integer("steps_per_generation", "sde_window_interval", minimum=1)
        self.require_integer("sample_num_steps", "sde_window_size", minimum=1, or_none=True)
        self.require_number("output_noise", minimum=0.0)
        self.require_number("noise_level", "epsilon", "advantage_clip", above=0.0)
        self.require_number("epsilon_high", above=0.0, or_none=True)
        updates = self.num_iterations * self.steps_per_generation
        if updates > 1 and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} and {updates} updates per rollout "
                "exclude each other; raise prompts_per_step instead."
            )
        if self.steps_per_generation > math.ceil(self.prompts_per_step / self.groups_per_block):
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} needs as many blocks of groups, but "
                f"prompts_per_step={self.prompts_per_step} groups make fewer blocks of images_per_forward="
                f"{self.images_per_forward} images; lower one of the two."
            )
        for name in ("intermediate_times", "eval_num_inference_steps"):
            values = getattr(self, name)
            if values is not None and (not isinstance(values, list) or not values):
                raise ValueError(f"{name} must be a list of at least one number, got {values!r}.")
        for time in self.intermediate_times or []:
            if isinstance(time, bool) or not isinstance(time, int | float):
                raise ValueError(f"intermediate_times must be numbers, got {time!r}.")
        for steps in self.eval_num_inference_steps or []:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"eval_num_inference_steps must be whole numbers of at least 1, got {steps!r}.")
