"""GRPOConfig: the settings of Flow-GRPO."""

from dataclasses import dataclass

from ..names import checked
from ..run.facts import setting
from .policy_gradient_config import PolicyGradientConfig


@checked
@dataclass
class GRPOConfig(PolicyGradientConfig):
    r"""
    Settings of [`GRPOTrainer`]: GRPO over denoising steps (Flow-GRPO, arXiv 2505.05470).

    Fields shared by the policy-gradient methods are documented in [`PolicyGradientConfig`], those of all methods in
    [`DiffusionConfig`].

    Args:
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the frozen base, at least 0; above 0 it costs one more forward pass per
            trained step.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"`: the clipped ratio. `"grpo_guard"`: the log-ratio without its negative mean, in units that are the
            same at every denoising step, so that clipping acts on both sides alike (arXiv 2510.22319).
    """

    beta: float = setting(0.0, "Weight of the KL divergence from the frozen base.")
    loss_type: str = setting("grpo", "grpo, or grpo_guard with centred, rescaled ratios.")

    def __post_init__(self):
        self.require_number("beta", minimum=0.0)
        self.require_choice("loss_type", ("grpo", "grpo_guard"))
        super().__post_init__()
