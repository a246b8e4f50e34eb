"""What an ES run sees along its way, without one extra picture: slopes of all it scores, and the margin's turn."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..es import Factors, MeanUpdate, Population, Slope, Turn, compute_fitness, projections, slope
from ..rewards import Margin, NamedReward, RewardSet, has_margin


@dataclass
class Scored:
    """
    The functions that score a step's images, by their column in the scores.

    Attributes:
        rewards (`RewardSet`): All of them; weight 0 for what is not trained.
        trained (`int`): The first that many are the run's rewards.
        margins (`dict[int, int]`): Column of the margin of a trained reward, by the reward's.
        guards (`list[int]`): Columns of the guards' margins.
    """

    rewards: RewardSet
    trained: int
    margins: dict[int, int] = field(default_factory=dict)
    guards: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, rewards: RewardSet, guards: Sequence = (), others: Sequence = (), **options) -> "Scored":
        """
        The run's rewards, the margins of those that have one, guards (by their margins), and others for their slopes;
        a `ValueError` where a guard has no margin.
        """
        functions = dict(zip(rewards.names, rewards.functions(), strict=True))
        parts: list[Any] = [_as_named(name, function) for name, function in functions.items()]
        margins = {}
        for k, (name, function) in enumerate(functions.items()):
            if has_margin(function):
                margins[k] = len(parts)
                parts.append(_margin_of(name, function))
        guard_columns = list(range(len(parts), len(parts) + len(guards)))
        if guards:
            built = RewardSet(list(guards), **options)
            parts += map(_margin_of, built.names, built.functions())
        parts += others
        weights = [*rewards.weights, *[0.0] * (len(parts) - len(rewards))]
        return cls(RewardSet(parts, weights, **options).load(), len(rewards), margins, guard_columns)

    def record(self) -> dict:
        """Plain data from which [`Scored`] can be made with stand-ins for the functions."""
        return {"names": self.rewards.names, "margins": list(self.margins.items()), "guards": self.guards}


def _margin_of(name: str, function) -> NamedReward:
    return _as_named(f"{name}_margin", Margin(function, f"{name}_margin"))


def _as_named(name: str, function) -> NamedReward:
    return NamedReward(name, name, lambda device, dtype: function)


def energy_by_kind(optimizer: MeanUpdate, names: Sequence[str]) -> dict[str, float]:
    """
    How much of the fitness variance is signal that all estimates share, without bias: `|S / n|^2 - d / n`.

    Returns:
        `dict[str, float]`: `signal` in all matrices, `signal_error` (its standard error if there is none), and
        `energy/<kind>` by the kind of layer, such as `attn1.to_v`; empty before the first step.
    """
    members = optimizer.param_groups[0]["members"]
    sums = [optimizer.state[theta].get("sum") for theta in optimizer.param_groups[0]["params"]]
    if not members or any(value is None for value in sums):
        return {}
    found = {"signal": 0.0, "signal_error": (2 * sum(value.numel() for value in sums)) ** 0.5 / members}
    for name, value in zip(names, sums, strict=True):
        energy = float((value / members).square().sum()) - value.numel() / members
        kind = f"energy/{kind_of(name)}"
        found["signal"] += energy
        found[kind] = found.get(kind, 0.0) + energy
    return found


def kind_of(name: str) -> str:
    """`transformer_blocks.3.attn1.to_out.0.core` -> `attn1.to_out`."""
    parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
    return ".".join(parts[-2:])


class Watch:
    """
    Logs slopes, and notices where the watched margin turns (see [`Turn`]): that of the guards, or without any that of
    the trained rewards. Everything it remembers lies in the optimizer, so that it is saved and restored with it.

    Args:
        scored, population, optimizer: Of the run.
        names (`Sequence[str]`): Names of the matrices, in the order of the optimizer's parameters.
        when_turned (`str`): `"restart"`, `"stop"` or `"ignore"`.
        scaling (`Mapping`): `scale_rewards` and `aggregation` of [`compute_fitness`].
    """

    def __init__(
        self,
        scored: Scored,
        population: Population,
        optimizer: MeanUpdate,
        names: Sequence[str],
        when_turned: str,
        scaling: Mapping[str, str],
    ):
        self.scored, self.population, self.optimizer = scored, population, optimizer
        self.names, self.when_turned, self.scaling = list(names), when_turned, dict(scaling)
        self.watched = "guard" if scored.guards else "margin" if scored.margins else None
        self._seen: list[Slope] = []

    @property
    def _memory(self) -> dict:
        return self.optimizer.param_groups[0].setdefault("watch", {"turns": 0, "stopped": False, "turn": {}})

    @property
    def stopped(self) -> bool:
        """Whether the run has come to its end by itself."""
        return self._memory["stopped"]

    @property
    def turns(self) -> int:
        """How often what is watched has turned."""
        return self._memory["turns"]

    @property
    def restarted(self) -> bool:
        """Whether the objective is reward + margin by now."""
        return self._memory["turns"] > 0 and not self.stopped

    def objective(self) -> tuple[list[int], torch.Tensor]:
        """Columns that are trained now, and their weights `(K',)`: after a restart the margins count as well."""
        columns = list(range(self.scored.trained))
        weights = [self.scored.rewards.weights[k] for k in columns]
        if self.restarted:
            weights += [weights[k] for k in self.scored.margins]
            columns += self.scored.margins.values()
        return columns, torch.tensor(weights, dtype=torch.float64)

    def slopes(self, scores: torch.Tensor, blocks: Iterable[tuple[slice, Mapping[str, Factors]]]) -> dict[str, Slope]:
        """
        Slopes along the last step, by name: every function, the weighted `reward`, and the watched margin; of the
        scores `(N, C, K)` of all functions that score, and all directions of the step.
        """
        steps = self.optimizer.last_step()
        if steps is None or not any(step.any() for step in steps):
            return {}
        length = float(sum(step.double().square().sum() for step in steps)) ** 0.5
        projected = projections(blocks, dict(zip(self.names, steps, strict=True)), self.population)

        def slope_of(columns: Iterable[int], weights: Iterable[Any]) -> Slope:
            weighed = torch.tensor(list(weights), dtype=torch.float64)
            values = compute_fitness(scores[:, :, list(columns)], self.population, weighed, **self.scaling).values
            return slope(values, projected, length, self.population)

        weights = self.scored.rewards.weights
        found = {name: slope_of([k], [1.0]) for k, name in enumerate(self.scored.rewards.names)}
        found["reward"] = slope_of(range(self.scored.trained), weights[: self.scored.trained])
        if self.watched == "guard":
            found["guard"] = slope_of(self.scored.guards, [1.0] * len(self.scored.guards))
        elif self.watched == "margin":
            found["margin"] = slope_of(self.scored.margins.values(), [weights[k] for k in self.scored.margins])
        if self.watched:
            seen = found[self.watched]
            self._seen.append(Slope(seen.value * length, seen.error * length))
        return found

    def turned(self) -> bool:
        """
        Called once in every step, after its slopes. Where the watched margin has surely fallen since its maximum, all
        estimates are forgotten and theta is what it was there; a second turn, or one that is not to be followed by a
        restart, ends the run.
        """
        seen, self._seen = self._seen, []
        if self.watched is None or self.when_turned == "ignore":
            return False
        state = self._memory
        if not seen:  # nothing has moved since the start, or since the last turn
            self.optimizer.remember()
            return False
        turn = Turn(**state["turn"])
        verdict = turn.add(
            sum(change.value for change in seen) / len(seen),
            sum(change.error**2 for change in seen) ** 0.5 / len(seen),
        )
        state["turn"] = dataclasses.asdict(turn)
        if verdict == "top":
            self.optimizer.remember()
        if verdict != "turned":
            return False
        again = self.when_turned == "restart" and self.scored.margins and not state["turns"]
        state.update(turns=state["turns"] + 1, stopped=not again, turn={})
        self.optimizer.go_back()
        return True
