"""Several rewards with their weights, called as one: prompts and images in, a score matrix out."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pictures import on_white
from .calling import FAILED, MAX_BACKOFF_SECONDS, AsyncRunner, RewardCall, function_name, gather_or_cancel
from .clip_features import ClipScorer, dtype_name, share_image_features
from .registry import NamedReward, parse_reward
from .results import as_scores, weighted_total


if TYPE_CHECKING:
    import torch
    from PIL import Image


RESERVED = ("prompts", "images", "groups", "step_prompts", "trainer_state", "log_extra", "log_metric")
GRACE_SECONDS = 5.0


class RewardSet:
    """
    The rewards of a run.

    A reward is a name (`es_trl.rewards.REWARD_NAMES`), another string that `parse_reward` understands, or any callable
    `f(prompts=[...], images=[PIL...], **columns) -> list[float | None]`, `def` or `async def`. It is given only the
    keywords it takes: `prompts`, `images`, `trainer_state`, `log_extra`, `log_metric` and the dataset's columns.
    Transparent pictures are put on white first. A function of your own gets copies and may do with them what it likes.

    Args:
        reward_funcs (`str`, `Callable` or a list of them): at least one reward.
        weights (`Sequence[float]`, *optional*): one per reward, used by `total`; all 1 by default.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where the named rewards run.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `float32`): in which the named rewards run.
        retries (`int`, *optional*, defaults to `0`): attempts after the first one when a reward raises.
        timeout (`float`, *optional*): seconds that one attempt may take; None is no limit.
        failure (`str`, *optional*, defaults to `"raise"`): `"invalid"` gives the images of a reward that failed no
            score (NaN), with a warning, instead of raising.

    Attributes:
        names (`list[str]`): unique; a second `pickscore` is `pickscore_2`.
        specs (`list[str]`): what was asked for: the strings, and the names of functions.
        weights (`np.ndarray`): float64, shape (K,).

    Raises:
        `ValueError`: an unknown name, a wrong number of weights, ... No model has been loaded by then.

    Example:
        ```python
        rewards = RewardSet(["tiny-pickscore", "jpeg_compressibility"], weights=[1.0, 0.1])
        scores = rewards(prompts=["a red cat"], images=[image])  # (1, 2)
        ```
    """

    def __init__(
        self,
        reward_funcs: str | Callable | Sequence[str | Callable],
        weights: Sequence[float] | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        retries: int = 0,
        timeout: float | None = None,
        failure: str = "raise",
    ):
        if isinstance(reward_funcs, str) or callable(reward_funcs):
            reward_funcs = [reward_funcs]
        if not isinstance(reward_funcs, Sequence) or not reward_funcs:
            raise ValueError(f"reward_funcs must be a name, a function or a list of them, not {reward_funcs!r}")
        if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
            raise ValueError(f"reward_retries must be an integer of at least 0, not {retries!r}")
        dtype_name(dtype)
        self.device, self.dtype = device, dtype
        self.retries, self.timeout, self.failure = retries, timeout, failure
        self.weights = _check_weights(weights, len(reward_funcs))
        self._given = list(reward_funcs)
        self._sources: list[Any] = [_parse(func) for func in reward_funcs]
        self.names = _unique([s.name if isinstance(s, NamedReward) else function_name(s) for s in self._sources])
        self.specs = [getattr(source, "spec", None) or function_name(source) for source in self._sources]
        self._calls: list[RewardCall] = []
        self._runner = AsyncRunner()
        self._first: RewardSet | None = None

    def with_more(self, reward_funcs: Sequence[str | Callable]) -> RewardSet:
        """
        A set that measures `reward_funcs` beside these rewards, whose models it shares; weights are all 1. Without any
        it is still a set of its own.
        """
        calls: dict[str, Any] = {"retries": self.retries, "timeout": self.timeout, "failure": self.failure}
        both = RewardSet([*self._given, *reward_funcs], None, self.device, self.dtype, **calls)
        both._first = self
        return both

    def __len__(self) -> int:
        return len(self.names)

    def load(self) -> RewardSet:
        """Load the models of the named rewards now rather than at the first call. Returns itself."""
        if not self._calls:
            funcs = self._first.functions() if self._first is not None else []
            others = self._sources[len(funcs) :]
            funcs += [s.build(self.device, self.dtype) if isinstance(s, NamedReward) else s for s in others]
            self._calls = [
                RewardCall(name, func, self.retries, self.timeout, self.failure)
                for name, func in zip(self.names, funcs, strict=True)
            ]
        return self

    def functions(self) -> list[Callable]:
        """The callables, in the order of `names`; loads their models."""
        return [call.func for call in self.load()._calls]

    @property
    def rising(self) -> list[str]:
        """
        Names of the rewards that more sampling steps should improve, by their attribute `rises_with_steps`; a function
        of one's own may set it. Loads the rewards.
        """
        pairs = zip(self.names, self.functions(), strict=True)
        return [name for name, func in pairs if getattr(func, "rises_with_steps", False)]

    def scorers(self) -> dict[str, ClipScorer]:
        """The CLIP models behind those rewards that are built on one, by the reward's name; loads them."""
        found = {name: getattr(func, "scorer", None) for name, func in zip(self.names, self.functions(), strict=True)}
        return {name: scorer for name, scorer in found.items() if isinstance(scorer, ClipScorer)}

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Image.Image], columns: Mapping[str, Sequence] | None = None,
        **more: Any,
    ) -> np.ndarray:  # fmt: skip
        """
        Scores B images; takes what [`submit`] takes.

        Returns:
            `np.ndarray`: float64, shape (B, K). A None is NaN; NaN and infinities are passed through. Pictures that
            are marked as having no score (`es_trl.samples`) are shown to no reward and are NaN.

        Raises:
            `ValueError`: a reward returned something else than one number or None per image.
            `RuntimeError`: a reward raised (chained, after `retries`).
        """
        return self.submit(prompts, images, columns, **more).result()

    def submit(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        columns: Mapping[str, Sequence] | None = None,
        trainer_state: Any = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        where: str = "",
        groups: Sequence[Hashable] | None = None,
        step_prompts: Sequence[str] | None = None,
        only: Sequence[int] | None = None,
    ) -> PendingScores:
        """
        As a call, but without waiting for the `async` rewards: the plain ones are computed here and now, the others go
        on in their event loop while the caller does something else. `result()` of what is returned is the call's.

        Args:
            prompts (`list[str]`): B prompts.
            images (`list[PIL.Image.Image]`): B images.
            columns (`dict[str, list]`, *optional*): further columns of the dataset, B entries each.
            trainer_state (*optional*): passed on; a `transformers.TrainerState` during training.
            log_extra (`Callable`, *optional*): `log_extra(column, values)` adds a column to the sample table.
            log_metric (`Callable`, *optional*): `log_metric(name, value)` adds a scalar to the logs.
            where (`str`, *optional*): the place in the run (`"step 12, member 3"`), for error messages.
            groups (`list`, *optional*): for rewards that compare images: equal entries belong together. By default
                images of one prompt do.
            step_prompts (`list[str]`, *optional*): all prompts of the step or evaluation that the images are a part
                of, for margins; by default those of the images.
            only (`list[int]`, *optional*): compute only these rewards; the others' columns are NaN.
        """
        from ..samples import why_unscored  # with PIL, which a config's check does not need

        kept = [i for i, image in enumerate(images) if why_unscored(image) is None]
        rows = _check_columns(columns or {}, len(prompts), len(images))
        rows |= {"prompts": list(prompts), "images": [on_white(image) for image in images]}
        if groups is not None and len(groups) != len(images):
            raise ValueError(f"there are {len(groups)} entries of groups for {len(images)} images")
        scores = np.full((len(kept), len(self)), np.nan)
        pending = PendingScores(scores, where, self, kept, len(images))
        if len(kept) < len(images):
            rows = {name: [values[i] for i in kept] for name, values in rows.items()}
            groups = None if groups is None else [groups[i] for i in kept]
        chosen = range(len(self)) if only is None else only
        if not kept or not chosen:
            return pending
        available = rows | {
            "step_prompts": list(prompts if step_prompts is None else step_prompts),
            "trainer_state": trainer_state,
            "log_extra": _writable(log_extra) if log_extra else _ignore,
            "log_metric": log_metric or _ignore,
        }
        calls = self.load()._calls
        keywords = {k: calls[k].keywords(available, groups) for k in chosen}
        # The async rewards wait for their servers while the plain ones compute here.
        waiting = [k for k in chosen if calls[k].is_async]
        if waiting:
            coroutines = [calls[k].run_async(keywords[k], where) for k in waiting]
            pending.names = {k: calls[k].name for k in waiting}
            pending.future = self._runner.submit(gather_or_cancel(coroutines))
        try:
            with share_image_features():
                for k in chosen:
                    if not calls[k].is_async:
                        result = calls[k].run(keywords[k], where, self._runner.wait)
                        if result is not FAILED:
                            scores[:, k] = as_scores(result, len(kept), calls[k].name, where)
        except BaseException:
            pending.cancel()
            raise
        return pending

    @property
    def group_rewards(self) -> list[int]:
        """Indices of the rewards that compare the images of a group, so must see it whole. Loads the rewards."""
        return [k for k, call in enumerate(self.load()._calls) if call.is_groupwise]

    @property
    def asking_nobody(self) -> list[int]:
        """
        Indices of the rewards that no person answers (attribute `asks_people`). An evaluation has no two models side
        by side, so that votes in it would say nothing. Loads the rewards.
        """
        return [k for k, func in enumerate(self.functions()) if not getattr(func, "asks_people", False)]

    def total(self, scores: np.ndarray) -> np.ndarray:
        """
        The weighted sum of the rewards, (..., G, K) -> (..., G), for groups of G pictures of one prompt. A reward that
        scored none of the G does not apply to the prompt; one that missed some leaves those without a total (NaN).
        """
        return weighted_total(scores, self.weights)


@dataclass(eq=False)
class PendingScores:
    """Scores under way, from `RewardSet.submit`, of the images `kept` of `count`."""

    scores: np.ndarray
    where: str
    rewards: RewardSet  # its event loop ends with it
    kept: list[int]
    count: int
    future: Any = None
    names: dict[int, str] = field(default_factory=dict)  # of the rewards in `future`, by their columns

    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        return self.future is None or self.future.done()

    def result(self) -> np.ndarray:
        """Wait; then as `RewardSet.__call__`."""
        try:
            results = self._wait() if self.future else []
            for (k, name), result in zip(self.names.items(), results, strict=True):
                if result is not FAILED:
                    self.scores[:, k] = as_scores(result, len(self.scores), name, self.where)
        except BaseException:
            self.cancel()
            raise
        whole = np.full((self.count, self.scores.shape[1]), np.nan)
        whole[self.kept] = self.scores
        return whole

    def _wait(self) -> list:
        timeout, attempts = self.rewards.timeout, self.rewards.retries + 1
        if timeout is None:
            return self.future.result()
        # Each attempt ends itself in time, unless the function keeps the event loop from running.
        patience = GRACE_SECONDS + attempts * (timeout + MAX_BACKOFF_SECONDS)
        try:
            return self.future.result(patience)
        except FutureTimeoutError:
            if self.future.done():
                raise
            raise RuntimeError(
                f"reward functions {', '.join(self.names.values())} did not answer at {self.where} within "
                f"{patience:g} s and let nothing else run: an `async def` has to await what it waits for"
            ) from None

    def cancel(self) -> None:
        """Give up what is still under way."""
        if self.future:
            self.future.cancel()


def _ignore(name: str, value: Any) -> None:
    """Stands in for `log_extra` and `log_metric` where nothing is logged, so that a reward may always call them."""


def _writable(log_extra: Callable[[str, list], None]) -> Callable[[str, list], None]:
    """`log_extra` for texts that no file takes: half of a surrogate pair (a cut emoji) is shown as its escape."""

    def clean(value: Any) -> Any:
        return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value

    return lambda column, values: log_extra(clean(column), [clean(value) for value in values])


def _parse(func: str | Callable) -> NamedReward | Callable:
    if isinstance(func, str):
        return parse_reward(func)
    if isinstance(func, NamedReward) or (callable(func) and not isinstance(func, type)):
        return func
    raise ValueError(f"reward_funcs takes names and functions, not {func!r}")


def _unique(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        taken.append(next(candidate for candidate in candidates if candidate not in taken))
    return taken


def _check_weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    if weights is None:
        return np.ones(count)
    try:
        weights = list(weights)
    except TypeError:
        raise ValueError(f"reward_weights must be a list of one number per reward, not {weights!r}") from None
    if len(weights) != count:
        raise ValueError(f"reward_weights has {len(weights)} values, but there are {count} reward_funcs: {weights!r}")
    for value in weights:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"reward_weights must be finite numbers, not {value!r}")
    return np.array(weights, dtype=np.float64)


def _check_columns(columns: Mapping[str, Sequence], prompts: int, images: int) -> dict[str, Sequence]:
    if prompts != images:
        raise ValueError(f"there are {prompts} prompts for {images} images: give one prompt per image")
    for name, values in columns.items():
        if name in RESERVED:
            raise ValueError(f"dataset column {name!r} has the name of a reward argument: rename the column")
        if len(values) != images:
            raise ValueError(f"dataset column {name!r} has {len(values)} values for {images} images")
    return {name: values for name, values in columns.items() if name != "prompt"}
