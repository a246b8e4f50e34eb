"""`report/index.html` of one folder: the headline, the curves, the tables, the pictures, the protocol."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from ..files import write_text
from . import charts, curves, pictures, slopes, wording
from .folder import Folder, read_folder
from .headline import headline
from .rendering import render
from .svg import inline_svg, save_png
from .tables import category_bars, image_table, judge_table, method_lines, reward_tables, row_labels


logger = logging.getLogger(__name__)

MAX_CHARTS = 6


def write_report(folder: str | os.PathLike) -> Path | None:
    """
    Writes `report/index.html`, one page without any outside resource, and `report/*.png` into a run folder or an
    output folder of `es-trl eval`. What is missing there is left out with a sentence.

    Args:
        folder (`str` or `PathLike`): What training or an evaluation wrote.

    Returns:
        `Path`: The page; `None` when it could not be written, which is logged: a report never ends a run.

    Raises:
        ValueError: `folder` is no folder.
    """
    found = read_folder(folder)
    try:
        return _write(found)
    except Exception:
        logger.warning("The report of %s could not be written; the run itself is complete.", folder, exc_info=True)
        return None


def part(make, otherwise):
    """What `make()` returns; `otherwise` when a file holds something of another shape, which is logged."""
    try:
        return make()
    except Exception as error:
        logger.warning("A part of the report is left out (%s: %s).", type(error).__name__, error)
        return otherwise


def _write(folder: Folder) -> Path:
    learned = part(lambda: curves.learning_curves(folder.history), curves.learning_curves([]))
    drawn = part(lambda: curve_charts(folder, learned), [])
    target = folder.path / "report"
    target.mkdir(parents=True, exist_ok=True)
    if drawn:
        part(lambda: save_png(charts.side_by_side([draw for _, draw in drawn]), target / "learning_curve.png"), None)
    if folder.evaluation:
        part(lambda: save_png(_interval_chart(folder), target / "rewards.png"), None)
    page = target / "index.html"
    write_text(page, render("run.html.j2", **context(folder, learned, drawn)))
    return page


def context(folder: Folder, learned, drawn) -> dict[str, Any]:
    """Everything the template shows, from a folder, its learning curves and their charts."""
    images, seconds = part(lambda: curves.spent(folder.history), (None, None))
    head = {"title": "A run without an evaluation", "lede": [], "gaps": []}
    found = {
        "title": folder.name,
        "folder": folder,
        "live": None,
        "head": part(lambda: headline(folder), head),
        "warned": [entry["step"] for entry in folder.history if entry.get("eval_early_warning") == 1.0],
        "facts": part(lambda: _facts(folder, images, seconds), []),
        "curves": part(lambda: _inline_curves(folder, learned, drawn), []),
        "curve_legend": _curve_legend(folder, learned),
        "way": part(lambda: _way(folder), None),
        "tables": part(lambda: reward_tables(folder), []),
        "judge": part(lambda: judge_table(folder), None),
        "said": part(lambda: image_table(folder), None),
        "methods": part(lambda: method_lines(folder), []),
        "pairs": part(lambda: pair_groups(folder), []),
        "row_labels": part(lambda: row_labels(folder.evaluation), {}),
        "strengths": part(lambda: pictures.strengths(folder), None),
        "sheets": part(lambda: pictures.sample_sheets(folder), []),
        "populations": part(lambda: pictures.populations(folder), []),
        "categories": part(lambda: category_bars(folder), []),
        "protocol": part(lambda: protocol(folder), []),
        "command": part(lambda: command(folder), None),
    }
    groups = found["pairs"]
    first = next((pair for group in groups for *_, members in group["kinds"] for pair in members), None)
    rows = list(first.images) if first else []
    found |= {
        "pair_rows": rows,
        "pair_left": rows[0] if rows else None,
        "pair_right": rows[1] if rows else None,
        "first_look": _first_look(groups),
        "pair_rewards": [(group["reward"], f"{group['reward']} ({group['role']})") for group in groups],
    }
    return found


def _facts(folder: Folder, images: float | None, seconds: float | None) -> list[tuple[str, str]]:
    """Short facts above the headline."""
    config, hardware = folder.config, folder.env.get("gpus") or []
    device = hardware[0] if hardware else f"{folder.env['cpu_cores']} CPU cores" if folder.env.get("cpu_cores") else ""
    if isinstance(device, dict):
        device = str(device.get("name", "GPU"))
    found = [
        ("model", config.get("base_model") or (folder.evaluation.get("protocol") or {}).get("model")),
        ("method", wording.method(config) if config.get("method") else None),
        ("trained on", _trained_on(folder)),
        ("images", wording.whole(images) if images else None),
        ("time", wording.duration(seconds) + (f" on {device}" if device else "") if seconds else None),
        ("seed", folder.settings.get("seed")),
    ]
    return [(name, str(value)) for name, value in found if value is not None]


def _trained_on(folder: Folder) -> str | None:
    """The optimised rewards, with their weights where there are several or one is not 1."""
    weights = folder.weights
    return wording.weighted(weights) if any(weight != 1 for weight in weights.values()) else ", ".join(weights) or None


def _starts(learned):
    """What was evaluated before the first step: the one level that is of the curve's own prompts."""
    return learned[(learned["kind"] == curves.VALIDATION) & (learned["step"] == 0)]


def _levels(folder: Folder, learned, reward: str) -> list[charts.Level]:
    starts = _starts(learned)
    if len(starts):
        return [charts.Level("start", v, None, None, False) for v in starts[starts["name"] == reward]["value"]]
    if not folder.evaluation:
        return []
    model, base = wording.main_rows(folder.evaluation)
    levels = []
    for row, final in ((base, False), (model, True)):
        found = (row or {}).get("rewards", {}).get(reward) or {}
        if found.get("mean") is not None:
            label = "trained" if final else "base"
            levels.append(charts.Level(label, found["mean"], found.get("ci_low"), found.get("ci_high"), final))
    return levels


def curve_charts(folder: Folder, learned) -> list[tuple[str, Any]]:
    """The learning curves to draw, by reward."""
    found = []
    for name in curves.reward_names(learned, folder.trained)[:MAX_CHARTS]:
        role = wording.role(folder.evaluation, folder.trained, name)
        found.append((name, charts.learning_curve(learned, name, role, _levels(folder, learned, name))))
    return found


def _way(folder: Folder) -> dict[str, Any] | None:
    """Slopes and layers of an ES run: charts as (name, SVG), and facts; `None` for other methods."""
    way = slopes.read_way(folder.history)
    drawn = []
    if names := slopes.shown_slopes(way, folder.settings.get("slope_reward_funcs") or ()):
        last = ", ".join(f"{name} {wording.number(float(way.slopes[name][-1, 2]), True)}" for name in names)
        label = f"Slopes along the way against images drawn; the last ones: {last}."
        drawn.append(("slopes", inline_svg(slopes.slope_chart(way, names), "slopes", label)))
    if way.energy:
        most = max(way.energy, key=way.energy.__getitem__)
        label = f"Share of the signal by kind of layer; {most} has most, {wording.percent(way.energy[most])}."
        drawn.append(("energy", inline_svg(slopes.energy_chart(way), "energy", label)))
    return {"charts": drawn, "facts": slopes.facts(way)} if drawn or way.signal else None


def _curve_legend(folder: Folder, learned) -> list[tuple[str, str]]:
    kinds, entries = set(learned["kind"]), []
    if curves.VALIDATION in kinds:
        entries.append(("solid", "evaluation prompts during training, the adapter alone"))
    if curves.TRAINING in kinds:
        entries.append(("faint", "training batches, as they come"))
    if len(_starts(learned)):
        entries.append(("dashed", "before the first step, on the same prompts"))
    elif folder.evaluation and len(learned):
        entries.append(("dashed", "base model on the test prompts, with its interval"))
        entries.append(("diamond", "trained model on the test prompts, with its interval"))
    return entries


def _inline_curves(folder: Folder, learned, drawn) -> list[tuple[str, str]]:
    labels = [_curve_label(folder, learned, name) for name, _ in drawn]
    return [(name, inline_svg(draw, f"curve{i}", labels[i])) for i, (name, draw) in enumerate(drawn)]


def _curve_label(folder: Folder, learned, name: str) -> str:
    mine = learned[learned["name"] == name]
    kind = curves.VALIDATION if (mine["kind"] == curves.VALIDATION).any() else curves.TRAINING
    values = mine[mine["kind"] == kind].sort_values("step")["value"].tolist()
    role = wording.role(folder.evaluation, folder.trained, name) or "a reward"
    return (
        f"{name}, {role}, against images drawn: from {wording.number(values[0])} "
        f"to {wording.number(values[-1])} over {len(values)} points."
    )


def _interval_chart(folder: Folder):
    rewards = wording.ordered_rewards(folder.evaluation, folder.trained)[:4]
    return charts.intervals(folder.evaluation, rewards, folder.trained, row_labels(folder.evaluation))


def pair_groups(folder: Folder) -> list[dict[str, Any]]:
    """The pairs by the reward they are sorted by: held-out rewards first, as in the tables."""
    found, groups = pictures.pairs(folder), []
    for reward in sorted(dict.fromkeys(pair.reward for pair in found), key=lambda reward: reward in folder.trained):
        kinds = []
        for kind in ("best", "typical", "worst"):
            if members := [pair for pair in found if (pair.reward, pair.kind) == (reward, kind)]:
                kinds.append((kind, _heading(kind, members), members))
        role = wording.role(folder.evaluation, folder.trained, reward)
        groups.append({"reward": reward, "role": role, "kinds": kinds})
    return groups


def _heading(kind: str, members: list[pictures.Pair]) -> str:
    """What the pairs of a kind are called; nothing is a loss that gained."""
    changes = [pair.change or 0.0 for pair in members]
    if kind == "best":
        return "Largest gains" if max(changes) > 0 else "Smallest losses"
    return "Typical" if kind == "typical" else "Largest losses" if min(changes) < 0 else "Smallest gains"


ONE = {"Largest gains": "largest gain", "Smallest losses": "smallest loss", "Typical": "typical",
       "Largest losses": "largest loss", "Smallest gains": "smallest gain"}  # fmt: skip


def _first_look(groups: list[dict[str, Any]]) -> list[tuple[str, pictures.Pair]]:
    """For the top of the page, by rule: the two ends and the middle of the first ranking."""
    found = {kind: members for group in groups[:1] for kind, _, members in group["kinds"]}
    chosen = [("best", 0), ("typical", len(found.get("typical", ())) // 2), ("worst", -1)]
    shown = [(kind, found[kind][place]) for kind, place in chosen if found.get(kind)]
    return [(ONE[_heading(kind, [pair])], pair) for kind, pair in shown]


def protocol(folder: Folder) -> list[tuple[str, str]]:
    """How it was measured and trained, as terms and values."""
    found = part(lambda: _measured(folder), []) + part(lambda: _trained(folder), [])
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _measured(folder: Folder) -> list[tuple[str, Any]]:
    entry = folder.evaluation.get("protocol") or {}
    if not entry:
        return []
    prompts = wording.whole(entry.get("prompts"))
    if entry.get("prompts_source"):
        prompts += f", from {entry['prompts_source']}"
    noise = f"one generator per image from (seed {entry.get('seed')}, prompt, image): the same for all models"
    resamples = f"{wording.percent(entry.get('confidence'))}, {wording.whole(entry.get('resamples'))} bootstrap "
    resamples += "resamples of the prompts"
    pipeline = {k: v for k, v in (entry.get("pipeline") or {}).items() if v is not None}
    return [
        ("test prompts", prompts),
        ("sha-256 of the prompts", str(entry.get("prompts_sha256", ""))[:16]),
        ("images per prompt", entry.get("images_per_prompt")),
        ("noise", noise),
        ("intervals", f"{resamples}, differences paired by {entry.get('unit', 'prompt')}"),
        ("missing scores", _missing(folder.evaluation)),
        ("judge", entry.get("judge")),
        ("pipeline", pipeline.pop("pipeline", None)),
        ("call and adapter", _listed(pipeline)),
    ]


def _trained(folder: Folder) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    settings = folder.settings
    if folder.config:
        rewards = folder.config.get("reward_funcs") or []
        found += [
            ("training prompts", wording.whole(folder.config.get("train_prompts"))),
            ("optimised", wording.weighted(folder.weights) if len(rewards) > 1 else ", ".join(map(str, rewards))),
            ("measured only", ", ".join(map(str, folder.config.get("eval_reward_funcs") or [])) or "nothing"),
        ]
        shown = ["max_steps", "population_size", "prompts_per_step", "output_change", "sigma", "travel"]
        shown += ["learning_rate", "lora_rank", "es_space"]
        found += [("settings", _listed({n: settings[n] for n in shown if settings.get(n) is not None}))]
    packages = folder.env.get("packages") or {}
    if folder.env:
        versions = [f"{name} {packages[name]}" for name in ("torch", "diffusers", "transformers") if name in packages]
        found += [("software", ", ".join([f"es_trl {folder.env.get('es_trl', '?')}", *versions]))]
        found += [("commit", folder.env.get("git_commit")), ("hardware", folder.env.get("cpu"))]
    return found


def _missing(evaluation: dict[str, Any]) -> str:
    """How many scores rewards did not give, which the means leave out."""
    counts: dict[str, int] = {}
    for row in evaluation["rows"]:
        for reward, found in row["rewards"].items():
            counts[reward] = counts.get(reward, 0) + (found.get("missing") or 0)
    return ", ".join(f"{count} of {reward}" for reward, count in counts.items() if count) or "none"


def command(folder: Folder) -> str | None:
    """The line that does it again, as far as the folder knows it."""
    if folder.file("rerun.yaml") is not None:
        return f"es-trl train --config {shlex.quote(str(folder.path / 'rerun.yaml'))}"
    return (folder.evaluation.get("protocol") or {}).get("command") or None


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {wording.setting(value)}" for name, value in settings.items())
