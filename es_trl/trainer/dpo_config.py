"""DiffusionDPOConfig: the settings of direct preference optimisation."""

from dataclasses import dataclass

from ..names import checked
from ..run.facts import setting
from .gradient_config import GradientConfig


@checked
@dataclass
class DiffusionDPOConfig(GradientConfig):
    r"""
    Settings of [`DiffusionDPOTrainer`]: Diffusion-DPO (arXiv 2311.12908), online or on a data set of pairs.

    Fields shared by the methods that backpropagate are documented in [`GradientConfig`], those of all methods in
    [`DiffusionConfig`].

    Args:
        online (`bool`, *optional*, defaults to `True`):
            Draw the pairs: the best against the worst of `num_generations` images of each prompt. Otherwise the
            training data has them, in the columns `chosen_column` and `rejected_column`.
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
        learning_rate (`float`, *optional*, defaults to `0.0001`):
            As in TrainingArguments.
    """

    online: bool = setting(True, "Draw the pairs; otherwise the training data has them.")
    draw_with: str = setting("adapter", "Who draws the pairs: adapter or base.")
    chosen_column: str = setting("chosen", "Column of the preferred pictures.")
    rejected_column: str = setting("rejected", "Column of the other pictures.")
    beta: float = setting(500.0, "Strength of the pull to the frozen base, above 0.")
    loss_type: str = setting("sigmoid", "sigmoid or ipo.")
    noise_draws: int = setting(4, "Draws of noise and noise level per pair and update.")
    noise_level_sampling: str = setting("uniform", "uniform or logit_normal.")
    min_noise_level: float | None = setting(None, "Lowest noise level, in [0, 1); None is 0.5 for one step, else 0.")
    max_noise_level: float = setting(1.0, "Highest noise level; 1 is pure noise.")
    logit_mean: float = setting(0.0, "Mean of the logit of the noise level.")
    logit_std: float = setting(1.0, "Standard deviation of the logit of the noise level.")
    learning_rate: float = setting(1e-4, "Learning rate.")

    def __post_init__(self):
        self.require_integer("noise_draws", minimum=1)
        self.require_integer("images_per_backward", minimum=2)
        self.require_number("beta", "logit_std", above=0.0)
        self.require_number("logit_mean")
        if self.min_noise_level is None:
            self.min_noise_level = 0.5 if self.num_inference_steps == 1 else 0.0
        self.require_number("min_noise_level", minimum=0.0, below=1.0)
        self.require_number("max_noise_level", above=self.min_noise_level)
        if self.max_noise_level > 1:
            raise ValueError(f"max_noise_level must be at most 1 (pure noise), got {self.max_noise_level!r}.")
        self.require_choice("draw_with", ("adapter", "base"))
        self.require_choice("loss_type", ("sigmoid", "ipo"))
        self.require_choice("noise_level_sampling", ("uniform", "logit_normal"))
        if self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} has no effect on which image is the best; leave it out."
            )
        if self.num_iterations > 1 and self.gradient_accumulation_steps != 1:
            raise ValueError("num_iterations above 1 needs gradient_accumulation_steps=1: each is an update.")
        super().__post_init__()
