"""`eval.json` as Markdown tables: means, differences and metrics of the judge, all with their intervals."""

from collections.abc import Sequence
from typing import Any

from ..formatting import METRICS, interval, number, percent
from .escaping import md_escape


def wins(entry: dict[str, Any]) -> str:
    """How often the first of a pair is better; where there are too few prompts for an interval, a count."""
    if entry["win_rate"] is None or entry["ci_low"] is not None:
        return percent(entry["win_rate"]) + interval(entry["win_rate_ci_low"], entry["win_rate_ci_high"], percent)
    return f"{entry['win_rate'] * entry['prompts']:g} of {entry['prompts']}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """A Markdown table of finished cells; columns from number `right` on are aligned to the right."""
    rule = ["---"] * right + ["---:"] * (len(header) - right)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def scores_table(evaluation: dict[str, Any], trained: Sequence[str] = ()) -> str:
    """Mean of every row under every reward. Rewards in `trained` are marked so, the others as held out."""
    rewards = list(evaluation["rows"][0]["rewards"])
    kind = {reward: "trained" if reward in trained else "held out" for reward in rewards} if trained else {}
    header = ["model", "steps"]
    header += [md_escape(reward) + (f" ({kind[reward]})" if kind else "") for reward in rewards]
    rows = []
    for row in evaluation["rows"]:
        found = [row["rewards"][reward] for reward in rewards]
        cells = [number(one["mean"]) + interval(one["ci_low"], one["ci_high"]) for one in found]
        rows.append([md_escape(row["name"]), str(row["num_inference_steps"]), *cells])
    return table(header, rows)


def differences_table(evaluation: dict[str, Any]) -> str:
    """Every paired difference with its interval and win rate."""
    rows = [
        [
            f"{md_escape(entry['row'])} against {md_escape(entry['against'])}",
            md_escape(entry["reward"]),
            number(entry["delta"], sign=True) + interval(entry["ci_low"], entry["ci_high"]),
            wins(entry),
        ]
        for entry in evaluation["paired"]
    ]
    return table(["comparison", "reward", "difference", "win rate"], rows, right=2)


def judge_table(evaluation: dict[str, Any]) -> str | None:
    """The judge's metrics of every row; `None` when there was no judge."""
    rows = [row for row in evaluation["rows"] if "judge" in row]
    metrics = [metric for metric in METRICS if any(metric in row["judge"] for row in rows)]
    if not metrics:
        return None
    body = []
    for metric in metrics:
        show = percent if metric.endswith("accuracy") else number
        found = [row["judge"].get(metric, {"mean": None, "ci_low": None, "ci_high": None}) for row in rows]
        cells = [show(one["mean"]) + interval(one["ci_low"], one["ci_high"], show) for one in found]
        body.append([METRICS[metric], *cells])
    return table(["metric", *(md_escape(row["name"]) for row in rows)], body)
