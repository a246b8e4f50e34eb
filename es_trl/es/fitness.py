"""Rewards of a population to one fitness per member."""

from dataclasses import dataclass

import torch

from .members import Population


SCALE_REWARDS = ("group", "batch", "none")
FITNESS_SHAPING = ("z", "centered_rank", "sign", "win_rate")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


@dataclass
class Fitness:
    """
    Attributes:
        values (`torch.Tensor`): `(N,)` fp64, 0 for dropped members.
        valid (`torch.Tensor`): `(N,)` bool; a pair is dropped whole.
        rewards (`torch.Tensor`): `(N, C)` fp64 weighted reward of member i on its column j; NaN where missing.
        zero_spread (`torch.Tensor`): `(G * C,)` bool, columns on which every valid member scored the same.
    """

    values: torch.Tensor
    valid: torch.Tensor
    rewards: torch.Tensor
    zero_spread: torch.Tensor

    @property
    def num_valid(self) -> int:
        """How many members count."""
        return int(self.valid.sum())


def compute_fitness(
    scores: torch.Tensor,
    population: Population,
    weights: torch.Tensor | None = None,
    scale_rewards: str = "group",
    shaping: str = "z",
    aggregation: str = "sum_then_normalize",
) -> Fitness:
    """
    Turns the scores of a step into fitness (EGGROLL, arXiv 2511.16652, section on reward shaping).

    With the defaults `z_ij = (s_ij - mean_i s_ij) / std`, means and one standard deviation over the members of a group
    (by default there is one group, of all members); `F_i = mean_j z_ij`, scaled to unit standard deviation over the
    valid members so that the step does not depend on the number of prompts. A column (one prompt and image index) on
    which all members of its group score alike carries no weight; if all do, so is the fitness zero.

    Args:
        scores (`torch.Tensor`): `(N, C, K)`: member, column of its group, reward function. Not-finite means missing:
            if a function scored no member of a column it does not apply there; if it missed only some, those members
            (and their pairs) are dropped.
        population (`Population`): Members, pairs and groups.
        weights (`torch.Tensor`, *optional*): `(K,)` weights of the functions; ones by default.
        scale_rewards (`str`): `"group"` centres each column and divides by one standard deviation per group; `"batch"`
            centres and divides over the whole step; `"none"` centres each column and leaves the reward's scale in the
            step.
        shaping (`str`): `"z"`; `"centered_rank"` ranks members in [-0.5, 0.5] on their mean; `"sign"` keeps the sign
            of each pair's difference (antithetic only); `"win_rate"` is the share of other members of the group beaten
            per column.
        aggregation (`str`): TRL's `multi_objective_aggregation`: weight and sum the functions, then normalise, or
            normalise each function first, on each column by its own mean and standard deviation whatever
            `scale_rewards` says.

    Raises:
        `ValueError`: for an unknown option, or `"sign"` without pairs.
    """
    _check_option("scale_rewards", scale_rewards, SCALE_REWARDS)
    _check_option("fitness_shaping", shaping, FITNESS_SHAPING)
    _check_option("multi_objective_aggregation", aggregation, AGGREGATIONS)
    if shaping == "sign" and not population.antithetic:
        raise ValueError('fitness_shaping="sign" compares the halves of a pair; set antithetic=True or use "z".')
    scores = scores.to(torch.float64)
    weights = torch.ones(scores.shape[2]) if weights is None else weights
    weights = weights.to(scores)

    finite = torch.isfinite(scores)
    answered = finite.view(population.groups, population.group_size, *scores.shape[1:]).any(dim=1)
    applies = answered.repeat_interleave(population.group_size, dim=0)  # (N, C, K): functions that answered there
    valid = population.drop_incomplete((finite | ~applies).flatten(1).all(dim=1) & applies.flatten(1).any(dim=1))
    rewards = (torch.where(finite, scores, 0.0) * weights).sum(dim=2)
    rewards[(~finite & applies).any(dim=2) | ~applies.any(dim=2)] = torch.nan

    zero_spread = torch.ones(population.groups, scores.shape[1], dtype=torch.bool)
    members = torch.zeros(population.size, dtype=torch.float64)
    whole = _center_and_spread(rewards[valid]) if scale_rewards == "batch" and valid.any() else None
    for group, in_group in enumerate(answered):
        own = torch.arange(population.size) // population.group_size == group
        columns = in_group.any(dim=1)
        used = rewards[valid & own][:, columns]
        if not used.numel():
            continue
        zero_spread[group, columns] = (used == used[:1]).all(dim=0)
        if zero_spread[group].all():
            continue
        if aggregation == "sum_then_normalize":
            members[valid & own] = _win_rate(used) if shaping == "win_rate" else _z_scores(used, scale_rewards, whole)
            continue
        # A function that is silent on some prompts adds nothing there, so each prompt weighs the same.
        score_members = _win_rate if shaping == "win_rate" else _z_scores_per_column
        members[valid & own] = sum(
            weights[k]
            * (in_group[:, k].sum() / columns.sum())
            * score_members(scores[valid & own][:, in_group[:, k], k])
            for k in range(scores.shape[2])
            if in_group[:, k].any()
        )
    values = torch.zeros(population.size, dtype=torch.float64)
    if not zero_spread.all():
        values[valid] = _shape(members[valid], shaping, scale_rewards)
    return Fitness(values, valid, rewards, zero_spread.flatten())


def _center_and_spread(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    known = rewards[~rewards.isnan()]
    return known.mean(), known.std(correction=0)


def _z_scores(
    rewards: torch.Tensor, scale_rewards: str, whole: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """`(n, C) -> (n,)`: centred, scaled, averaged over columns; `whole` are mean and deviation of the whole step."""
    if whole is not None:
        centre, spread = whole
    else:
        centre = rewards.mean(dim=0)
        spread = rewards.std(correction=0) if scale_rewards != "none" else torch.ones(())
    return ((rewards - centre) / (spread if spread > 0 else 1.0)).mean(dim=1)


def _z_scores_per_column(rewards: torch.Tensor) -> torch.Tensor:
    """
    `(n, C) -> (n,)`: each column centred and scaled by itself, averaged over columns.

    TRL's definition for one function among several. One standard deviation over all columns would hold the differences
    between prompts as well: a function that rates prompts, more than pictures, would lose its weight.
    """
    centred = rewards - rewards.mean(dim=0)
    spread = rewards.std(dim=0, correction=0)
    spread[spread <= 1e-12 * rewards.abs().amax(dim=0)] = torch.inf  # equal but for rounding
    return (centred / spread).mean(dim=1)


def _win_rate(rewards: torch.Tensor) -> torch.Tensor:
    """`(n, C) -> (n,)`: share of the other members beaten on the same column (a tie counts half), minus one half."""
    beaten = (rewards[:, None] > rewards[None]).double() + 0.5 * (rewards[:, None] == rewards[None]).double()
    others = max(len(rewards) - 1, 1)
    return ((beaten.sum(dim=1) - 0.5) / others).mean(dim=1) - 0.5


def _shape(members: torch.Tensor, shaping: str, scale_rewards: str) -> torch.Tensor:
    if shaping == "centered_rank":
        beaten = (members[:, None] > members[None]).double() + 0.5 * (members[:, None] == members[None]).double()
        members = (beaten.sum(dim=1) - 0.5) / max(len(members) - 1, 1) - 0.5
    elif shaping == "sign":
        signs = torch.sign(members[0::2] - members[1::2])
        return torch.stack([signs, -signs], dim=1).flatten()
    if scale_rewards == "none" and shaping == "z":
        return members - members.mean()
    spread = members.std(correction=0)
    return (members - members.mean()) / spread if spread > 0 else torch.zeros_like(members)


def _check_option(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {value!r}.")
