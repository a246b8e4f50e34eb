"""The numbers of the steps since the last log, as sums, so that a resumed run logs what an uninterrupted one does."""

import math


Sums = dict[str, tuple[float, int]]


class Metrics:
    """
    Collects numbers between two logs.

    Attributes:
        sums (`dict[str, tuple[float, int]]`): Total and number of the finite values of every metric.
    """

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
