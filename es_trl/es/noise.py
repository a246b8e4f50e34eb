"""The perturbations: low-rank Gaussian factors of every adapter matrix, a pure function of (seed, step, direction)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .keys import make_generator


THREADS_FROM = 2**20  # numbers: fewer are drawn sooner than threads start
HELD = 2**26  # numbers, 256 MiB: more are drawn again by every use


@dataclass
class Factors:
    """
    Low-rank factors of `D` perturbations of one `m x n` matrix: `E_d = U[d] V[d]^T / sqrt(r)`.

    Attributes:
        U (`torch.Tensor`): `(D, m, r)`, entries iid N(0, 1).
        V (`torch.Tensor`): `(D, n, r)`, entries iid N(0, 1).
    """

    U: torch.Tensor
    V: torch.Tensor

    @property
    def rank(self) -> int:
        """The noise rank r."""
        return self.U.shape[-1]

    def select(self, directions: torch.Tensor) -> "Factors":
        """The factors of some directions: `(D',)` indices in [0, D), which may repeat."""
        return Factors(self.U[directions], self.V[directions])

    def to(self, device: torch.device | str) -> "Factors":
        """The same factors on `device`."""
        return Factors(self.U.to(device), self.V.to(device))

    def dense(self) -> torch.Tensor:
        """`(D, m, n)`: the perturbations written out; their entries have mean 0 and variance 1."""
        return self.U @ self.V.transpose(-1, -2) / self.rank**0.5


class Perturbations(dict[str, Factors]):
    """
    The factors of `D` perturbations of every matrix, by name: views of one tensor `flat (D, size)`, so that a choice
    of them is one operation and one copy to a device, however many matrices there are.
    """

    def __init__(self, flat: torch.Tensor, shapes: Mapping[str, tuple[int, int]], rank: int):
        self.flat, self.shapes, self.rank = flat, shapes, rank
        parts = iter(flat.split([side * rank for sides in shapes.values() for side in sides], dim=1))
        views = (next(parts).unflatten(1, (side, rank)) for sides in shapes.values() for side in sides)
        super().__init__((name, Factors(next(views), next(views))) for name in shapes)

    def select(self, directions: torch.Tensor, device: torch.device | str = "cpu") -> "Perturbations":
        """Some of the directions, `(D',)` indices in [0, D) which may repeat, on `device`."""
        return Perturbations(self.flat[directions].to(device), self.shapes, self.rank)

    def scaled(self, factor: float) -> "Perturbations":
        """Every `E_d` times `factor`, which is at least 0."""
        return Perturbations(self.flat * factor**0.5, self.shapes, self.rank)


class NoiseBank:
    """
    Draws the perturbations of a step (EGGROLL, arXiv 2511.16652, section 4: `E = U V^T / sqrt(r)`).

    A *direction* is what one key names: an antithetic pair of members, or one member when members are independent.

    Args:
        seed (`int`): Seed of the run.
        shapes (`Mapping[str, tuple[int, int]]`): `(m, n)` of every adapter matrix; the order is part of the key.
        rank (`int`, *optional*, defaults to `1`): Noise rank `r`.
        reuse (`int`, *optional*, defaults to `1`): Number of consecutive steps that share one draw.
    """

    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, int]], rank: int = 1, reuse: int = 1):
        if rank < 1:
            raise ValueError(f"noise_rank must be at least 1, got {rank}.")
        if reuse < 1:
            raise ValueError(f"noise_reuse must be at least 1 (1 draws fresh noise every step), got {reuse}.")
        self.seed, self.shapes, self.rank, self.reuse = seed, dict(shapes), rank, reuse
        self.size = sum((m + n) * rank for m, n in self.shapes.values())

    def draw(
        self,
        step: int,
        directions: Sequence[int],
        micro: int = 0,
        device: torch.device | str = "cpu",
        tag: str = "noise",
    ) -> Perturbations:
        """
        The factors of some directions of a step.

        Args:
            step (`int`): Update step, from 0.
            directions (`Sequence[int]`): Which directions, in the order of the returned first dimension.
            micro (`int`, *optional*, defaults to `0`): Index of the prompt batch under gradient accumulation.
            tag (`str`, *optional*, defaults to `"noise"`): Part of the key: what the numbers are for.

        Returns:
            `Perturbations`: one entry per matrix, fp32.
        """
        flat = torch.empty(len(directions), self.size)

        def fill(row: torch.Tensor, direction: int) -> None:
            torch.randn(
                self.size, generator=make_generator(self.seed, tag, step // self.reuse, micro, direction), out=row
            )

        threads = torch.get_num_threads() if flat.numel() > THREADS_FROM else 1
        with ThreadPoolExecutor(threads) as pool:  # every direction has a generator of its own
            list((pool.map if threads > 1 else map)(fill, flat, directions))
        return Perturbations(flat.to(device), self.shapes, self.rank)

    def of_step(self, step: int, directions: int, micro: int = 0) -> "StepNoise":
        """All `directions` of a step's prompt batch."""
        return StepNoise(self, step, directions, micro)


class StepNoise:
    """
    The perturbations of all directions of one prompt batch, on the CPU. Up to 256 MiB are drawn once and held; beyond,
    which a large adapter on many members is, every use draws those that it needs, in blocks of that size: the same
    numbers, and a step never holds those of all members.

    Args:
        bank (`NoiseBank`): Draws them.
        step, micro (`int`): As in [`NoiseBank.draw`].
        directions (`int`): How many there are.
    """

    def __init__(self, bank: NoiseBank, step: int, directions: int, micro: int = 0):
        self.bank, self.step, self.directions, self.micro, self._factor = bank, step, directions, micro, 1.0
        self._block = max(1, HELD // bank.size)
        self._held = self._drawn(range(directions)) if directions <= self._block else None

    def _drawn(self, directions: Sequence[int], device: torch.device | str = "cpu") -> Perturbations:
        drawn = self.bank.draw(self.step, directions, self.micro, device)
        return drawn if self._factor == 1 else drawn.scaled(self._factor)

    def select(self, directions: torch.Tensor, device: torch.device | str = "cpu") -> Perturbations:
        """As [`Perturbations.select`]."""
        held = self._held
        return self._drawn(directions.tolist(), device) if held is None else held.select(directions, device)

    def scaled(self, factor: float) -> "StepNoise":
        """Every `E_d` times `factor`, which is at least 0."""
        other = copy.copy(self)
        other._factor, other._held = self._factor * factor, self._held and self._held.scaled(factor)
        return other

    def blocks(self) -> Iterator[tuple[slice, Perturbations]]:
        """All directions in order, block by block, each with its place among them."""
        for start in range(0, self.directions, self._block):
            part = range(self.directions)[start : start + self._block]
            yield slice(part.start, part.stop), self._drawn(part) if self._held is None else self._held
