"""Which of two pictures is better, and what share of such comparisons a picture wins: the one home of win rates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pictures import on_white
from ..samples import why_unscored
from .calling import FAILED, AsyncRunner, RewardCall, function_name
from .registry import parse_reward
from .results import as_scores
from .reward_set import RewardSet


if TYPE_CHECKING:
    from PIL import Image


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


def share_won(count: int, results: Iterable[tuple[int, int, float | None]]) -> list[float | None]:
    """
    Results `(i, j, p)`, with p in [0, 1] the win of i over j (a tie is 0.5, None was not decided), to the mean win of
    each of `count` pictures; None for one that was never compared.
    """
    won, played = [0.0] * count, [0] * count
    for i, j, p in results:
        if p is None:
            continue
        won[i] += p
        won[j] += 1 - p
        played[i] += 1
        played[j] += 1
    return [w / n if n else None for w, n in zip(won, played, strict=True)]


def check_pairing(pairing: str) -> None:
    """Raises `ValueError` for an unknown pairing."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, not {pairing!r}")


def win_rates(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """
    Expected share of the other images of its group that an image beats, if `P(i beats j) = sigmoid((s_i - s_j) / T)`
    (Bradley-Terry; what a PickScore-like scorer is trained for).

    Args:
        logits (`np.ndarray`): `(P, G)` scores; NaN neither plays nor is played against.
        temperature (`float`): T above 0.
    """
    difference = (logits[:, :, None] - logits[:, None, :]) / temperature
    return mean_wins(0.5 * (1 + np.tanh(difference / 2)))  # a sigmoid that does not overflow


def mean_wins(preferences: np.ndarray) -> np.ndarray:
    """`(P, G, G)` probabilities that i beats j (the diagonal is not read) to `(P, G)` win rates over the others."""
    others = np.isfinite(preferences) & ~np.eye(preferences.shape[1], dtype=bool)
    games = others.sum(axis=2)
    wins = np.where(others, preferences, 0.0).sum(axis=2)
    return np.where(games > 0, wins / np.maximum(games, 1), np.nan)


class GroupJudge:
    """
    Win rates of the images of a group.

    Args:
        judge (`str` or `Callable`): A pairwise judge `f(prompts, images_a, images_b, **columns)`, which returns per
            pair the probability in [0, 1] that A is the better picture for the prompt, or None for a tie; a reward,
            whose scores are then taken as Bradley-Terry logits (`"tiny-pickscore"`, `"pickscore"`, any CLIP scorer or
            function); or `"file.py:function"` that is one of the two. Either may be `async def`.
        temperature (`float`): Divides the logits of a reward.
        device (`str`): Where a named scorer runs.
        retries (`int`), timeout (`float`), failure (`str`): As in [`~es_trl.rewards.RewardSet`]; a judge that failed
            with `"invalid"` gives no verdict on the groups it was asked about.

    Raises:
        `ValueError`: for a name that is not known; nothing is loaded by then.
    """

    def __init__(
        self,
        judge: str | Callable,
        temperature: float = 1.0,
        device="cpu",
        retries: int = 0,
        timeout: float | None = None,
        failure: str = "raise",
    ):
        self.temperature = temperature
        func: Any = judge
        if isinstance(judge, str):
            found = parse_reward(judge)
            func = found.build(device, None) if ":" in judge and ".py" in judge else None
        self.name = judge if isinstance(judge, str) else function_name(judge)
        limits: dict[str, Any] = {"retries": retries, "timeout": timeout, "failure": failure}
        asked_in_pairs = func is not None and is_pairwise(func)
        self.pairwise: Any = RewardCall(self.name, func, **limits) if asked_in_pairs else None
        self.scorer = None if asked_in_pairs else RewardSet(func or judge, device=device, **limits)
        self._runner = AsyncRunner()

    def load(self) -> None:
        """Loads the scorer's model now."""
        if self.scorer is not None:
            self.scorer.load()

    def __call__(
        self,
        prompts: list[str],
        groups: list[list[Image.Image]],
        columns: dict[str, list] | None = None,
        where: str = "",
        **context,
    ) -> np.ndarray:
        """
        Args:
            prompts (`list[str]`): `P` prompts.
            groups (`list[list[PIL.Image.Image]]`): `P` groups of `G` images.
            columns (`dict[str, list]`, *optional*): The data set's other columns, `P` values each.
            where (`str`, *optional*): The place in the run, for error messages.
            **context: What else a judge may ask for (`trainer_state`, `log_metric`, `log_extra`).

        Returns:
            `(P, G)`: the expected share of the other images of its group that an image beats; NaN without a verdict.

        Raises:
            `ValueError`: if the judge returns another number of verdicts, or one outside [0, 1].
            `RuntimeError`: if it raises or takes too long, after `retries`; names the place and the first prompt.
        """
        columns, size = columns or {}, len(groups[0])
        groups = [[on_white(image) for image in group] for group in groups]
        if self.scorer is not None:
            repeated: dict[str, Sequence] = {
                name: [v for v in values for _ in range(size)] for name, values in columns.items()
            }
            scores = self.scorer(
                [prompt for prompt in prompts for _ in range(size)],
                [image for group in groups for image in group],
                repeated,
                where=where,
                groups=[p for p in range(len(prompts)) for _ in range(size)],
                **context,
            )
            return win_rates(scores.reshape(len(prompts), size), self.temperature)
        # Both orders, because a judge may favour the first picture; a picture without a score is shown to nobody.
        shown = [[why_unscored(image) is None for image in group] for group in groups]
        pairs = [
            (p, a, b)
            for p in range(len(prompts))
            for i, j in combinations(range(size), 2)
            for a, b in ((i, j), (j, i))
            if shown[p][i] and shown[p][j]
        ]
        preferences = np.full((len(prompts), size, size), np.nan)
        if not pairs:
            return mean_wins(preferences)
        available = {
            **{name: [values[p] for p, _, _ in pairs] for name, values in columns.items()},
            "prompts": [prompts[p] for p, _, _ in pairs],
            "images_a": [groups[p][a] for p, a, _ in pairs],
            "images_b": [groups[p][b] for p, _, b in pairs],
            **context,
        }
        for (p, a, b), verdict in zip(pairs, self._verdicts(available, len(pairs), where), strict=True):
            preferences[p, a, b] = verdict
        return mean_wins((preferences + 1 - preferences.transpose(0, 2, 1)) / 2)

    def _verdicts(self, available: dict[str, Any], count: int, where: str) -> np.ndarray:
        """`(count,)` probabilities in [0, 1]; all NaN where the judge failed and that does not end the run."""
        keywords = self.pairwise.keywords(available)
        if self.pairwise.is_async:
            result = self._runner.wait(self.pairwise.run_async(keywords, where))
        else:
            result = self.pairwise.run(keywords, where, self._runner.wait)
        if result is FAILED:
            return np.full(count, np.nan)
        at = f" at {where}" if where else ""
        if hasattr(result, "__len__") and len(result) != count:
            raise ValueError(f"pairwise judge {self.name!r} returned {len(result)} verdicts for {count} pairs{at}.")
        if isinstance(result, list | tuple):
            result = [0.5 if verdict is None else verdict for verdict in result]
        verdicts = as_scores(result, count, self.name, where)
        odd = verdicts[~((verdicts >= 0) & (verdicts <= 1))]
        if len(odd):
            raise ValueError(
                f"pairwise judge {self.name!r} returned {odd[0]:g}{at}: give the probability in [0, 1] that the first "
                "picture is the better one, or None."
            )
        return verdicts


def is_pairwise(func: Callable) -> bool:
    """Whether `func` takes two lists of images."""
    return {"images_a", "images_b"} <= set(inspect.signature(func).parameters)
