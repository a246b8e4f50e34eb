"""PolicyGradientConfig: what DDPO, GRPO and Pref-GRPO share beyond DiffusionConfig."""

import math
from dataclasses import dataclass, field

from .config import DiffusionConfig


GRADIENT_SPACES = ("lora", "lora_b", "lora_xs")
# `gradient_checkpointing` of the Trainer asks the adapter view, which has no layers.
INSTEAD = {"gradient_checkpointing": "use checkpoint_activations=True, which asks the pipeline's denoiser"}


@dataclass
class PolicyGradientConfig(DiffusionConfig):
    r"""
    Settings shared by [`DDPOTrainer`], [`GRPOTrainer`] and [`PrefGRPOTrainer`], beside those of [`DiffusionConfig`].

    A Trainer step is one rollout of `prompts_per_step x num_generations` images and all updates made from it.

    Args:
        num_generations (`int`, *optional*, defaults to `8`):
            Images per prompt and step, the group whose rewards are compared.
        sample_num_steps (`int`, *optional*):
            Denoising steps of the rollouts. By default 2 when `num_inference_steps` is 1 (one step has no likelihood),
            else `num_inference_steps`. Evaluations, samples and the card keep to `num_inference_steps`.
        intermediate_times (`list[float]`, *optional*):
            Consistency models: the `sample_num_steps - 1` times between first and last step of the rollouts, falling,
            in (0, pi/2); `None` is the scheduler's own, 1.3 for two steps. Lower ones give a stronger signal: the
            drawn latents depend on the prediction by cos(t) and on noise by sin(t).
        output_noise (`float`, *optional*, defaults to `0.0`):
            Consistency models: noise on the final prediction of rollouts in units of sigma_data, so that the last (or
            only) step has a density as well. Evaluations draw without it.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Flow-matching models: `a` of the rollout's SDE.
        eval_num_inference_steps (`list[int]`, *optional*):
            Step counts of the comparison with the base after training; by default `num_inference_steps`, and
            `sample_num_steps` if that is more.
        init_same_noise (`bool`, *optional*, defaults to `True`):
            The images of a group start from the same latents, so that they differ by the policy's own noise only.
        num_iterations (`int`, *optional*, defaults to `1`):
            Passes over a rollout.
        steps_per_generation (`int`, *optional*, defaults to `1`):
            Updates per pass, each on its share of the groups.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the probability ratio below 1. The log-probability is the mean over dimensions.
        epsilon_high (`float`, *optional*):
            Clip range above 1; `epsilon` unless set.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Largest absolute advantage.
        sde_window_size (`int`, *optional*):
            Train only so many consecutive steps of a rollout, from a window that moves; flow models draw without
            noise elsewhere (MixGRPO, Flow-GRPO-Fast). `None` trains all.
        sde_window_interval (`int`, *optional*, defaults to `25`):
            Training steps after which the window moves on by one.
        images_per_forward (`int`, *optional*, defaults to `16`):
            Images drawn at once. Groups stay together on one process.
        images_per_backward (`int`, *optional*, defaults to `16`):
            Images whose graph is held at once; it sets the memory of training.
        checkpoint_activations (`bool`, *optional*, defaults to `False`):
            Recompute the denoiser's activations in the backward pass instead of keeping them.
        es_space (`str`, *optional*, defaults to `"lora"`):
            What is moved: `"lora"` (both factors), `"lora_b"` (only B) or `"lora_xs"`; the same word as in ESConfig.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Must stay 1: `num_generations` says how many images a prompt gets.
        scale_rewards (`str`, *optional*, defaults to `"batch"`):
            What centred rewards are divided by: the standard deviation of their `"group"`, of the whole `"batch"`, or
            `"none"`.
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            As in TrainingArguments.
        optim (`str`, *optional*, defaults to `"adamw_torch"`):
            As in TrainingArguments.
        weight_decay (`float`, *optional*, defaults to `1e-4`):
            As in TrainingArguments.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradient clipping; 0 is off.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            As in TrainingArguments.
    """

    num_generations: int = field(default=8, metadata={"help": "Images per prompt and step, compared as a group."})
    sample_num_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps of the rollouts; None is 2 for one-step models."}
    )
    intermediate_times: list[float] | None = field(
        default=None, metadata={"help": "Consistency models: times between the first and last step of the rollouts."}
    )
    output_noise: float = field(
        default=0.0, metadata={"help": "Consistency models: noise on the rollouts' final prediction."}
    )
    noise_level: float = field(default=0.7, metadata={"help": "Flow-matching models: noise of the rollouts' SDE."})
    eval_num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "Step counts of the comparison with the base after training."}
    )
    init_same_noise: bool = field(
        default=True, metadata={"help": "The images of a group start from the same latents."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over a rollout."})
    steps_per_generation: int = field(default=1, metadata={"help": "Updates per pass over a rollout."})
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the probability ratio below 1."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Clip range of the probability ratio above 1; epsilon unless set."}
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Largest absolute advantage."})
    sde_window_size: int | None = field(
        default=None, metadata={"help": "Train only so many consecutive steps of a rollout; None is all."}
    )
    sde_window_interval: int = field(
        default=25, metadata={"help": "Training steps after which the window moves on by one."}
    )
    images_per_forward: int = field(default=16, metadata={"help": "Images drawn at once."})
    images_per_backward: int = field(default=16, metadata={"help": "Images whose graph is held at once."})
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "Recompute the denoiser's activations in the backward pass."}
    )
    es_space: str = field(default="lora", metadata={"help": "What is moved: lora, lora_b or lora_xs."})
    images_per_prompt: int = field(default=1, metadata={"help": "Must stay 1: num_generations sets the group."})
    scale_rewards: str = field(
        default="batch", metadata={"help": "Centred rewards are divided by the std of their group, batch, or none."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, as in TrainingArguments."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay, as in TrainingArguments."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 is off."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})

    def __post_init__(self):
        self._check_policy_values()
        if self.sample_num_steps is None:
            self.sample_num_steps = 2 if self.num_inference_steps == 1 else self.num_inference_steps
        if self.eval_num_inference_steps is None:
            counts = [self.num_inference_steps, max(self.num_inference_steps, self.sample_num_steps)]
            self.eval_num_inference_steps = list(dict.fromkeys(counts))
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        super().__post_init__()

    def _reject(self) -> None:
        for name, reason in INSTEAD.items():
            if getattr(self, name, None):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}.")
        super()._reject()

    def _check_policy_values(self) -> None:
        self.require_integer("num_generations", minimum=2)
        for name in ("num_iterations", "steps_per_generation", "images_per_forward", "images_per_backward"):
            self.require_integer(name, minimum=1)
        self.require_integer("sde_window_interval", minimum=1)
        for name in ("sample_num_steps", "sde_window_size"):
            if getattr(self, name) is not None:
                self.require_integer(name, minimum=1)
        self.require_number("output_noise", minimum=0.0)
        for name in ("noise_level", "epsilon", "advantage_clip"):
            self.require_number(name, above=0.0)
        if self.epsilon_high is not None:
            self.require_number("epsilon_high", above=0.0)
        self.require_choice("es_space", GRADIENT_SPACES)
        if self.images_per_prompt != 1:
            raise ValueError(
                f"images_per_prompt={self.images_per_prompt} has no meaning here; set num_generations, the images "
                "that a prompt gets in a step."
            )
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
        for steps in self.eval_num_inference_steps or []:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"eval_num_inference_steps must be whole numbers of at least 1, got {steps!r}.")

    @property
    def groups_per_block(self) -> int:
        """Groups that are drawn together; what one process takes at a time."""
        return max(1, self.images_per_forward // self.num_generations)
