"""Tables of the page: rows with their numbers, and where on a line each of them stands."""

from typing import Any

from ..formatting import DASH, METRICS
from . import wording
from .folder import Folder


def ruler(values: list[float], pad: float = 0.06):
    """A function that places a value (and its interval) between the ends of `values`, in per cent of the width."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width = (high - low) or 1.0
    low, width = low - pad * width, width * (1 + 2 * pad)

    def place(value: float | None, start: float | None = None, end: float | None = None) -> dict[str, float | None]:
        at = [None if v is None else round(100 * (v - low) / width, 2) for v in (value, start, end)]
        return dict(zip(("at", "start", "end"), at, strict=True))

    return place


def row_labels(evaluation: dict[str, Any]) -> dict[str, str]:
    """What the page calls each row."""
    rows = evaluation.get("rows") or []
    alone = len({row.get("label") or row["name"].split("@")[0] for row in rows if row.get("adapter")}) <= 1
    return {row["name"]: wording.row_label(row, alone) for row in rows}


def reward_tables(folder: Folder) -> list[dict[str, Any]]:
    """Per reward the rows with mean, interval, difference to the base, win rate, and where to draw them."""
    evaluation, trained = folder.evaluation, folder.trained
    _, base = wording.main_rows(evaluation)
    labels, tables = row_labels(evaluation), []
    for reward in wording.ordered_rewards(evaluation, trained):
        found = [(row, row["rewards"].get(reward) or {}) for row in evaluation["rows"]]
        keys = ("mean", "ci_low", "ci_high")
        place = ruler([entry[key] for _, entry in found for key in keys if entry.get(key) is not None])
        lines = []
        for row, entry in found:
            paired = wording.paired_entry(evaluation, row["name"], base["name"], reward) if base else None
            mean, low, high = (entry.get(key) for key in keys)
            lines.append({
                "label": labels[row["name"]], "adapter": bool(row.get("adapter")),
                "mean": mean, "low": low, "high": high,
                "paired": paired, "wins": _wins(paired),  # shown where there are too few prompts for an interval
                **place(mean, low, high),
            })  # fmt: skip
        tables.append({
            "reward": reward, "role": wording.role(evaluation, trained, reward), "lines": lines,
            "tested": any((line["paired"] or {}).get("holm_p") is not None for line in lines),
            "base": base and labels[base["name"]],
        })  # fmt: skip
    return tables


def _wins(paired: dict[str, Any] | None) -> str:
    if not paired or paired.get("win_rate") is None or not paired.get("prompts"):
        return DASH
    return f"{paired['win_rate'] * paired['prompts']:g} of {paired['prompts']}"


def method_lines(folder: Folder) -> list[dict[str, Any]]:
    """Methods with adapters from several training seeds, their difference to the base and to each other."""
    keys = ("method", "against", "reward", "runs", "delta", "ci_low", "ci_high", "run_std", "num_inference_steps")
    lines = [{key: entry.get(key) for key in keys} for entry in folder.evaluation.get("methods") or []]
    labels = row_labels(folder.evaluation)
    if all((line["runs"] or 0) < 2 for line in lines):
        return []  # of single runs the other tables say everything
    for line in lines:
        line["reference"] = labels.get(line["against"], line["against"])
        line["method"] = ", ".join(filter(None, (line["method"], wording.steps_of(line["num_inference_steps"]))))
    return sorted(lines, key=lambda line: line["reward"] in folder.trained)


def judge_table(folder: Folder) -> dict[str, Any] | None:
    """The judge's metrics: a line per metric, a column per row of `eval.json`; with many rows the other way round."""
    rows = [row for row in folder.evaluation.get("rows") or [] if row.get("judge")]
    labels = row_labels(folder.evaluation)
    metrics = list(dict.fromkeys(name for row in rows for name in row["judge"]))
    if not metrics:
        return None

    def cell(row: dict[str, Any], metric: str) -> tuple[str, str]:
        entry = row["judge"].get(metric) or {}
        show = (lambda v: wording.percent(v, 1)) if metric.endswith("accuracy") else wording.number
        return show(entry.get("mean")), wording.interval(entry.get("ci_low"), entry.get("ci_high"), show)

    cells = [[cell(row, metric) for row in rows] for metric in metrics]
    names, columns = [METRICS.get(metric, metric) for metric in metrics], [labels[row["name"]] for row in rows]
    if len(rows) > 4:
        cells, names, columns = [list(line) for line in zip(*cells, strict=True)], columns, names
    corner = "metric" if len(rows) <= 4 else "model"
    return {"columns": columns, "lines": list(zip(names, cells, strict=True)), "corner": corner}


def category_bars(folder: Folder) -> list[dict[str, Any]]:
    """Per grouping (category, challenge) and reward the difference of the trained model to the base, with interval."""
    exploratory = folder.evaluation.get("exploratory") or {}
    model, base = wording.main_rows(folder.evaluation)
    if not exploratory or not model or not base:
        return []
    pair, groups = (model["name"], base["name"]), []
    entries = [e for e in exploratory.get("entries") or [] if (e.get("row"), e.get("against")) == pair]
    entries = [entry for entry in entries if entry.get("delta") is not None]
    for reward in wording.ordered_rewards(folder.evaluation, folder.trained):
        for by in dict.fromkeys(entry["by"] for entry in entries):
            mine = [entry for entry in entries if entry["by"] == by and entry["reward"] == reward]
            mine.sort(key=lambda entry: -entry["delta"])
            ends = [entry.get(key) for entry in mine for key in ("delta", "ci_low", "ci_high")]
            place = ruler([0.0, *(end for end in ends if end is not None)])
            lines = [{**e, **place(e["delta"], e.get("ci_low"), e.get("ci_high"))} for e in mine]
            if lines:
                groups.append({"by": by, "reward": reward, "lines": lines, "zero": place(0.0)["at"]})
    return groups


def image_table(folder: Folder, most: int = 12) -> dict[str, Any] | None:
    """The first rows of what the rewards said of the images of the last step that was logged; `None` without any."""
    frame = folder.said()
    if frame is None or frame.empty:
        return None
    columns = [name for name in frame.columns if name != "step"]
    shown = frame[columns].head(most).itertuples(index=False)
    rows = [[wording.number(value) if isinstance(value, float) else value for value in row] for row in shown]
    return {"step": int(frame["step"].iloc[0]), "columns": columns, "rows": rows, "all": len(frame)}
