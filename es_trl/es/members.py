"""Members of a population: which direction each one walks along, with which sign, and what it draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Population:
    """
    `size` members. Antithetic members come in pairs: member `2p` walks along `+E_p`, member `2p+1` along `-E_p`;
    independent members each have a direction of their own. Members of one group draw the same columns (prompts and
    latents) of a step and are compared with each other only.

    Args:
        size (`int`): Number of members N; even if antithetic, at least 2.
        antithetic (`bool`, *optional*, defaults to `True`): Whether members come in pairs.
        groups (`int`, *optional*, defaults to `1`): Number of groups G. Member i is in group `i // (N / G)`, which
            draws the g-th part of the columns.
    """

    size: int
    antithetic: bool = True
    groups: int = 1

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"population_size must be at least 2, got {self.size}.")
        if self.antithetic and self.size % 2:
            raise ValueError(
                f"population_size must be even because antithetic members come in pairs, got {self.size}; "
                f"use {self.size + 1}, or set antithetic=False."
            )
        least, unit = 2 * self.groups, self.groups * (2 if self.antithetic else 1)
        if self.size % unit or self.size < least:
            parts = "pairs" if self.antithetic else "members"
            raise ValueError(
                f"population_size must give each of the {self.groups} groups (prompts_per_step / prompts_per_member) "
                f"as many {parts}, at least 2 members; got {self.size}, use {max(least, self.size // unit * unit)}."
            )

    @property
    def num_directions(self) -> int:
        """Directions of a step: one per pair, or one per independent member."""
        return self.size // 2 if self.antithetic else self.size

    @property
    def group_size(self) -> int:
        """Members of one group."""
        return self.size // self.groups

    def columns(self, member: int, num_columns: int) -> range:
        """Which of a step's `num_columns` columns, a multiple of `groups`, `member` draws."""
        own = num_columns // self.groups
        first = member // self.group_size * own
        return range(first, first + own)

    def directions(self, members: Sequence[int]) -> list[int]:
        """Direction of each of `members`."""
        return [member // 2 for member in members] if self.antithetic else list(members)

    def signs(self, members: Sequence[int]) -> torch.Tensor:
        """`(len(members),)` fp32 of +1 and -1."""
        return torch.tensor([1.0 - 2.0 * (member % 2) if self.antithetic else 1.0 for member in members])

    def drop_incomplete(self, valid: torch.Tensor) -> torch.Tensor:
        """`(N,)` bool: a pair with an invalid half is dropped whole, never half of it."""
        if not self.antithetic:
            return valid.clone()
        return valid.view(-1, 2).all(dim=1).repeat_interleave(2)

    def chunks(self, members_per_forward: int) -> list[list[int]]:
        """The members in consecutive micro-batches; fixed by the config, not by the number of processes."""
        members = list(range(self.size))
        return [members[i : i + members_per_forward] for i in range(0, self.size, members_per_forward)]
