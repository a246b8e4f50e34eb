"""Numbers and sentences of the page: what was found, said so that no one needs to know the field."""

from collections.abc import Sequence
from typing import Any

from .. import formatting
from ..formatting import NBSP, typeset


_METHODS = {"es": "ES", "ddpo": "DDPO", "grpo": "GRPO", "pref_grpo": "Pref-GRPO", "dpo": "DPO"}
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight"}


def method(name: Any) -> str:
    """A method as one writes it; one of your own as its config says."""
    return _METHODS.get(str(name), str(name))


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
    """
    A row of `eval.json` in words.

    Args:
        row (`dict`): The row.
        alone (`bool`, *optional*, defaults to `True`): Whether there is one adapter, which is then just "trained".
    """
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
    for entry in evaluation.get("paired") or []:
        if (entry.get("row"), entry.get("against"), entry.get("reward")) == (row, against, reward):
            return entry
    return None


def main_rows(evaluation: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(trained, base): the first row with an adapter, and the base row with the fewest steps."""
    rows = evaluation.get("rows") or []
    plain = [row for row in rows if (row.get("best_of") or 1) == 1 and row.get("adapter_scale", 1.0) == 1.0]
    bases = sorted((row for row in plain if not row.get("adapter")), key=lambda row: row.get("num_inference_steps", 0))
    models = [row for row in plain if row.get("adapter")]
    return (models[0] if models else None, bases[0] if bases else None)


def gaps_of(evaluation: dict[str, Any], reward: str) -> list[dict[str, Any]]:
    """
    Gap closures of a reward, one per adapter.

    Returns:
        `list[dict]`: `row`, `value`, `low`, `high` (the ends may be `None`), `base_steps`, `target_steps`.
    """
    rows = evaluation.get("gap_closure_rows")
    if not rows:
        return []
    steps = {row["name"]: row.get("num_inference_steps") for row in evaluation["rows"]}
    entries = [entry for entry in evaluation.get("gap_closures") or [] if entry.get("reward") == reward]
    if not entries:
        low, high = (evaluation.get("gap_closure_ci") or {}).get(reward) or (None, None)
        value = (evaluation.get("gap_closure") or {}).get(reward)
        entries = [{"row": rows["model"], **rows, "value": value, "ci_low": low, "ci_high": high}]
    return [
        {
            "reward": reward,
            "row": entry["row"],
            "value": entry["value"],
            "low": entry.get("ci_low"),
            "high": entry.get("ci_high"),
            "base_steps": steps.get(entry["base"]),
            "target_steps": steps.get(entry["target"]),
        }
        for entry in entries
        if entry.get("value") is not None
    ]


def ordered_rewards(evaluation: dict[str, Any], trained: Sequence[str]) -> list[str]:
    """The rewards of an evaluation, held-out ones first: those are what a sceptic asks for."""
    rows = evaluation.get("rows") or []
    names = list(rows[0].get("rewards") or {}) if rows else []
    return sorted(names, key=lambda name: (name in trained, names.index(name)))


def title(gap: dict[str, Any] | None, paired: dict[str, Any] | None) -> str:
    """The result in a few words, never more than its interval allows."""
    if gap is not None and gap["low"] is not None and gap["high"] is not None:
        base, target = _count(gap["base_steps"]), _count(gap["target_steps"])
        verb = "now outscores" if gap["base_steps"] == 1 else "now outscore"
        noun = "step" if gap["base_steps"] == 1 else "steps"
        score = "scores" if gap["base_steps"] == 1 else "score"
        if gap["low"] > 1:
            return f"{base.capitalize()} {noun} {verb} {target}"
        if gap["low"] > 0 and gap["high"] >= 1:
            return f"{base.capitalize()} {noun} now {score} like {target}"
        if gap["low"] > 0:
            return f"{percent(gap['value'])} of the way from {base} {noun} to {target}"
        return "Training made the scores worse" if gap["high"] < 0 else "No clear gain"
    if paired is not None and paired.get("ci_low") is not None:
        if paired["ci_low"] > 0:
            return f"Better on {percent(paired['win_rate'])} of the prompts"
        return "Training made the scores worse" if paired["ci_high"] < 0 else "No clear gain"
    return "A run without an evaluation" if paired is None else "No clear gain"


def lede(
    reward: str, held_out: bool | None, gaps: Sequence[dict[str, Any]], paired: Sequence[dict[str, Any]]
) -> list[str]:
    """
    Two sentences under the title: who judged and how often it chose the trained model; by how much, and how sure.

    Args:
        reward (`str`): The judge.
        held_out (`bool`, *optional*): Whether training never saw it; `None` when nobody said.
        gaps (`Sequence[dict]`): Its gap closures, one per adapter.
        paired (`Sequence[dict]`): Its differences to the base, one per adapter.
    """
    judge = f"Judged by {reward}"
    if held_out is not None:
        judge += ", which training never saw" if held_out else ", the reward it was trained on"
    who = "the trained model scores" if len(paired) == 1 else f"each of the {len(paired)} trained models scores"
    wins = _range([entry["win_rate"] for entry in paired], percent)
    prompts = whole(paired[0]["prompts"])
    noise = "drawn from the same noise"
    sentences = [f"{judge}, {who} higher than the base model on {wins} of {prompts} prompts, {noise}."]
    if gaps:
        extra = gaps[0]["target_steps"] - gaps[0]["base_steps"]
        more = f"{_count(extra)} more step{'' if extra == 1 else 's'}"
        change = "gain" if min(gap["value"] for gap in gaps) >= 0 else "change"
        share = _range([gap["value"] for gap in gaps], percent)
        found = f"The {change} is {share} of what {more} would give the base model"
        if len(gaps) == 1 and gaps[0]["low"] is None:
            found += "; the gap is too small for an interval"
        elif len(gaps) == 1:
            found += f" (95{NBSP}% interval {interval(gaps[0]['low'], gaps[0]['high'], percent)})"
        sentences.append(found + ".")
    else:
        change = f"The mean score changes by {_range([entry['delta'] for entry in paired], signed)}"
        ends = interval(paired[0].get("ci_low"), paired[0].get("ci_high"), signed) if len(paired) == 1 else ""
        sentences.append(f"{change} (95{NBSP}% interval {ends})." if ends else f"{change}.")
    return sentences


def over_seeds(entry: dict[str, Any]) -> str:
    """What several training seeds of a method say together, from `methods` of `eval.json`."""
    ends = interval(entry.get("ci_low"), entry.get("ci_high"), signed)
    text = f"Over {_count(entry['runs'])} training seeds the mean gain is {signed(entry['delta'])}"
    return f"{text} (95{NBSP}% interval {ends}, over prompts and seeds)." if ends else f"{text}."


def _range(values: Sequence[float], show) -> str:
    shown = list(dict.fromkeys(show(value) for value in (min(values), max(values))))
    return " to ".join(shown)


def _count(value: int | None) -> str:
    return _COUNTS.get(value, str(value))
