"""Tables of head_to_head.py, as Markdown: differences to the base with intervals over training seeds and prompts."""

import json
import logging
from pathlib import Path
from statistics import median


logger = logging.getLogger("head_to_head")

TRAINED, HELD_OUT = "tiny-pickscore", "tiny-clip-heldout"
SCORERS = (
    TRAINED,
    "jpeg_compressibility",
    HELD_OUT,
)  # scored in every evaluation; a noisy reward is judged by TRAINED
STAGES = ("images", "seconds", "untuned", "budgets", "objectives", "opponents")
BASE = "base"
PER_PROMPT = "per_prompt.json"
CALLS = (4, 8, 16)  # reward calls per picture of what searches without training
JUDGED = ("retrieval_accuracy", "hard_negative_accuracy", "diversity")
SEARCHES = tuple(f"{way} {calls}" for way in ("best of", "noise search") for calls in CALLS)
TITLES = {
    "images": "Best trial, equal images",
    "seconds": "Best trial, equal seconds",
    "untuned": "Defaults",
    "budgets": "Defaults, other budgets",
    "objectives": "Best trial, other objectives",
    "opponents": "Rules of others at their defaults",
}


def read(results: Path) -> list[dict]:
    """The finished runs; a line that was cut off by a kill does not count."""
    rows = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("passing over a line of %s that is not whole", results)
    return rows


def cell(runs: list[dict], row: str, name: str, others: list[dict] | None = None, other_row: str = "base@1") -> str:
    """
    Difference of a row of `runs` to a row of `others` (by default to the base with one step), with its 95 % interval
    over training seeds and prompts.
    """
    from es_trl.evaluation import runs_difference

    models = [run["per_prompt"][row][name] for run in runs]
    references = [run["per_prompt"][other_row][name] for run in (runs[:1] if others is None else others)]
    found = runs_difference(models, references)
    if not found.low < found.high:  # too few prompts, or all differ alike: nothing to estimate a width from
        return f"{found.delta:+.3f}"
    return f"{found.delta:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def tables(output: Path) -> str:
    """Markdown: per stage and reward a table of methods, and the trials."""
    from es_trl.trainer import METHODS

    rows = read(output / "results.jsonl")
    order = list(dict.fromkeys([BASE, "tune", *STAGES, *METHODS, *(row["method"] for row in rows)]))
    rows.sort(key=lambda row: [order.index(row[k]) for k in ("stage", "method")])  # what was run again stands last
    for row in rows:
        folder = output / "runs" / row["name"]
        row["per_prompt"] = json.loads((folder / PER_PROMPT).read_text())
        row["judge"] = judged(folder)
    parts = []
    for stage, reward in dict.fromkeys((row["stage"], row["reward"]) for row in rows if row["stage"] in STAGES):
        runs = [row for row in rows if (row["stage"], row["reward"]) == (stage, reward)]
        searched = stage in ("images", "untuned")
        base = next((row for row in rows if searched and row["stage"] == BASE and row["reward"] == reward), None)
        parts += [f"### {TITLES[stage]}, trained on {reward}", "", method_table(runs, base, reward), ""]
        methods = {run["method"] for run in runs}
        if "es" in methods and len(methods) > 1:
            parts += [against_es(runs, reward), ""]
    trials = [row for row in rows if row["stage"] == "tune"]
    if trials:
        parts += ["### Trials", "", trial_table(trials), ""]
    return "\n".join(parts)


def judged(folder: Path) -> dict[str, dict[str, float]]:
    """What the judge said of each row of a run as a whole, its Frechet distance among it."""
    path = folder / "eval.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["name"]: {name: value["mean"] for name, value in row["judge"].items()} for row in rows}


def method_table(runs: list[dict], base: dict | None, reward: str) -> str:
    """One line per method and budget, over the seeds; the base with two steps, and what searches without training."""
    trained = reward if reward in SCORERS else TRAINED
    header = ["method", "seeds", "images", "CPU s", "training MB", f"{trained}, 1 step", f"{HELD_OUT}, 1 step",
              f"{trained}, 2 steps", f"{HELD_OUT}, 2 steps", *JUDGED, "Frechet by seed"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    budget = "budget_images" if runs[0]["stage"] == "budgets" else "method"
    for method, of in dict.fromkeys((run["method"], run[budget]) for run in runs):
        own = [run for run in runs if (run["method"], run[budget]) == (method, of)]
        numbers = [str(len(own)), f"{median(run['images'] for run in own):.0f}"]
        numbers += [f"{median(run[name] for run in own):.0f}" for name in ("cpu_seconds", "training_megabytes")]
        cells = [cell(own, f"adapter@{n}", name) for n in (1, 2) for name in (trained, HELD_OUT)]
        shown = [mean_of(own, "adapter@1", name) for name in JUDGED]
        lines.append("| " + " | ".join([method, *numbers, *cells, *shown, distances(own, "adapter@1")]) + " |")
    two = [cell(runs[:1], "base@2", name) for name in (trained, HELD_OUT)]
    shown = [mean_of(runs[:1], "base@1", name) for name in JUDGED]
    shown.append(distances(runs[:1], "base@1"))
    lines.append("| " + " | ".join(["base", "", "0", "0", "", "0", "0", *two, *shown]) + " |")
    for name in SEARCHES if base is not None else ():
        cells = [cell([base], name, scorer) for scorer in (trained, HELD_OUT)]
        shown = [mean_of([base], name, metric) for metric in JUDGED]
        lines.append("| " + " | ".join([f"base, {name}", "", "0", "0", "", *cells, "", "", *shown, ""]) + " |")
    return "\n".join(lines)


def against_es(runs: list[dict], reward: str) -> str:
    """One line per other method: how far ES is ahead of it."""
    trained = reward if reward in SCORERS else TRAINED
    header = ["ES minus", *(f"{name}, {n} step{'s' * (n > 1)}" for n in (1, 2) for name in (trained, HELD_OUT))]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    own = [run for run in runs if run["method"] == "es"]
    for method in dict.fromkeys(run["method"] for run in runs if run["method"] != "es"):
        others = [run for run in runs if run["method"] == method]
        rows = [(f"adapter@{n}", name) for n in (1, 2) for name in (trained, HELD_OUT)]
        cells = [cell(own, row, name, others, row) for row, name in rows]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def distances(runs: list[dict], row: str) -> str:
    """Frechet distances of a row, by seed."""
    values = [run["judge"].get(row, {}).get("frechet_distance") for run in runs]
    return ", ".join(f"{value:.2f}" for value in values if value is not None)


def mean_of(runs: list[dict], row: str, name: str) -> str:
    values = [run["table"][row][name] for run in runs if name in run["table"][row]]
    return f"{sum(values) / len(values):.3f}" if values else ""


def trial_table(trials: list[dict]) -> str:
    """Every trial on the validation prompts, so that the choice can be checked."""
    lines = ["| method | trial | settings | " + " | ".join(SCORERS) + " | CPU s |", "|---" * (len(SCORERS) + 4) + "|"]
    for row in sorted(trials, key=lambda row: (row["method"], row["trial"])):
        scores = " | ".join(cell([row], "adapter@1", name) for name in SCORERS)
        shown = ", ".join(f"{key} {value}" for key, value in row["tried"].items())
        lines.append(f"| {row['method']} | {row['trial']} | {shown} | {scores} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)
