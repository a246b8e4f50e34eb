"""From the rewards of a group of images to their advantages."""

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from ..rewards.results import weighted_total


EPSILON = 1e-4  # keeps a spread of nothing from being a division by nothing, as in Flow-GRPO


def combine(
    scores: np.ndarray, weights: np.ndarray, normalise: Callable[[np.ndarray], np.ndarray], aggregation: str
) -> np.ndarray:
    """
    `(P, G)` advantages of several reward functions: 0 for images without a finite reward under every function that
    applies to their prompt, which is every function that scored any image of the group.

    Args:
        scores (`np.ndarray`): `(P, G, K)`; NaN where a function gave nothing.
        weights (`np.ndarray`): `(K,)`.
        normalise (`Callable`): `(P, G)` rewards to `(P, G)` advantages, NaN staying NaN.
        aggregation (`str`): `"sum_then_normalize"` weighs and sums the functions first; `"normalize_then_sum"`
            normalises each alone (GDPO), so that one with large numbers does not drown the others.
    """
    rewards = weighted_total(scores, weights)
    if aggregation == "sum_then_normalize":
        advantages = normalise(rewards)
    else:
        applies = np.isfinite(scores).any(axis=1, keepdims=True)
        each = [np.where(applies[..., k], normalise(scores[..., k]), 0.0) for k in range(len(weights))]
        advantages = sum(weight * values for weight, values in zip(weights, each, strict=True))
    return np.where(np.isfinite(rewards) & np.isfinite(advantages), advantages, 0.0)


def group_advantages(rewards: np.ndarray, scale: str = "batch") -> np.ndarray:
    """
    `(r - mean of its group) / std` (GRPO, arXiv 2402.03300). A group in which all are alike gets zeros.

    Args:
        rewards (`np.ndarray`): `(P, G)`: prompt, image; NaN is left out of the means.
        scale (`str`): `"group"`: the standard deviation of the group; `"batch"`: one over all rewards, as in
            Flow-GRPO (arXiv 2505.05470), which does not blow up groups that hardly differ; `"none"`: 1.
    """
    mean, spread = moments(rewards)
    centred = rewards - mean
    if scale == "none":
        return centred
    if scale == "batch":
        finite = rewards[np.isfinite(rewards)]
        return centred / ((finite.std() if len(finite) else 0.0) + EPSILON)
    return centred / (spread + EPSILON)


def moments(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `(P, 1, ...)` of each group of `(P, G, ...)`, over its finite rewards."""
    finite = np.isfinite(rewards)
    count = np.maximum(finite.sum(axis=1, keepdims=True), 1)
    mean = np.where(finite, rewards, 0.0).sum(axis=1, keepdims=True) / count
    variance = (np.where(finite, rewards - mean, 0.0) ** 2).sum(axis=1, keepdims=True) / count
    return mean, np.sqrt(variance)


class PromptStatistics:
    """
    The last `buffer_size` rewards of every prompt, as baseline and scale (DDPO, arXiv 2305.13301, appendix D). A
    prompt with fewer than `min_count` uses the mean and standard deviation of the batch.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Iterable[str], rewards: np.ndarray) -> np.ndarray:
        """
        Takes the rewards `(P, G)` of P prompts in, but for NaN, then `(r - mean) / (std + 1e-4)` with each prompt's
        own statistics.
        """
        prompts = list(prompts)
        finite = rewards[np.isfinite(rewards)]
        batch = (finite.mean(), finite.std()) if len(finite) else (0.0, 0.0)
        for prompt, row in zip(prompts, rewards, strict=True):
            kept = self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size))
            kept.extend(float(reward) for reward in row if np.isfinite(reward))
        moments = np.array([self._moments(prompt) or batch for prompt in prompts])
        return (rewards - moments[:, :1]) / (moments[:, 1:] + EPSILON)

    def _moments(self, prompt: str) -> tuple[float, float] | None:
        kept = self.rewards[prompt]
        return (float(np.mean(kept)), float(np.std(kept))) if len(kept) >= self.min_count else None

    def to_json(self) -> dict[str, list[float]]:
        """The state as plain data; floats survive JSON bit by bit."""
        return {prompt: list(kept) for prompt, kept in self.rewards.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Goes on from what `to_json` gave."""
        self.rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state.items()}
