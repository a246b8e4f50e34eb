"""Slopes: how anything that is scored changes along the last step, measured by the population itself.

The members of a step are drawn around the theta that the last step reached, with noise that knows nothing of that
step. So `<h, s>`, the estimate `h = 1/N sum_i f_i E_i` of any score's gradient against the step `s`, is an unbiased
estimate of that score's change along `s`, and its error is known: no picture is drawn for it. It needs only the
projections `<E_i, s>`, one number per member.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .members import Population
from .noise import Factors


@dataclass
class Slope:
    """
    Change of one score per unit of length along a direction.

    Attributes:
        value (`float`): In deviations of the score within a group of members, per unit of length in units of sigma.
        error (`float`): Standard error of `value`, from the spread between the groups of members (between members,
            with less than eight groups).
    """

    value: float
    error: float


def projections(
    blocks: Iterable[tuple[slice, Mapping[str, Factors]]],
    direction: Mapping[str, torch.Tensor],
    population: Population,
) -> torch.Tensor:
    """
    `(N,)` fp64: `s_i <E_i, direction>` of every member, summed over all matrices.

    Args:
        blocks (`Iterable[tuple[slice, Mapping[str, Factors]]]`): All directions of the step, from
            [`StepNoise.blocks`].
        direction (`Mapping[str, torch.Tensor]`): `(m, n)` of every matrix.
    """
    total = torch.zeros(population.num_directions, dtype=torch.float64)
    for part, factors in blocks:
        for name, along in direction.items():
            own = factors[name].to(along.device)
            product = torch.einsum("dmr,mn,dnr->d", own.U, along.to(own.U), own.V) / own.rank**0.5
            total[part] += product.double().cpu()
    members = range(population.size)
    return population.signs(members).double() * total[population.directions(members)]


def slope(scores: torch.Tensor, projected: torch.Tensor, length: float, population: Population) -> Slope:
    """
    The slope of one score.

    Args:
        scores (`torch.Tensor`): `(N,)` standardised scores: mean 0 and deviation 1 over the members, 0 for members
            that do not count.
        projected (`torch.Tensor`): `(N,)` from [`projections`].
        length (`float`): Euclidean norm of the direction, above 0.
        population (`Population`): For its groups.
    """
    products = scores.double() * projected
    groups = products.view(population.groups, -1).mean(dim=1) if population.groups >= 8 else products
    error = float(groups.std(correction=1)) / len(groups) ** 0.5 if len(groups) > 1 else float("nan")
    return Slope(float(products.mean()) / length, error / length)


@dataclass
class Turn:
    """
    Where a score stopped rising along a run: the cumulative sum of its changes, against its maximum.

    `change` is the slope times the length of the last step; after adding it, the sum belongs to the theta on which the
    members of the step stand. The turn is certain when the sum is more than `errors` standard errors below its
    maximum.

    Attributes:
        total, top (`float`): The sum, and its maximum (0 at the start).
        variance (`float`): Of the sum, counted from the maximum.
    """

    total: float = 0.0
    top: float = 0.0
    variance: float = 0.0
    errors: float = 2.0

    def add(self, change: float, error: float) -> str:
        """`"top"` if the sum has a new maximum, `"turned"` if it is surely below it, else `"below"`."""
        self.total += change
        self.variance += error**2
        if self.total > self.top:
            self.top, self.variance = self.total, 0.0
            return "top"
        return "turned" if self.total < self.top - self.errors * self.variance**0.5 else "below"
