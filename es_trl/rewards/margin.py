"""Margin: what a picture shows of its own prompt, beyond what pleases the scorer under any prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Margin:
    """
    A scorer's score of a picture under its own prompt minus its mean score under the step's other prompts.

    What raises the score under every prompt (contrast, a style, a colour) cancels; what only this prompt asks for
    stays. Features are computed once per picture and once per prompt, so it costs next to nothing beside the scorer
    itself. In an evaluation the other prompts are those of the whole prompt set.

    Args:
        reward (`Callable`): A reward with a method `across(prompts, images)` that returns the `(B, P)` scores of B
            images under each of P prompts, as PickScore, `clip_text` and `hpsv2` have it.
        name (`str`, *optional*): In metrics; by default that of the reward with `_margin`.

    Raises:
        `ValueError`: the reward has no `across`, so its margin is not known.
    """

    def __init__(self, reward: Callable, name: str | None = None):
        self.__name__ = name or f"{getattr(reward, '__name__', type(reward).__name__)}_margin"
        if not has_margin(reward):
            raise ValueError(
                f"{self.__name__}: the reward has no method across(prompts, images), which scores every image under "
                "every prompt; margins are known of pickscore and CLIP checkpoints like it, clip_text and hpsv2."
            )
        self.reward: Any = reward

    def __call__(self, prompts, images, step_prompts, **kwargs) -> list[float | None]:
        """One margin per image, None where there is no other prompt; `step_prompts` may hold a prompt repeatedly."""
        distinct = list(dict.fromkeys([*step_prompts, *prompts]))
        if len(distinct) < 2:
            return [None] * len(images)
        scores = self.reward.across(distinct, images).double()
        own = scores[range(len(images)), [distinct.index(prompt) for prompt in prompts]]
        return (own - (scores.sum(dim=1) - own) / (len(distinct) - 1)).tolist()


def has_margin(reward: Callable) -> bool:
    """Whether the margin of a reward can be computed."""
    return callable(getattr(reward, "across", None))
