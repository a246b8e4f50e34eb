"""From estimates to steps: every member of a run weighs alike, and the step has a size known beforehand.

A member's fitness `F` has unit deviation over its step and its perturbation `E` unit variance, so that over `n`
members without any signal the sum `S = sum_i F_i E_i` has entries of variance `n`: `S / n` is the mean estimate of
EGGROLL (arXiv 2511.16652, Eq. 6) over the whole run, and `S / sqrt(n)` has entries of unit variance plus `sqrt(n)`
times the signal. Without any, `|S|^2 / n` has mean `d`, the number of entries, and deviation `sqrt(2 d)`: until it is
two deviations above that, steps are shortened in proportion, so that next to nothing moves where nothing was found (a
hundredth remains, so that a short trial run ends with an adapter that draws something else, and not with the base).
Momentum as torch's SGD has it (`momentum=0.9, dampening=0.9`) would let the first estimate in undamped, with ten times
the weight of any other.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


CERTAIN = 2.0  # deviations of |S|^2 / n above pure noise at which a step has its whole length
LEAST = 0.01  # of a step's length, where there is no more than noise


def first_step(travel: float, steps: int) -> float:
    """Length of the first of `T` steps `eta (1 - t / T)` whose sum is `travel`: `2 travel / (T + 1)`."""
    return 2 * travel / (steps + 1)


def travel_left(travel: float, done: int, steps: int) -> float:
    """What is left of `travel` after `done` of `steps` steps of [`first_step`]."""
    left = max(0, steps - done)
    return travel * left * (left + 1) / (steps * (steps + 1))


def mean_step(weighted_sums: Sequence[torch.Tensor], members: int, length: float) -> list[torch.Tensor]:
    """
    The step `length * believed * S / sqrt(n)` of every matrix, in units of sigma, where `believed` is
    `(|S|^2 / n - d) / (2 sqrt(2 d))`, between .01 and 1.

    Args:
        weighted_sums (`Sequence[torch.Tensor]`): `S` by matrix, `(m, n)` fp32: the sum of `F_i s_i E_i` over all
            members so far. `d` is the number of entries of all matrices together.
        members (`int`): How many members that were, `n >= 1`.
        length (`float`): RMS per entry, in units of sigma, that the step would have if all of it were noise and
            believed.
    """
    energy = sum(float(value.double().square().sum()) for value in weighted_sums) / members
    entries = sum(value.numel() for value in weighted_sums)
    believed = min(1.0, max(LEAST, (energy - entries) / (CERTAIN * (2 * entries) ** 0.5)))
    return [value * (length * believed / members**0.5) for value in weighted_sums]


class MeanUpdate(torch.optim.Optimizer):
    """
    Steps along the mean of all estimates since the start, or since the last `go_back`.

    `.grad` holds minus the sum of `F_i s_i E_i` over the members of the step, and `add_members` says how many they
    are, before each `step`; the learning rate is the `length` of [`mean_step`].

    Args:
        params (`Iterable[nn.Parameter]`): Theta, fp32.
        lr (`float`): See above; usually scheduled linearly to zero.
        sigma (`float`): Deviation of the perturbations.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, sigma: float):
        super().__init__(params, {"lr": lr, "sigma": sigma, "members": 0, "going_back": False})
        if len(self.param_groups) != 1:
            raise ValueError("MeanUpdate takes one group of parameters: all members of a run weigh alike.")

    @property
    def _group(self) -> dict[str, Any]:
        return self.param_groups[0]

    def add_members(self, count: int) -> None:
        """Counts the members whose fitness the gradients of the coming step hold."""
        self._group["members"] += count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """
        Adds the step to theta and keeps it, in units of sigma, for `last_step`; or goes back, if that was asked for.
        """
        group = self._group
        if group["going_back"]:
            group["going_back"], group["members"] = False, 0
        for theta in group["params"]:
            state = self.state[theta]
            if not group["members"]:  # nothing but invalid members so far, or going back
                theta.copy_(state.get("best", theta))
                state.pop("sum", None)
                state["last"] = torch.zeros_like(theta)
                continue
            if theta.grad is not None:
                state["sum"] = state["sum"] - theta.grad if "sum" in state else -theta.grad
        if group["members"]:
            sums = [self.state[theta]["sum"] for theta in group["params"]]
            for theta, step in zip(group["params"], mean_step(sums, group["members"], group["lr"]), strict=True):
                self.state[theta]["last"] = step
                theta.add_(step, alpha=group["sigma"])

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps theta as it is now, for `go_back`."""
        for theta in self._group["params"]:
            self.state[theta]["best"] = theta.detach().clone()

    def go_back(self) -> None:
        """The coming `step` sets theta to what was remembered last and forgets all estimates, those in `.grad` too."""
        self._group["going_back"] = True

    def last_step(self) -> list[torch.Tensor] | None:
        """The last step of every parameter in units of sigma; `None` before the first one."""
        steps = [self.state[theta].get("last") for theta in self._group["params"]]
        return None if any(step is None for step in steps) else steps
