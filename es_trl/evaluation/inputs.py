"""What an evaluation is asked for, checked and completed before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..data import check_max_prompts, check_prompts, load_prompts, unstorable
from ..pipelines import CallSettings
from .adapters import AdapterSource
from .noise import Noise
from .rows import EvaluationRow, build_rows, default_rows


if TYPE_CHECKING:
    from ..rewards import RewardSet


def read_prompts(
    prompts, columns: Mapping[str, Sequence] | None, max_prompts: int | None
) -> tuple[list[str], dict[str, list], str | None]:
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
    labels = [None] if labels is None else labels
    return build_rows(labels, steps, list(dict.fromkeys(best_of)), list(dict.fromkeys(scales)))


def check_counts(**counts: tuple[int | None, int]) -> None:
    """Raises `ValueError` for a count below its least value; `None` is a default."""
    for name, (value, least) in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} is {value!r}; give {least} or more.")


def check(
    prompts: Sequence[str],
    rows: Sequence[EvaluationRow] | None,
    noise: Noise,
    batch_size: int,
    columns: Mapping[str, Sequence],
    steps: Sequence[int] | None,
    best_of: Sequence[int],
    scales: Sequence[float],
    save_images: int,
    labels: Sequence[str],
) -> None:
    """Raises `ValueError` for what cannot work, naming the field."""
    if not prompts:
        raise ValueError("there are no prompts to evaluate on; give at least one.")
    check_prompts(prompts, "the evaluation")
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise ValueError(f"column {name!r} has {len(values)} values for {len(prompts)} prompts; give one each.")
        for i, value in enumerate(values):
            reason = None if isinstance(value, int) else unstorable(value)
            if reason:
                raise ValueError(f"column {name!r}, row {i}, holds {reason}.")
    numbers = {"images_per_prompt": [noise.images_per_seed], "batch_size": [batch_size], "steps": steps or ()}
    for field, values in {**numbers, "best_of": best_of}.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} is {value}; give 1 or more.")
    if not noise.seeds or len(set(noise.seeds)) < len(noise.seeds):
        raise ValueError(f"seed is {list(noise.seeds)}; give at least one, and each once.")
    check_counts(save_images=(save_images, 0))
    for scale in scales:
        if not 0 <= scale <= 4:
            raise ValueError(f"adapter_scales holds {scale}; give scales in [0, 4], 1 being the adapter as trained.")
    if rows is not None:
        if steps or best_of or scales:
            raise ValueError("give either rows, or steps, best_of and adapter_scales to make them from.")
        names = [row.name for row in rows]
        if not rows or len(set(names)) < len(names):
            raise ValueError(f"rows are named {names}; give at least one row, and each its own name.")
        unknown = [row.label for row in rows if row.label is not None and row.label not in labels]
        if unknown:
            raise ValueError(f"rows ask for the adapters {unknown}; loaded are {list(labels)}.")
