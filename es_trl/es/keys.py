"""Randomness as a function: every random number of the project is a pure function of (seed, tag, indices).

Nothing is drawn from a global generator and no generator outlives its key, so a run can be resumed, split over
processes or replayed member by member and still draw the same numbers.
"""

import hashlib

import torch


def make_seed(seed: int, tag: str, *indices: int) -> int:
    """
    Hashes a key to a 32-bit seed (mt19937, torch's CPU generator, uses no more than 32 bits).

    Args:
        seed (`int`): Seed of the run.
        tag (`str`): What the numbers are for: `"noise"`, `"latents"`, `"evaluation"`, `"prompt_order"`, ...
        *indices (`int`): Which ones: step, pair, prompt, image, ...

    Returns:
        `int` in `[0, 2**32)`.
    """
    key = "|".join([str(int(seed)), tag, *(str(int(index)) for index in indices)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")


def make_generator(seed: int, tag: str, *indices: int) -> torch.Generator:
    """A fresh CPU `torch.Generator` for the key: the same numbers on every machine, unlike CUDA generators."""
    return torch.Generator("cpu").manual_seed(make_seed(seed, tag, *indices))
