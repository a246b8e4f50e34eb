"""The one sum of several rewards: training maximises it; evaluations, best-of-N and the best model go by it."""

import numpy as np


def weighted_total(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Weighted sum of the reward functions for every picture of every group (in an evaluation: of every prompt).

    A function that scored no picture of a group does not apply to its prompt, and the others decide. The fitness of ES
    (`es_trl.es.compute_fitness`) goes by the same rule.

    Args:
        scores (`np.ndarray`): `(..., G, K)`: picture of the group, function; not finite where there is no score.
        weights (`np.ndarray`): `(K,)`.

    Returns:
        `np.ndarray`: `(..., G)` fp64; NaN where a function that applies gave no score, or none applies.
    """
    finite = np.isfinite(scores)
    applies = finite.any(axis=-2, keepdims=True)
    missing = (~finite & applies).any(axis=-1) | ~applies.any(axis=-1)
    return np.where(missing, np.nan, np.where(finite, scores, 0.0) @ np.asarray(weights, np.float64))
