"""GRPOConfig: the settings of Flow-GRPO."""

from dataclasses import dataclass, field

from ..names import checked
from .policy_gradient_config import PolicyGradientConfig


LOSS_TYPES = ("grpo", "grpo_guard")


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

    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the frozen base."})
    loss_type: str = field(default="grpo", metadata={"help": "grpo, or grpo_guard with centred, rescaled ratios."})

    def __post_init__(self):
        self.require_number("beta", minimum=0.0)
        self.require_choice("loss_type", LOSS_TYPES)
        super().__post_init__()
