"""DiffusionDPOConfig: the settings of direct preference optimisation."""

from dataclasses import dataclass, field

from .config import DiffusionConfig


LOSS_TYPES = ("sigmoid", "ipo")
LEVEL_SAMPLING = ("uniform", "logit_normal")
DIFFERENTIABLE_SPACES = ("lora", "lora_b", "lora_xs")


@dataclass
class DiffusionDPOConfig(DiffusionConfig):
    r"""
    Settings of [`DiffusionDPOTrainer`]: Diffusion-DPO (arXiv 2311.12908), online or on a data set of pairs.

    Fields shared by all methods are documented in [`DiffusionConfig`].

    Args:
        online (`bool`, *optional*, defaults to `True`):
            Draw the pairs: the best against the worst of `num_generations` images of each prompt. Otherwise the
            training data has them, in the columns `chosen_column` and `rejected_column`.
        num_generations (`int`, *optional*, defaults to `8`):
            Images drawn per prompt and step, at least 2. Online only.
        draw_with (`str`, *optional*, defaults to `"adapter"`):
            `"adapter"` draws with the current adapter, `"base"` with the frozen base. Online only.
        chosen_column (`str`, *optional*, defaults to `"chosen"`):
            Column of the preferred pictures. Offline only.
        rejected_column (`str`, *optional*, defaults to `"rejected"`):
            Column of the other ones. Offline only.
        beta (`float`, *optional*, defaults to `500.0`):
            Strength of the pull to the frozen base, above 0. The error is a mean over a latent's entries, hence the
            large numbers; 2000 to 5000 in the paper, on a data set of pairs.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (DPO) or `"ipo"` (arXiv 2310.12036).
        noise_draws (`int`, *optional*, defaults to `4`):
            Draws of noise and noise level per pair and update; both images of a pair share each of them.
        noise_level_sampling (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`, or `"logit_normal"` with `logit_mean` and `logit_std`, restricted to the range below.
        min_noise_level (`float`, *optional*):
            Lowest noise level `s`, in [0, 1); by default 0.5 when `num_inference_steps` is 1 and 0 otherwise. A
            one-step picture starts at 1, and what is learnt near 0 hardly reaches it.
        max_noise_level (`float`, *optional*, defaults to `1.0`):
            Highest noise level, at most 1, which is pure noise.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of the logit of the noise level.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the logit of the noise level, above 0.
        num_iterations (`int`, *optional*, defaults to `1`):
            Updates of the adapter per step, each on the same pairs with fresh noise.
        images_per_forward (`int`, *optional*, defaults to `16`):
            Images drawn at once.
        images_per_backward (`int`, *optional*, defaults to `16`):
            Noisy latents in one backward pass, at least 2; the memory it takes is that of training.
        checkpoint_activations (`bool`, *optional*, defaults to `False`):
            Recompute activations in the backward pass: less memory, a third more time.
        es_space (`str`, *optional*, defaults to `"lora"`):
            What is moved: `"lora"` (both factors), `"lora_b"` (only B) or `"lora_xs"` (a core between the frozen
            weight's top singular vectors).
        learning_rate (`float`, *optional*, defaults to `0.0001`):
            As in TrainingArguments.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradient clipping; 0 is off.
        optim (`str`, *optional*, defaults to `"adamw_torch"`):
            As in TrainingArguments.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            As in TrainingArguments.
    """

    online: bool = field(default=True, metadata={"help": "Draw the pairs; otherwise the training data has them."})
    num_generations: int = field(default=8, metadata={"help": "Images drawn per prompt and step, at least 2."})
    draw_with: str = field(default="adapter", metadata={"help": "Who draws the pairs: adapter or base."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the preferred pictures."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the other pictures."})
    beta: float = field(default=500.0, metadata={"help": "Strength of the pull to the frozen base, above 0."})
    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid or ipo."})
    noise_draws: int = field(default=4, metadata={"help": "Draws of noise and noise level per pair and update."})
    noise_level_sampling: str = field(default="uniform", metadata={"help": "uniform or logit_normal."})
    min_noise_level: float | None = field(
        default=None, metadata={"help": "Lowest noise level, in [0, 1); None is 0.5 for one step, else 0."}
    )
    max_noise_level: float = field(default=1.0, metadata={"help": "Highest noise level; 1 is pure noise."})
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit of the noise level."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit of the noise level."})
    num_iterations: int = field(default=1, metadata={"help": "Updates of the adapter per step, on the same pairs."})
    images_per_forward: int = field(default=16, metadata={"help": "Images drawn at once."})
    images_per_backward: int = field(default=16, metadata={"help": "Noisy latents in one backward pass."})
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    es_space: str = field(default="lora", metadata={"help": "What is moved: lora, lora_b or lora_xs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 is off."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, as in TrainingArguments."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})

    def __post_init__(self):
        for name in ("noise_draws", "num_iterations", "images_per_forward"):
            self.require_integer(name, minimum=1)
        for name in ("num_generations", "images_per_backward"):
            self.require_integer(name, minimum=2)
        self.require_number("beta", above=0.0)
        self.require_number("logit_mean")
        self.require_number("logit_std", above=0.0)
        if self.min_noise_level is None:
            self.min_noise_level = 0.5 if self.num_inference_steps == 1 else 0.0
        self.require_number("min_noise_level", minimum=0.0, below=1.0)
        self.require_number("max_noise_level", above=self.min_noise_level)
        if self.max_noise_level > 1:
            raise ValueError(f"max_noise_level must be at most 1 (pure noise), got {self.max_noise_level!r}.")
        self.require_choice("draw_with", ("adapter", "base"))
        self.require_choice("loss_type", LOSS_TYPES)
        self.require_choice("noise_level_sampling", LEVEL_SAMPLING)
        self.require_choice("es_space", DIFFERENTIABLE_SPACES)
        if self.images_per_prompt != 1:
            raise ValueError(
                f"images_per_prompt={self.images_per_prompt} has no meaning here; num_generations sets how many "
                "images of a prompt are compared."
            )
        if self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} has no effect on which image is the best; leave it out."
            )
        if self.num_iterations > 1 and self.gradient_accumulation_steps != 1:
            raise ValueError("num_iterations above 1 needs gradient_accumulation_steps=1: each is an update.")
        super().__post_init__()
