"""Tests beside the intervals: is a difference more than chance, and does that survive many comparisons?"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .statistics import as_scores, prompt_means


SIGNIFICANT = 0.05


def wilcoxon_p(model: ArrayLike, reference: ArrayLike) -> float:
    """
    Two-sided p-value of Wilcoxon's signed-rank test (Wilcoxon 1945) on the prompts' differences.

    It asks whether a typical prompt changes, where the bootstrap interval asks whether the mean does: a few prompts
    that change very much move the mean and hardly move the ranks.

    Args:
        model, reference (`array-like`): Equal shapes (prompts, images) or (prompts,), NaN where missing.

    Returns:
        `float`: In [0, 1]; 1 when no prompt differs, NaN when no prompt has both scores.

    Raises:
        ValueError: The shapes differ.
    """
    from scipy.stats import wilcoxon

    model, reference = as_scores(model), as_scores(reference)
    if model.shape != reference.shape:
        raise ValueError(f"paired scores must have one shape; got {model.shape} and {reference.shape}.")
    differences = prompt_means(model - reference)
    differences = differences[np.isfinite(differences)]
    if len(differences) == 0:
        return math.nan
    if not differences.any():
        return 1.0
    return float(wilcoxon(differences).pvalue)


def verdict(low: float, high: float, p_value: float) -> tuple[str, str | None]:
    """
    What an interval and a test of the same difference support together.

    Args:
        low, high (`float`): The bootstrap interval of the mean difference; NaN where there is none.
        p_value (`float`): Of the rank test, after Holm's correction where there is one.

    Returns:
        `tuple[str, str | None]`: `"higher"` or `"lower"` when both say so, else `"unclear"`; and then which of the two
            is the weaker: `"no interval"`, `"interval"` (it holds zero), `"test"` (its p-value is 0.05 or more), or
            `"both"`.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unclear", "no interval"
    excludes, agrees = low > 0 or high < 0, p_value < SIGNIFICANT
    if excludes and agrees:
        return ("higher" if low > 0 else "lower"), None
    return "unclear", "test" if excludes else "interval" if agrees else "both"


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Holm's step-down adjustment (Holm 1979): with it, the chance of even one false claim among all stays below 5 %
    when only adjusted values below 0.05 are called significant.

    Args:
        p_values (`Sequence[float]`): One per comparison; a NaN is no comparison and stays NaN.

    Returns:
        `list[float]`: Adjusted values in [0, 1], in the order given.
    """
    values = np.asarray(p_values, np.float64)
    adjusted = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted.tolist()
