"""Numbers and sentences of the page: what was found, said so that no one needs to know the field."""

from collections.abc import Sequence
from typing import Any

from .. import formatting
from ..formatting import NBSP, typeset


_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight"}


def method(config: dict[str, Any]) -> str:
    """The method of a run as one writes it, as the run's `es_config.json` says."""
    about = config.get("about")
    return str((about.get("label") if isinstance(about, dict) else None) or config.get("method"))


def number(value: float | None, sign: bool = False) -> str:
    """`value` with about four meaningful digits; a dash where there is none."""
    return typeset(formatting.number(value, sign))


def signed(value: float | None) -> str:
    """A number with its sign."""
    return number(value, sign=True)


def percent(value: float | None, decimals: int = 0) -> str:
    """A share in per cent."""
    return typeset(formatting.percent(value, decimals))


def interval(low: float | None, high: float | None, show=number) -> str:
    """`low to high`; empty when one of them does not exist."""
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def whole(value: float | None) -> str:
    """A count with separators."""
    return typeset(formatting.whole(value))


def duration(seconds: float | None) -> str:
    """Seconds in the unit one would say."""
    return typeset(formatting.duration(seconds))


def p_value(value: float | None) -> str:
    """A p value; small ones as a bound."""
    return typeset(formatting.p_value(value))


def steps_of(count: int | None) -> str:
    """`1 step`, `2 steps`."""
    return "" if count is None else f"{count} step{'' if count == 1 else 's'}"


def row_label(row: dict[str, Any], alone: bool = True) -> str:
    """A row of `eval.json` in words; `alone`: there is one adapter, which is then just "trained"."""
    name = row.get("label") or str(row.get("name", "")).split("@")[0]
    who = ("trained" if alone else name) if row.get("adapter") else "base"
    parts = [who, steps_of(row.get("num_inference_steps"))]
    if row.get("adapter") and row.get("adapter_scale", 1.0) != 1.0:
        parts.append(f"LoRA scale {row['adapter_scale']:g}")
    if (row.get("best_of") or 1) > 1:
        parts.append(f"best of {row['best_of']}")
    return ", ".join(part for part in parts if part)


def paired_entry(evaluation: dict[str, Any], row: str, against: str, reward: str) -> dict[str, Any] | None:
    """The paired difference of two rows under one reward."""
    wanted, entries = (row, against, reward), evaluation.get("paired") or []
    return next((e for e in entries if (e.get("row"), e.get("against"), e.get("reward")) == wanted), None)


def main_rows(evaluation: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(trained, base): the first row with an adapter, and the base row with the fewest steps."""
    bases = [row for row in _plain_rows(evaluation) if not row.get("adapter")]
    model = next((row for row in _plain_rows(evaluation) if row.get("adapter")), None)
    return model, min(bases, key=lambda row: row.get("num_inference_steps", 0), default=None)


def _plain_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are no best of several, and with an adapter as it was trained."""
    rows = evaluation.get("rows") or []
    return [row for row in rows if (row.get("best_of") or 1) == 1 and row.get("adapter_scale", 1.0) == 1.0]


def adapter_rows(evaluation: dict[str, Any]) -> list[str]:
    """Names of the adapters as trained that are compared with the base, those with as many steps as it has."""
    model, base = main_rows(evaluation)
    if model is None or base is None:
        return []
    steps, rows = base.get("num_inference_steps"), [row for row in _plain_rows(evaluation) if row.get("adapter")]
    return [row["name"] for row in rows if row.get("num_inference_steps") == steps] or [model["name"]]


def setting(value: Any) -> str:
    """The value of a setting on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join((", ".join(map(str, value)) if isinstance(value, list) else str(value)).split())


def weighted(weights: dict[str, float]) -> str:
    """`1 x pickscore + 0.5 x ocr`."""
    return " + ".join(f"{typeset(f'{weight:g}')} \u00d7 {name}" for name, weight in weights.items())


def gaps_of(evaluation: dict[str, Any], reward: str) -> list[dict[str, Any]]:
    """Gap closures of a reward, one per adapter; only where the gap is real, which is where they have an interval."""
    rows = evaluation.get("gap_closure_rows")
    if not rows:
        return []
    steps = {row["name"]: row.get("num_inference_steps") for row in evaluation["rows"]}
    entries = [entry for entry in evaluation.get("gap_closures") or [] if entry.get("reward") == reward]
    if not entries:
        low, high = (evaluation.get("gap_closure_ci") or {}).get(reward) or (None, None)
        value = (evaluation.get("gap_closure") or {}).get(reward)
        entries = [{"row": rows["model"], **rows, "value": value, "ci_low": low, "ci_high": high}]
    entries = [e for e in entries if None not in (e.get("value"), e.get("ci_low"), e.get("ci_high"))]
    return [
        {"reward": reward, "row": e["row"], "value": e["value"], "low": e["ci_low"], "high": e["ci_high"],
         "base_steps": steps.get(e["base"]), "target_steps": steps.get(e["target"])}
        for e in entries
    ]  # fmt: skip


def role(evaluation: dict[str, Any], trained: Sequence[str], reward: str | None) -> str | None:
    """`"trained"`, `"held out"`, or `"measured"` for what is no yardstick of quality; `None` when nobody said."""
    if not trained or reward is None:
        return None
    if reward in trained:
        return "trained"
    about = evaluation.get("rewards")
    entry = about.get(reward) if isinstance(about, dict) else None
    return "measured" if isinstance(entry, dict) and entry.get("rises_with_steps") is False else "held out"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def ordered_rewards(evaluation: dict[str, Any], trained: Sequence[str]) -> list[str]:
    """The rewards of an evaluation, held-out ones first: those are what a sceptic asks for."""
    rows = evaluation.get("rows") or []
    names = list(rows[0].get("rewards") or {}) if rows else []
    order = (None, "held out", "trained", "measured")
    return sorted(names, key=lambda name: (order.index(role(evaluation, trained, name)), names.index(name)))


def over_seeds(entry: dict[str, Any]) -> str:
    """What several training seeds of a method say together, from `methods` of `eval.json`."""
    ends = interval(entry.get("ci_low"), entry.get("ci_high"), signed)
    text = f"Over {count(entry['runs'])} training seeds the mean gain is {signed(entry['delta'])}"
    return f"{text} (95{NBSP}% interval {ends}, over prompts and seeds)." if ends else f"{text}."


def range_of(values: Sequence[float], show) -> str:
    """`smallest to largest`, or the one value that they share."""
    shown = list(dict.fromkeys(show(value) for value in (min(values), max(values))))
    return " to ".join(shown)


def count(value: int | None) -> str:
    """A small number as a word."""
    return str(value) if value is None else _COUNTS.get(value, str(value))
