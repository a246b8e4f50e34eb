"""Comparing pictures of one group: who meets whom, and the share of comparisons that each one wins."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations


PAIRINGS = ("neighbours", "all")


def members_of_groups(prompts: Sequence[str], groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Indices of the pictures that belong together: of one entry of `groups`, or of one prompt without it."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(prompts if groups is None else groups):
        found.setdefault(key, []).append(index)
    return list(found.values())


def pairs_within(group: Sequence[int], pairing: str) -> list[tuple[int, int]]:
    """
    The comparisons of one group of n pictures.

    `"neighbours"`: 1st with 2nd, 3rd with 4th, ..., n / 2 comparisons; of a population these are the two halves of
    each antithetic pair. An odd last one meets the first. `"all"`: everyone meets everyone, n (n - 1) / 2 comparisons.
    """
    check_pairing(pairing)
    if len(group) < 2:
        return []
    if pairing == "all":
        return list(combinations(group, 2))
    pairs = list(zip(group[0::2], group[1::2], strict=False))
    return pairs + ([(group[-1], group[0])] if len(group) % 2 else [])


def win_rates(count: int, results: Iterable[tuple[int, int, float]]) -> list[float | None]:
    """
    Results `(i, j, p)`, with p in [0, 1] the win of i over j (a tie is 0.5), to the mean win of each of `count`
    pictures; None for one that was never compared.
    """
    won, played = [0.0] * count, [0] * count
    for i, j, p in results:
        won[i] += p
        won[j] += 1 - p
        played[i] += 1
        played[j] += 1
    return [w / n if n else None for w, n in zip(won, played, strict=True)]


def check_pairing(pairing: str) -> None:
    """Raises `ValueError` for an unknown pairing."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, not {pairing!r}")
