"""Win rate within the group: how often a picture beats the others of its prompt, by PickScore."""

from __future__ import annotations

import math

from .groups import members_of_groups
from .pickscore import PickScore


class Pairwise:
    """
    Mean over the other pictures j of the group of `P(i beats j) = 1 / (1 + exp(-(s_i - s_j) / temperature))`, with s
    PickScore, which was trained as such a probability. In [0, 1], 0.5 on average over a group, so a step cannot gain
    from prompts that score high anyway, and outliers count at most one.

    A group is what a trainer compares: in ES the pictures that all members drew from the same latents. A picture alone
    in its group gets no score. Groups must be whole, so it needs a single process.

    Args:
        checkpoint (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`): see `PickScore`.
        device, dtype: see `ClipScorer`.
        temperature (`float`, *optional*, defaults to `1.0`): differences of the score that count as e to 1.
    """

    groupwise = True
    __name__ = "pairwise"

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None, temperature: float = 1.0):
        if not temperature > 0:
            raise ValueError(f"temperature of the pairwise reward must be above 0, not {temperature!r}")
        self.score, self.temperature = PickScore(checkpoint, device, dtype), temperature
        self.scorer = self.score.scorer

    def __call__(self, prompts, images, groups=None, **kwargs) -> list[float | None]:
        return soft_win_rates(self.score(prompts, images), members_of_groups(prompts, groups), self.temperature)


def soft_win_rates(scores: list[float], groups: list[list[int]], temperature: float = 1.0) -> list[float | None]:
    """Mean win probability of each picture over the others of its group; None where there are none."""
    rates: list[float | None] = [None] * len(scores)
    for group in groups:
        for i in group:
            wins = [_sigmoid((scores[i] - scores[j]) / temperature) for j in group if j != i]
            rates[i] = sum(wins) / len(wins) if wins else None
    return rates


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
