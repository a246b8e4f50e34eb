"""Harder forms of tiny-pickscore: right on average only, by noise that the picture itself seeds, or yes and no."""

import hashlib
from functools import lru_cache

import numpy as np

from es_trl import RewardSet


NOISE = 2.0  # a little more than tiny-pickscore's own standard deviation over the latents of a prompt
THRESHOLD = 23.2  # about one in eight of the base's pictures is above it


@lru_cache(maxsize=1)
def pickscore() -> RewardSet:
    return RewardSet("tiny-pickscore").load()


def noisy_pickscore(prompts, images, noise: float = NOISE, **kwargs) -> list[float]:
    """The same picture gets the same noise, another picture an independent one."""
    scores = pickscore()(prompts, images)[:, 0]
    return [float(score + noise * noise_of(image)) for score, image in zip(scores, images, strict=True)]


def very_noisy_pickscore(prompts, images, **kwargs) -> list[float]:
    """Twice the noise."""
    return noisy_pickscore(prompts, images, noise=2 * NOISE)


def sparse_pickscore(prompts, images, **kwargs) -> list[float]:
    """1 where the score is above `THRESHOLD`, else 0."""
    return [float(score > THRESHOLD) for score in pickscore()(prompts, images)[:, 0]]


def noise_of(image) -> float:
    """A standard normal number, a function of the pixels."""
    seed = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
    return float(np.random.default_rng(seed).standard_normal())
