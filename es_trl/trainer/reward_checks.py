"""What every method does with the scores of a step: refuse too many that are missing, log them."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..pipelines.drawing import ODD


def refuse_missing(
    missing: float,
    what: str,
    scores: np.ndarray | torch.Tensor,
    names: Sequence[str],
    step: int,
    prompt: str,
    max_invalid_fraction: float,
    pictures: str = "",
) -> None:
    """
    Raises `RuntimeError`, before anything is updated, if too much of a step has no finite reward.

    Args:
        missing (`float`): Share in [0, 1] that cannot be used.
        what (`str`): Of what: `"members"` or `"images"`.
        scores (`np.ndarray` or `torch.Tensor`): `(..., K)`, to say which functions it was.
        names (`Sequence[str]`): Those of the K functions.
        step (`int`), prompt (`str`): Where it happened.
        max_invalid_fraction (`float`): The limit, in [0, 1).
        pictures (`str`, *optional*): What was wrong with pictures of this run.
    """
    if missing <= max_invalid_fraction:
        return
    bad = (~np.isfinite(np.asarray(scores))).reshape(-1, len(names)).any(axis=0)
    culprits = ", ".join(name for name, is_bad in zip(names, bad, strict=True) if is_bad)
    advice = pictures or "Check the reward function on these prompts"
    raise RuntimeError(
        f"Step {step}: {missing:.0%} of the {what} have no finite reward ({culprits}), more than "
        f"max_invalid_fraction={max_invalid_fraction}. The adapter was not updated. {advice}; the first prompt "
        f"is {prompt[:80]!r}. Or raise max_invalid_fraction."
    )


def log_pictures(trainer) -> None:
    """Counts this step's pictures, of all processes, that have no score or are black; nothing where there are none."""
    new = torch.tensor(trainer.adapter.drawer.new_pictures(), dtype=torch.float64)
    for kind, count in zip(ODD, trainer.peers.gather(new).sum(dim=0).tolist(), strict=True):
        if count:
            trainer.add_metric(f"pictures/{kind}", count)


def log_rewards(
    add_metric: Callable[[str, float], None],
    rewards: np.ndarray | torch.Tensor,
    scores: np.ndarray | torch.Tensor,
    names: Sequence[str],
    zero_spread: np.ndarray | torch.Tensor,
) -> None:
    """
    The metrics that all methods share, under TRL's names.

    Args:
        add_metric (`Callable`): Takes a name and a number.
        rewards (`np.ndarray` or `torch.Tensor`): Weighted rewards of any shape; those not finite are left out.
        scores (`np.ndarray` or `torch.Tensor`): `(..., K)`.
        names (`Sequence[str]`): Those of the K functions.
        zero_spread (`np.ndarray` or `torch.Tensor`): `(P,)` bool, prompts on which all scored alike.
    """
    mean, spread = _moments(torch.as_tensor(rewards))
    add_metric("reward", mean)
    add_metric("reward_std", spread)
    add_metric("frac_reward_zero_std", torch.as_tensor(zero_spread).double().mean())
    for k, name in enumerate(names):
        mean, spread = _moments(torch.as_tensor(scores)[..., k])
        add_metric(f"rewards/{name}/mean", mean)
        add_metric(f"rewards/{name}/std", spread)


def zero_spread(rewards: np.ndarray) -> np.ndarray:
    """`(P,)` bool: groups of `(P, G)` rewards whose finite ones are all alike, or missing."""
    finite = np.isfinite(rewards)
    return np.where(finite, rewards, -np.inf).max(axis=1) <= np.where(finite, rewards, np.inf).min(axis=1)


def _moments(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the finite `values`; NaN if there are none."""
    values = values[torch.isfinite(values)]
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (math.nan, math.nan)
