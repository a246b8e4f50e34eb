"""The numbers of the steps since the last log, as sums, so that a resumed run logs what an uninterrupted one does; and
those that every method logs."""

import math
import time
from typing import TypeAlias

import numpy as np
import torch

from ..pipelines.drawing import ODD
from .memory import peak_memory_gb


Sums = dict[str, tuple[float, int]]
Numbers: TypeAlias = np.ndarray | torch.Tensor


class Metrics:
    """Collects numbers between two logs: `sums` are the total and the number of the finite values of every metric."""

    def __init__(self):
        self.sums: Sums = {}

    def add(self, name: str, value: float) -> None:
        """Collects a number of this step; one that is not finite counts as none."""
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(value), count + 1) if math.isfinite(value) else (total, count)

    def take(self) -> dict[str, float | None]:
        """The means since the last call, None where there was no finite value; and begins anew."""
        means = {name: total / count if count else None for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def restore(self, sums: Sums) -> None:
        """Goes on from the sums of a checkpoint."""
        self.sums = dict(sums)


def log_pictures(trainer) -> None:
    """Counts this step's pictures, of all processes, that have no score or are black; nothing where there are none."""
    new = torch.tensor(trainer.adapter.drawer.new_pictures(), dtype=torch.float64)
    for kind, count in zip(ODD, trainer.peers.gather(new).sum(dim=0).tolist(), strict=True):
        if count:
            trainer.add_metric(f"pictures/{kind}", count)


def log_cost(trainer, started: float) -> float:
    """Logs and returns the seconds since `started` (`time.perf_counter()`); also images per second, and memory."""
    seconds = time.perf_counter() - started
    trainer.add_metric("step_time", seconds)
    trainer.add_metric("images_per_second", trainer.images_per_batch / seconds)
    trainer.add_metric("memory/peak_gb", peak_memory_gb(trainer.args.device))
    return seconds


def log_rewards(trainer, rewards: Numbers, scores: Numbers, zero_spread: Numbers) -> None:
    """
    The metrics that all methods share, under TRL's names: weighted rewards of any shape, of which those not finite are
    left out, scores `(..., K)` of the K reward functions, and the prompts on which all scored alike, `(P,)` bool.
    """
    mean, spread = _moments(torch.as_tensor(rewards))
    trainer.add_metric("reward", mean)
    trainer.add_metric("reward_std", spread)
    trainer.add_metric("frac_reward_zero_std", torch.as_tensor(zero_spread).double().mean())
    for k, name in enumerate(trainer.rewards.names):
        mean, spread = _moments(torch.as_tensor(scores)[..., k])
        trainer.add_metric(f"rewards/{name}/mean", mean)
        trainer.add_metric(f"rewards/{name}/std", spread)


def _moments(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the finite `values`; NaN if there are none."""
    values = values[torch.isfinite(values)]
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (math.nan, math.nan)
