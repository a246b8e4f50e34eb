"""The charts: learning curves of one run and of several, and rewards with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .curves import TRAINING, VALIDATION
from .theme import Palette


SIZE = (4.9, 3.1)  # inches; two of them stand beside each other on a desktop, one fills a phone
AXES = {"images": "images drawn in training", "seconds": "training time"}


@dataclass
class Level:
    """A mean over the test prompts with its interval: a line across the chart, or (`final`) a point at its end."""

    label: str
    mean: float
    low: float | None = None
    high: float | None = None
    final: bool = False


@dataclass
class Series:
    """One line of a comparison: the runs (training seeds) of one method under one reward, from [`learning_curves`]."""

    label: str
    runs: list[Any] = field(default_factory=list)
    colour: int = 0


def learning_curve(curves, name: str, role: str | None, levels: Sequence[Level] = (), axis: str = "images"):
    """
    Draws one reward of one run.

    Args:
        curves (`pandas.DataFrame`): From [`~es_trl.report.curves.learning_curves`].
        name (`str`), role (`str`, *optional*): The reward, and what it is, as [`~es_trl.report.wording.role`] says.
        levels (`Sequence[Level]`): What the evaluation after training found.
        axis (`str`, *optional*, defaults to `"images"`): Or `"seconds"`.

    Returns:
        `Callable[[Palette], Figure]`: For [`inline_svg`] and [`save_png`].
    """

    def draw(palette: Palette, axes=None):
        figure, axes = _panel(palette, name, role or "", axis, curves, axes)
        colour = palette.trained if role == "trained" else palette.held_out
        mine = curves[curves["name"] == name].sort_values("step")
        scale = _scale(axis, curves)
        batches, validation = (mine[mine["kind"] == kind] for kind in (TRAINING, VALIDATION))
        axes.plot(batches[axis] / scale, batches["value"], color=colour, alpha=0.4, linewidth=1.2)
        axes.plot(validation[axis] / scale, validation["value"], color=colour, linewidth=2.2, marker="o", markersize=4)
        end = float(np.nanmax(curves[axis])) / scale
        for level in levels:
            _level(axes, level, palette, colour, end)
        axes.set_xlim(left=0, right=end * 1.06 or None)
        return figure

    return draw


def comparison_curve(series: Sequence[Series], name: str, kind: str, axis: str, note: str):
    """
    Draws one reward of several methods: a thin line per run, and where a method has several runs their mean with the
    95 % interval of the mean over runs (Student's t).
    """

    def draw(palette: Palette, axes=None):
        import pandas

        every = pandas.concat([run for one in series for run in one.runs])
        figure, axes = _panel(palette, name, note, axis, every, axes)
        scale, end = _scale(axis, every), float(np.nanmax(every[axis]))
        for one in series:
            colour = palette.series[one.colour % len(palette.series)]
            runs = [run[(run["name"] == name) & (run["kind"] == kind)].sort_values("step") for run in one.runs]
            runs = [run for run in runs if len(run)]
            several = len(runs) > 1
            for run in runs:
                style = {"linewidth": 0.8, "alpha": 0.45} if several else {"linewidth": 2.2}
                marker = {} if several or len(run) > 30 else {"marker": "o", "markersize": 3.5}
                axes.plot(run[axis] / scale, run["value"], color=colour, **style, **marker)
            if several:
                at, mean, half = mean_curve(runs, axis)
                axes.plot(at / scale, mean, color=colour, linewidth=2.2)
                axes.fill_between(at / scale, mean - half, mean + half, color=colour, alpha=0.16, linewidth=0)
        axes.set_xlim(left=0, right=end / scale * 1.04 or None)
        return figure

    return draw


def mean_curve(runs: Sequence[Any], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Mean over runs at the steps all of them logged.

    Args:
        runs (`Sequence[pandas.DataFrame]`): Curves of one reward, at least two runs.
        axis (`str`): `"images"` or `"seconds"`; where runs differ (seconds do), their mean.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: Position, mean, and half the width of the 95 % interval of the
        mean over runs (Student's t with runs - 1 degrees of freedom), each of shape (steps,).
    """
    from scipy.stats import t

    common = sorted(set.intersection(*(set(run["step"]) for run in runs)))
    aligned = [run.drop_duplicates("step", keep="last").set_index("step").loc[common] for run in runs]
    values = np.stack([run["value"].to_numpy() for run in aligned])
    at = np.stack([run[axis].to_numpy() for run in aligned]).mean(axis=0)
    half = t.ppf(0.975, len(runs) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return at, values.mean(axis=0), half


def intervals(evaluation: dict[str, Any], rewards: Sequence[str], trained: Sequence[str], labels: dict[str, str]):
    """
    Draws the mean of every row under every reward, with its interval.

    Args:
        evaluation (`dict`): `eval.json`.
        rewards (`Sequence[str]`): Which rewards, one panel each.
        trained (`Sequence[str]`): Those that were optimised.
        labels (`dict[str, str]`): Row name to what the chart calls it.
    """

    def draw(palette: Palette):
        from matplotlib.figure import Figure

        rows = evaluation["rows"]
        figure = Figure(figsize=(1.6 + 3.2 * len(rewards), 0.75 + 0.32 * len(rows)), layout="constrained")
        panels: list[Any] = list(figure.subplots(1, len(rewards), sharey=True, squeeze=False)[0])
        for axes, reward in zip(panels, rewards, strict=True):
            _style(axes, palette)
            colour = palette.trained if reward in trained else palette.held_out
            for y, row in enumerate(rows):
                found = row["rewards"].get(reward) or {}
                if found.get("mean") is None:
                    continue
                low, high = found.get("ci_low"), found.get("ci_high")
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=colour if row["adapter"] else palette.base, linewidth=2)
                axes.plot(found["mean"], y, "o", color=colour if row["adapter"] else palette.base, markersize=6)
            kind = "trained" if reward in trained else "held out"
            axes.set_title(
                f"{_plain(reward)}  ({kind})" if trained else _plain(reward), color=palette.ink, fontsize=10
            )
            axes.grid(axis="x", color=palette.line, linewidth=0.8)
        panels[0].set_yticks(range(len(rows)), [_plain(labels.get(row["name"], row["name"])) for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        return figure

    return draw


def side_by_side(draws: Sequence[Any], columns: int = 2, legend: Sequence[tuple[str, int]] = ()):
    """
    Several of these charts as one picture, for READMEs.

    Args:
        draws (`Sequence[Callable]`): From [`learning_curve`] or [`comparison_curve`].
        columns (`int`, *optional*, defaults to 2): Charts beside each other.
        legend (`Sequence[tuple[str, int]]`): Label and colour of every series of a comparison.
    """

    def draw(palette: Palette):
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        width = min(columns, len(draws))
        height = -(-len(draws) // width)
        figure = Figure(figsize=(SIZE[0] * width, SIZE[1] * height + 0.3 * bool(legend)), layout="constrained")
        panels = figure.subplots(height, width, squeeze=False).ravel()
        for one, axes in zip(draws, panels, strict=False):
            one(palette, axes)
        for axes in panels[len(draws) :]:
            axes.set_axis_off()
        if legend:
            lines = [Line2D([], [], color=palette.series[i % len(palette.series)], linewidth=2.2) for _, i in legend]
            labels = [_plain(label) for label, _ in legend]
            figure.legend(lines, labels, loc="outside upper left", ncols=4, labelcolor=palette.ink, fontsize=10)
        return figure

    return draw


def _panel(palette: Palette, name: str, note: str, axis: str, curves, axes=None):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained") if axes is None else axes.figure
    axes = figure.subplots() if axes is None else axes
    _style(axes, palette)
    axes.grid(axis="y", color=palette.line, linewidth=0.8)
    axes.set_title(_plain(name) + (f"  ({note})" if note else ""), color=palette.ink, fontsize=10.5)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    label = AXES[axis] + (f", {_unit(curves)}" if axis == "seconds" else "")
    axes.set_xlabel(label, color=palette.muted, fontsize=9)
    if axis == "images":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
    return figure, axes


def _style(axes, palette: Palette) -> None:
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette.line)
    axes.tick_params(colors=palette.muted, labelsize=9, length=0)


def _level(axes, level: Level, palette: Palette, colour: str, end: float) -> None:
    known = level.low is not None and level.high is not None
    if level.final:
        if known:
            axes.plot([end, end], [level.low, level.high], color=colour, linewidth=2)
        axes.plot(end, level.mean, marker="D", color=colour, markersize=6, clip_on=False)
    else:
        if known:
            axes.axhspan(level.low, level.high, color=palette.base, alpha=0.12, linewidth=0)
        axes.axhline(level.mean, color=palette.base, linewidth=1.2, linestyle=(0, (4, 3)))


def _longest(curves) -> float:
    found = np.asarray(curves["seconds"], dtype=float)
    found = found[np.isfinite(found)]
    return float(found.max()) if len(found) else 0.0


def _scale(axis: str, curves) -> float:
    if axis == "images":
        return 1.0
    return {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}[_unit(curves)]


def _unit(curves) -> str:
    longest = _longest(curves)
    return "seconds" if longest < 180 else "minutes" if longest < 3 * 3600 else "hours"


def _plain(text: str) -> str:
    """Names of users in a figure: one line, and no formula of matplotlib's."""
    line = " ".join(str(text).split())
    return (line if len(line) <= 40 else f"{line[:37]}...").replace("$", r"\$")
