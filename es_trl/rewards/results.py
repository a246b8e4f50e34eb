"""What a reward returned -> one float64 per image. Strict: a wrong shape is an error, never broadcast; too many scores
that are missing end a step. And the one sum of several rewards."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


EXPECTED = "a list of one number (or None) per image"


def as_scores(result: Any, count: int, name: str, where: str = "") -> np.ndarray:
    """
    Scores of one reward as float64, shape (count,); None becomes NaN, NaN and infinities stay.

    Args:
        result (`list`, `tuple`, or a 1-D array, masked array, tensor or pandas series): what the function returned. A
            masked entry is None.
        count (`int`): number of images it was given.
        name (`str`): the function's name, for messages.
        where (`str`, *optional*): the place in the run, for messages.

    Raises:
        `ValueError`: any other type or shape, a wrong length, or an element that is not a number that fits a float.
    """
    if hasattr(result, "detach"):  # a tensor; torch itself need not be imported to see it
        try:
            result = result.detach().cpu()
            result = result.double().numpy() if result.dtype.is_floating_point else result.numpy()
        except (TypeError, RuntimeError) as error:  # a sparse, masked or meta tensor has no array
            got = f"a {type(result).__name__} that is no plain tensor ({' '.join(str(error).split())})"
            raise _error(name, where, count, got) from None
    result = _plain(result)
    if isinstance(result, np.ndarray) and result.ndim != 1:
        raise _error(name, where, count, f"an array of shape {result.shape}")
    if not isinstance(result, list | tuple | np.ndarray):
        raise _error(name, where, count, _describe(result))
    if len(result) != count:
        hint = ""
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            hint = "; a DDPO reward returning (scores, info) is adapted by es_trl.rewards.from_ddpo"
        raise _error(name, where, count, f"{len(result)} of them{hint}")
    return np.array([_number(value, i, count, name, where) for i, value in enumerate(result)], dtype=np.float64)


def _plain(result: Any) -> Any:
    """The list in a masked array (None where its mask hides a value) or in a 1-D series, index or array of pandas."""
    if isinstance(result, np.ndarray) and not isinstance(result, np.ma.MaskedArray):
        return result
    if getattr(result, "ndim", 0) == 1 and hasattr(result, "tolist"):
        return result.tolist()
    return result


def _number(value: Any, index: int, count: int, name: str, where: str) -> float:
    # pandas.NA and NaT are neither numbers nor None; no need of pandas to see them
    if value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType"):
        return float("nan")
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            raise _error(name, where, count, f"a number beyond the range of floats at index {index}") from None
        except TypeError:  # numpy calls a duration an integer
            pass
    raise _error(name, where, count, f"{_describe(value)} at index {index}")


def _describe(value: Any) -> str:
    if getattr(value, "ndim", 0):
        kind = "an array" if isinstance(value, np.ndarray) or hasattr(value, "detach") else f"a {type(value).__name__}"
        return f"{kind} of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _error(name: str, where: str, count: int, got: str) -> ValueError:
    place = f" at {where}" if where else ""
    return ValueError(f"reward function {name!r}{place} must return {EXPECTED}, {count} here, but returned {got}")


def refuse_missing(
    missing: float,
    what: str,
    scores: Any,
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
        scores (array or tensor), names (`Sequence[str]`): `(..., K)`, to say which of the K functions it was.
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


def weighted_total(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Weighted sum of the reward functions for every picture of every group (in an evaluation: of every prompt): training
    maximises it; evaluations, best-of-N and the best model go by it.

    A function that scored no picture of a group does not apply to its prompt, and the others decide. The fitness of ES
    (`es_trl.es.compute_fitness`) goes by the same rule.

    Scores `(..., G, K)`, of G pictures by K functions, and weights `(K,)` to `(..., G)` fp64; NaN where a function
    that applies gave no score, or none applies.
    """
    finite = np.isfinite(scores)
    applies = finite.any(axis=-2, keepdims=True)
    missing = (~finite & applies).any(axis=-1) | ~applies.any(axis=-1)
    return np.where(missing, np.nan, np.where(finite, scores, 0.0) @ np.asarray(weights, np.float64))


def zero_spread(rewards: np.ndarray) -> np.ndarray:
    """`(P,)` bool: groups of `(P, G)` rewards whose finite ones are all alike, or missing."""
    finite = np.isfinite(rewards)
    return np.where(finite, rewards, -np.inf).max(axis=1) <= np.where(finite, rewards, np.inf).min(axis=1)


def shorten(prompts: Sequence[str], length: int = 80) -> str:
    """The first prompt, quoted and cut, for error messages."""
    if not len(prompts):
        return "no prompt"
    text = str(prompts[0])
    return repr(text if len(text) <= length else text[: length - 3] + "...")
