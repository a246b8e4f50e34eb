"""Win rate within the group: how often a picture beats the others of its prompt, by PickScore."""

from __future__ import annotations

import numpy as np

from .pickscore import PickScore
from .preferences import members_of_groups, win_rates


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
        scores, rates = np.array(self.score(prompts, images)), np.full(len(images), np.nan)
        for group in members_of_groups(prompts, groups):
            rates[group] = win_rates(scores[None, group], self.temperature)[0]
        return [None if np.isnan(rate) else float(rate) for rate in rates]
