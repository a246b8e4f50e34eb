"""A reward that is right on average only: tiny-pickscore plus noise, which the picture itself seeds."""

import hashlib
from functools import lru_cache

import numpy as np

from es_trl import RewardSet


NOISE = 2.0  # a little more than tiny-pickscore's own standard deviation over the latents of a prompt


@lru_cache(maxsize=1)
def pickscore() -> RewardSet:
    return RewardSet("tiny-pickscore").load()


def noisy_pickscore(prompts, images, **kwargs) -> list[float]:
    """The same picture gets the same noise, another picture an independent one."""
    scores = pickscore()(prompts, images)[:, 0]
    return [float(score + NOISE * noise_of(image)) for score, image in zip(scores, images, strict=True)]


def noise_of(image) -> float:
    """A standard normal number, a function of the pixels."""
    seed = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
    return float(np.random.default_rng(seed).standard_normal())
