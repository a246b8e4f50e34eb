"""Judges that compare two images of one prompt, and the win rates they give a group."""

import inspect
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from PIL import Image

from ..rewards import RewardSet
from ..rewards.calling import AsyncRunner, function_name
from ..rewards.registry import parse_reward
from .advantages import mean_wins, win_rates


PairwiseJudge = Callable[..., Sequence[float | None]]


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

    Raises:
        `ValueError`: for a name that is not known; nothing is loaded by then.
    """

    def __init__(self, judge: str | Callable, temperature: float = 1.0, device="cpu"):
        self.temperature = temperature
        func = judge
        if isinstance(judge, str):
            found = parse_reward(judge)
            func = found.build(device, None) if ":" in judge and ".py" in judge else None
        self.pairwise: PairwiseJudge | None = func if func is not None and is_pairwise(func) else None
        self.scorer = None if self.pairwise else RewardSet(func or judge, device=device)
        self.name = judge if isinstance(judge, str) else function_name(judge)
        self._runner = AsyncRunner()

    def load(self) -> None:
        """Loads the scorer's model now."""
        if self.scorer is not None:
            self.scorer.load()

    def __call__(
        self, prompts: list[str], groups: list[list[Image.Image]], columns: dict[str, list] | None = None
    ) -> np.ndarray:
        """
        Args:
            prompts (`list[str]`): `P` prompts.
            groups (`list[list[PIL.Image.Image]]`): `P` groups of `G` images.
            columns (`dict[str, list]`, *optional*): The data set's other columns, `P` values each.

        Returns:
            `(P, G)`: the expected share of the other images of its group that an image beats; NaN without a verdict.

        Raises:
            `ValueError`: if the judge returns another number of verdicts, or one outside [0, 1].
        """
        columns, size = columns or {}, len(groups[0])
        if self.scorer is not None:
            repeated = {name: [v for v in values for _ in range(size)] for name, values in columns.items()}
            scores = self.scorer(
                [prompt for prompt in prompts for _ in range(size)], [i for group in groups for i in group], repeated
            )
            return win_rates(scores.reshape(len(prompts), size), self.temperature)
        # Both orders, because a judge may favour the first picture.
        pairs = [
            (p, a, b)
            for p in range(len(prompts))
            for i, j in combinations(range(size), 2)
            for a, b in ((i, j), (j, i))
        ]
        verdicts = self.pairwise(
            prompts=[prompts[p] for p, _, _ in pairs],
            images_a=[groups[p][a] for p, a, _ in pairs],
            images_b=[groups[p][b] for p, _, b in pairs],
            **{name: [values[p] for p, _, _ in pairs] for name, values in columns.items()},
        )
        if inspect.isawaitable(verdicts):
            verdicts = self._runner.wait(verdicts)
        preferences = np.full((len(prompts), size, size), np.nan)
        for (p, a, b), verdict in zip(pairs, self._checked(verdicts, len(pairs)), strict=True):
            preferences[p, a, b] = verdict
        return mean_wins((preferences + 1 - preferences.transpose(0, 2, 1)) / 2)

    def _checked(self, verdicts: Sequence[float | None], count: int) -> list[float]:
        verdicts = [0.5 if verdict is None else float(verdict) for verdict in verdicts]
        if len(verdicts) != count:
            raise ValueError(f"pairwise judge {self.name!r} returned {len(verdicts)} verdicts for {count} pairs.")
        odd = [verdict for verdict in verdicts if not 0 <= verdict <= 1]
        if odd:
            raise ValueError(
                f"pairwise judge {self.name!r} returned {odd[0]!r}: give the probability in [0, 1] that the first "
                "picture is the better one, or None."
            )
        return verdicts


def is_pairwise(func: Callable) -> bool:
    """Whether `func` takes two lists of images."""
    return {"images_a", "images_b"} <= set(inspect.signature(func).parameters)
