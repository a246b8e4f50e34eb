"""PrefGRPOConfig: the settings of GRPO on pairwise preferences."""

from dataclasses import dataclass
from typing import Any

from ..names import checked
from ..run.facts import setting
from .grpo_config import GRPOConfig


@checked
@dataclass
class PrefGRPOConfig(GRPOConfig):
    r"""
    Settings of [`PrefGRPOTrainer`]: GRPO on win rates inside the group (Pref-GRPO, arXiv 2508.20751).

    Fields of GRPO are documented in [`GRPOConfig`] and [`PolicyGradientConfig`], those of all methods in
    [`DiffusionConfig`].

    Args:
        pairwise_judge (`str` or `Callable`, *optional*):
            What says which of two images is better. `None`: the weighted sum of the reward functions, as
            Bradley-Terry logits, `P(i beats j) = sigmoid((s_i - s_j) / win_rate_temperature)`. A scorer by name
            (`"tiny-pickscore"`, a CLIP checkpoint): the same with its scores. A callable
            `f(prompts, images_a, images_b, **columns)` (or `"file.py:function"`): the probability that A is better,
            asked in both orders and averaged, as for a vision-language model. With `None` and
            `multi_objective_aggregation="normalize_then_sum"` every reward function judges alone, and their advantages
            are summed by their weights.
        win_rate_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; PickScore's are trained for 1.
        num_generations (`int`, *optional*, defaults to `9`):
            Images per prompt and step.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Win rates are divided by the standard deviation of their `"group"`, of the `"batch"`, or `"none"`.
    """

    pairwise_judge: Any = setting(
        None, "A scorer by name or file.py:function that compares images; None uses the rewards."
    )
    win_rate_temperature: float = setting(1.0, "Divides the logits of a scoring judge.")
    num_generations: int = setting(9, "Images per prompt and step, compared as a group.")
    scale_rewards: str = setting("group", "Win rates are divided by the std of their group, batch, or none.")

    def __post_init__(self):
        self.require_number("win_rate_temperature", above=0.0)
        judge = self.pairwise_judge
        if judge is not None and not isinstance(judge, str) and not callable(judge):
            raise ValueError(f"pairwise_judge must be a name or a callable, got {judge!r}.")
        if judge is not None and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} has no effect with pairwise_judge, "
                "which decides alone; leave one of the two out."
            )
        super().__post_init__()
