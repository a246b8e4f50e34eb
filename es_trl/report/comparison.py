"""The page of several runs: curves against images and seconds, final results with intervals, pictures side by side."""

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..formatting import NBSP
from . import charts, curves, groups, pictures, text, wording
from .folder import read_folder
from .groups import Method
from .rendering import render
from .svg import inline_svg, save_png
from .tables import ruler


MAX_REWARDS = 4


def write_comparison(
    runs: Sequence[str | os.PathLike], output_dir: str | os.PathLike, labels: Sequence[str] | None = None
) -> Path:
    """
    Compares runs on one page, `index.html`, with `compare.md` and `*.png` for READMEs beside it.

    Runs that differ in nothing but their seed are one method, drawn with the interval over its seeds.

    Args:
        runs (`Sequence[str]`): Run folders, or output folders of `es-trl eval`.
        output_dir (`str`): Where the page goes; made if needed.
        labels (`Sequence[str]`, *optional*): What to call each run; runs of one label are one method.

    Returns:
        `Path`: The page.

    Raises:
        ValueError: No runs, a path that is no folder, a folder with neither a log nor an evaluation, or another number
            of labels than of runs.
    """
    if not runs:
        raise ValueError("there are no runs to compare; give at least one run folder.")
    folders = [read_folder(path) for path in runs]
    for folder in folders:
        if not folder.evaluation and not folder.history:
            raise ValueError(f"{str(folder.path)!r} holds neither an evaluation (eval.json) nor the log of a run.")
    methods = groups.group(folders, labels)
    target = Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    found = context(methods)
    for name, draw in found.pop("files").items():
        save_png(draw, target / name)
    write_text(target / "compare.md", text.comparison(found["head"], found["tables"]))
    words = ["es-trl", "compare", *map(str, runs), *(["--labels", *labels] if labels else [])]
    command = shlex.join([*words, "--output_dir", str(output_dir)])
    write_text(target / "index.html", render("compare.html.j2", **found, command=command))
    return target / "index.html"


def context(methods: Sequence[Method]) -> dict[str, Any]:
    """Everything the template shows."""
    trained = list(dict.fromkeys(name for method in methods for run in method.runs for name in run.trained))
    comparable = groups.same_protocol(methods)
    drawn = _curves(methods, trained)
    tables = _tables(methods, trained, comparable)
    legend = [(f"s{method.colour % 8}", _named(method)) for method in methods]
    svgs = [
        (name, inline_svg(draw, f"curve{i}", f"{name} of {len(methods)} methods against {charts.AXES[axis]}"))
        for i, (name, axis, draw) in enumerate(drawn)
    ]
    entries = [(_named(method), method.colour) for method in methods]
    sheet = charts.side_by_side([draw for *_, draw in drawn], 2, entries) if drawn else None
    places = [line["label"] for line in tables[0]["lines"]] if tables else []
    best_first = sorted(methods, key=lambda method: places.index(method.label) if places else 0)
    pairs, labels = _pairs(best_first, comparable)
    return {
        "title": "comparison",
        "methods": methods,
        "head": _headline(tables, methods, comparable),
        "legend": legend,
        "curves": svgs,
        "seeds": any(len(method.runs) > 1 for method in methods),
        "tables": tables,
        "comparable": comparable,
        "pairs": pairs,
        "leader": best_first[0].label,
        "row_labels": labels,
        "pair_rows": list(labels),
        "runs": [
            (method.label, run.name, run.settings.get("seed"), bool(run.evaluation), bool(run.history))
            for method in methods
            for run in method.runs
        ],
        "files": {"learning_curves.png": sheet} if sheet else {},
    }


def _named(method: Method) -> str:
    count = len(method.runs)
    return method.label if count == 1 else f"{method.label}, {count} seeds"


def _headline(tables: list[dict[str, Any]], methods: Sequence[Method], comparable: bool) -> dict[str, Any]:
    """Who is ahead under the first (held-out) reward, and of whom, as far as the intervals say so."""
    if not comparable:
        return {"title": "Several evaluations", "lede": "Each of these runs was measured in its own way."}
    lines = [line for line in tables[0]["lines"] if line["found"]] if tables else []
    if not lines:
        return {"title": "Learning curves side by side", "lede": "None of these runs has been evaluated yet."}
    first, found = lines[0], lines[0]["found"]
    ends = wording.interval(found["low"], found["high"], wording.signed)
    judged = f"Under {tables[0]['reward']}" + (", which training never saw" * (tables[0]["role"] == "held out"))
    lede = f"{judged}, {first['label']} changes the score by {wording.signed(found['delta'])}"
    lede += f" (95{NBSP}% interval {ends}, over {found['over']})" if ends else ""
    if len(lines) == 1:
        gains = found["low"] is not None and found["low"] > 0
        return {"title": f"{first['label']} outscores its base" if gains else "No clear gain", "lede": f"{lede}."}
    if min(line["runs"] for line in lines) < 2:
        rest = wording.listed([f"{line['label']} by {wording.signed(line['found']['delta'])}" for line in lines[1:]])
        end = "with a single run the interval says nothing about another training seed"
        return {"title": "Too few seeds to tell", "lede": f"{lede}, {rest}; {end}."}
    level, behind = _told_apart(lines, methods, tables[0]["reward"])
    if level:
        lede += f"; {wording.listed([name for name, _ in level])} cannot be told apart from it"
    if behind:
        lede += f"; behind it {'is' if len(behind) == 1 else 'are'} {wording.listed([text for _, text in behind])}"
    title = f"{first['label']} is ahead" if not level else "No clear winner"
    if level and behind:
        title = f"{wording.listed([name for name, _ in behind])} {'is' if len(behind) == 1 else 'are'} behind"
    return {"title": title, "lede": f"{lede}."}


def _told_apart(
    lines: Sequence[dict[str, Any]], methods: Sequence[Method], reward: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(label, label with its distance) of the methods that are level with the first, and of those behind it."""
    by_name = {method.label: method for method in methods}
    first = lines[0]
    level: list[tuple[str, str]] = []
    behind: list[tuple[str, str]] = []
    for line in lines[1:]:
        gap = groups.difference(by_name[first["label"]], by_name[line["label"]], reward)
        low, high = first["found"]["low"], line["found"]["high"]
        ahead = gap.low > 0 if gap is not None else None not in (low, high) and low > high
        ends = f" ({wording.interval(gap.low, gap.high)})" if gap is not None else ""
        by = wording.number(first["found"]["delta"] - line["found"]["delta"])
        (behind if ahead else level).append((line["label"], f"{line['label']} by {by}{ends}"))
    return level, behind


def _about(methods: Sequence[Method]) -> dict[str, Any]:
    """What the runs' evaluations say of the rewards."""
    found = [run.evaluation.get("rewards") or {} for method in methods for run in method.runs]
    return {"rewards": {name: entry for rewards in found for name, entry in rewards.items()}}


def _curves(methods: Sequence[Method], trained: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Per reward one chart against images and one against seconds."""
    import pandas

    learned = [(method, [curves.learning_curves(run.history) for run in method.runs]) for method in methods]
    learned = [(method, [frame for frame in frames if len(frame)]) for method, frames in learned]
    series = [charts.Series(method.label, frames, method.colour) for method, frames in learned if frames]
    if not series:
        return []
    every = pandas.concat([frame for one in series for frame in one.runs])
    drawn = []
    about = _about(methods)
    for name in curves.reward_names(every, trained)[:MAX_REWARDS]:
        mine = every[every["name"] == name]
        kind = curves.VALIDATION if (mine["kind"] == curves.VALIDATION).any() else curves.TRAINING
        if mine[mine["kind"] == kind]["step"].nunique() < 2:
            continue  # one point is no line
        note = wording.role(about, trained, name) or "a reward"
        if kind == curves.TRAINING:
            note += ", training batches"
        for axis in ("images", "seconds"):
            if mine[axis].notna().any():
                drawn.append((name, axis, charts.comparison_curve(series, name, kind, axis, note)))
    return drawn


def _tables(methods: Sequence[Method], trained: Sequence[str], comparable: bool) -> list[dict[str, Any]]:
    """Per reward a line per method, and lines for the base with more steps and best of N."""
    evaluated = [run for method in methods for run in method.runs if run.evaluation]
    if not evaluated:
        return []
    names = (name for run in evaluated for name in wording.ordered_rewards(run.evaluation, trained))
    roles = {name: wording.role(_about(methods), trained, name) for name in names}
    watched = {name for run in evaluated for name in run.watched}  # before what only the evaluation has measured
    tables = []
    order = (None, "held out", "trained", "measured")
    for reward in sorted(roles, key=lambda name: (order.index(roles[name]), name not in watched)):
        lines: list[dict[str, Any]] = []
        for method in methods:
            images, seconds = groups.budget(method)
            lines.append({
                "label": method.label, "colour": method.colour % 8, "runs": len(method.runs),
                "images": images, "seconds": seconds, "found": groups.result_of(method, reward, comparable),
            })  # fmt: skip
        lines.sort(key=lambda line: -line["found"]["delta"] if line["found"] else math.inf)  # the best first
        references = _references(evaluated[0].evaluation, reward) if comparable else []
        known = [line["found"] for line in [*lines, *references] if line["found"]]
        ends = [v for one in known for v in (one["delta"], one["low"], one["high"], *one["deltas"]) if v is not None]
        place = ruler([0.0, *ends])
        for line in [*lines, *references]:
            one = line["found"] or {}
            line |= place(one.get("delta"), one.get("low"), one.get("high"))
            deltas = one.get("deltas", [])
            line["seeds"] = [place(v)["at"] for v in deltas] if len(deltas) > 1 else []
        tables.append({"reward": reward, "role": roles[reward], "lines": lines, "references": references,
                       "zero": place(0.0)["at"]})  # fmt: skip
    # What every method was measured under comes first: only there can they be compared.
    tables.sort(key=lambda table: -sum(line["found"] is not None for line in table["lines"]))
    return tables


def _references(evaluation: dict[str, Any], reward: str) -> list[dict[str, Any]]:
    """Rows that cost no training: the base with more steps, and the best of N of its images."""
    _, base = wording.main_rows(evaluation)
    found = []
    for row in evaluation["rows"]:
        if row.get("adapter") or base is None or row["name"] == base["name"]:
            continue
        entry = wording.paired_entry(evaluation, row["name"], base["name"], reward)
        if entry is None or entry.get("delta") is None:
            continue
        result = {
            "mean": (row["rewards"].get(reward) or {}).get("mean"), "delta": entry["delta"],
            "low": entry.get("ci_low"), "high": entry.get("ci_high"), "deltas": [], "over": "prompts",
            "win_rate": entry.get("win_rate"),
        }  # fmt: skip
        found.append({"label": wording.row_label(row), "found": result})
    return found


def _pairs(methods: Sequence[Method], comparable: bool) -> tuple[list[pictures.Pair], dict[str, str]]:
    """Prompts whose pictures every method left, under the base and one run of each method."""
    if not comparable:
        return [], {}
    per_method = []
    for method in methods:
        run = next((run for run in method.runs if run.evaluation.get("pictures")), None)
        model, base = wording.main_rows(run.evaluation) if run else (None, None)
        if run and model and base:
            pairs = {(pair.prompt, pair.kind): pair for pair in pictures.pairs(run, limit=18)}
            per_method.append((method, model["name"], base["name"], pairs))
    if not per_method:
        return [], {}
    labels = {"base": "base"} | {f"m{method.colour}": method.label for method, *_ in per_method}
    shown: dict[str, pictures.Pair] = {}
    for _, _, base_row, pairs in per_method:
        for (prompt, kind), pair in pairs.items():
            if prompt not in shown and base_row in pair.images:
                images = {"base": pair.images[base_row]}
                shown[prompt] = pictures.Pair(prompt, kind, None, None, images, pair.width, pair.height)
    for method, model_row, _, pairs in per_method:
        for (prompt, _), pair in pairs.items():
            if prompt in shown and model_row in pair.images:
                shown[prompt].images[f"m{method.colour}"] = pair.images[model_row]
    complete = [pair for pair in shown.values() if len(pair.images) == len(labels)]
    return complete[:18], labels
