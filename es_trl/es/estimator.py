"""Fitness and noise to the ES gradient estimate of every adapter matrix (EGGROLL, arXiv 2511.16652, Eq. 6)."""

import torch

from .members import Population
from .noise import Factors


def direction_weights(fitness: torch.Tensor, population: Population) -> torch.Tensor:
    """`(num_directions,)`: `F(+E) - F(-E)` of each pair, or the fitness itself for independent members."""
    return fitness[0::2] - fitness[1::2] if population.antithetic else fitness


def estimate(
    factors: Factors, fitness: torch.Tensor, population: Population, part: slice = slice(None)
) -> torch.Tensor:
    """
    The ES estimate `ghat = (1/N) sum_i F_i s_i E_i` of one matrix, never writing out an `E_i`.

    Args:
        factors (`Factors`): `U (D, m, r)` and `V (D, n, r)` of all directions of the step, or of some.
        fitness (`torch.Tensor`): `(N,)`; a dropped member has fitness 0.
        population (`Population`): Members and their signs.
        part (`slice`, *optional*): Which directions `factors` has; estimates of all parts add up to the whole one.

    Returns:
        `torch.Tensor` of shape `(m, n)`, fp32: an ascent direction of the fitness. With unit-variance fitness that
        carries no signal its entries have RMS `1 / sqrt(N)`.
    """
    weights = direction_weights(fitness, population)[part].to(factors.U)
    if weights.shape[0] != factors.U.shape[0]:
        raise ValueError(f"fitness names {weights.shape[0]} directions but the noise holds {factors.U.shape[0]}.")
    weighted = factors.U * weights[:, None, None]
    U = weighted.permute(1, 0, 2).reshape(factors.U.shape[1], -1)
    V = factors.V.permute(1, 0, 2).reshape(factors.V.shape[1], -1)
    return (U @ V.T) / (factors.rank**0.5 * population.size)


def gradient(
    factors: Factors,
    fitness: torch.Tensor,
    population: Population,
    sigma: float,
    num_valid: int,
    part: slice = slice(None),
) -> torch.Tensor:
    """
    What goes into `.grad`: `-sigma * sqrt(N) * ghat` over the `num_valid` members that count.

    With plain SGD the learning rate is then the RMS step per entry in units of sigma, whatever the population, the
    noise rank, the number of prompts and the scale of the reward.
    """
    if num_valid == 0:
        return torch.zeros(factors.U.shape[1], factors.V.shape[1], device=factors.U.device)
    ghat = estimate(factors, fitness, population, part) * (population.size / num_valid)
    return -sigma * num_valid**0.5 * ghat


def pair_snr(fitness: torch.Tensor, population: Population) -> float:
    """
    How much of the fitness variance is signal along the directions: `std(F+ - F-) / (sqrt(2) std(F))`.

    Near 1 when the halves of a pair are as different as unrelated members (signal up to sqrt(2)); near 0 when both
    halves score alike (even-order effects only). NaN for independent members, which have no pairs.
    """
    if not population.antithetic:
        return float("nan")
    spread = fitness.std(unbiased=False)
    if spread == 0:
        return 0.0
    difference = fitness[0::2] - fitness[1::2]
    return float(difference.square().mean().sqrt() / (2**0.5 * spread))
