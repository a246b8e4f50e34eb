"""What an evaluation is asked for, completed by what the adapters' runs say before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..data import check_max_prompts, load_prompts
from ..pipelines import CallSettings
from .adapters import AdapterSource
from .rows import EvaluationRow, build_rows, default_rows


if TYPE_CHECKING:
    from ..rewards import RewardSet


def read_prompts(
    prompts: Any, columns: Mapping[str, Sequence[Any]] | None, max_prompts: int | None
) -> tuple[list[str], dict[str, Sequence[Any]], str | None]:
    """The prompts, their columns, and where they come from; a list is taken as it is, anything else is loaded."""
    if isinstance(prompts, str | os.PathLike | Mapping) or hasattr(prompts, "column_names"):
        source = os.fspath(prompts) if isinstance(prompts, str | os.PathLike) else None
        dataset = load_prompts(prompts, max_prompts=max_prompts)
        if columns is None:
            columns = {name: list(dataset[name]) for name in dataset.column_names if name != "prompt"}
        return list(dataset["prompt"]), dict(columns), source
    check_max_prompts(max_prompts)
    prompts = list(prompts)[:max_prompts]
    return prompts, dict(columns or {}), None


def complete_settings(settings: CallSettings | None, sources: Sequence[AdapterSource]) -> CallSettings:
    """
    The settings of the call: what was given, then what the adapters were trained with.

    Raises:
        ValueError: the runs were trained with different values and none was given.
    """
    settings = settings or CallSettings()
    found = {}
    for field in fields(CallSettings):
        if field.name != "extra" and getattr(settings, field.name) is None:
            found[field.name] = run_value(sources, field.name)
    extra = settings.extra or run_value(sources, "pipeline_kwargs") or {}
    return replace(settings, extra=extra, **found)


def run_value(sources: Sequence[AdapterSource], name: str) -> Any:
    """A setting of the runs that made the adapters (or their `base_model`); `None` when nobody wrote it down."""
    runs = {source.label: source.run for source in sources if source.run}
    values = {label: run.get(name, run.get("config", {}).get(name)) for label, run in runs.items()}
    if any(value != next(iter(values.values())) for value in values.values()):
        listed = ", ".join(f"{label} {value!r}" for label, value in values.items())
        raise ValueError(f"{name} is not given and the adapters were trained with different ones ({listed}): give it.")
    return next(iter(values.values()), None)


def choose_trained(
    trained: Sequence[str] | Mapping[str, float] | None,
    sources: Sequence[AdapterSource],
    rewards: RewardSet,
    best_of: Sequence[int],
) -> dict[str, float] | None:
    """
    The optimised rewards with their weights, as given or as the runs say; `None` when nobody says.

    Raises:
        ValueError: a best-of row without a reward to choose by.
    """
    if isinstance(trained, str):
        trained = [trained]
    if trained is not None:
        trained = dict(trained) if isinstance(trained, Mapping) else dict.fromkeys(trained, 1.0)
        unknown = [name for name in trained if name not in rewards.names]
        if unknown:
            raise ValueError(
                f"trained_rewards names {', '.join(unknown)}, but the rewards are {', '.join(rewards.names)}: name "
                "them as they are in the table."
            )
    else:
        known = [source.trained_rewards for source in sources if source.trained_rewards]
        if best_of and any(other != known[0] for other in known):
            raise ValueError(
                "the adapters were trained on different rewards: trained_rewards says what best_of picks by."
            )
        trained = {name: weight for one in known for name, weight in one.items()} if known else None
    if best_of:
        missing = [name for name in trained or {} if name not in rewards.names]
        if not trained or missing:
            what = f"{', '.join(missing)} is not among the rewards" if missing else "nobody says which one it is"
            raise ValueError(
                f"best_of picks by the trained reward, but {what}: give trained_rewards, all among rewards."
            )
    return trained


def make_rows(
    labels: Sequence[str] | None,
    first: int | None,
    steps: Sequence[int] | None,
    best_of: Sequence[int],
    scales: Sequence[float],
) -> list[EvaluationRow]:
    """The table of [`evaluate`]; `labels` is `None` for a model in training, whose adapter has none."""
    if labels is None and not (steps or best_of or scales):
        return default_rows(first)
    steps = list(dict.fromkeys(steps or ([first, 2 * first] if first else [1])))
    return build_rows(
        [None] if labels is None else labels, steps, list(dict.fromkeys(best_of)), list(dict.fromkeys(scales))
    )
