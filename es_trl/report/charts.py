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


def learning_curve(curves, name: str, role: str | None, levels: Sequence[Level]):
    """
    Draws one reward of one run against images, from [`~es_trl.report.curves.learning_curves`], with the `levels` that
    the evaluation found. Like all charts a function of a palette, for [`inline_svg`] and [`save_png`].
    """

    def draw(palette: Palette, axes=None):
        figure, axes, _ = _curve_panel(palette, name, role or "", "images", curves, axes)
        colour = palette.trained if role == "trained" else palette.held_out
        mine = curves[curves["name"] == name].sort_values("step")
        batches, validation = (mine[mine["kind"] == kind] for kind in (TRAINING, VALIDATION))
        axes.plot(batches["images"], batches["value"], color=colour, alpha=0.4, linewidth=1.2)
        axes.plot(validation["images"], validation["value"], color=colour, linewidth=2.2, marker="o", markersize=4)
        end = float(np.nanmax(curves["images"]))
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
        figure, axes, scale = _curve_panel(palette, name, note, axis, every, axes)
        end = float(np.nanmax(every[axis]))
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
    Mean over two or more runs (curves of one reward) at the steps all of them logged.

    Returns:
        Position (the runs' mean on `axis`, `"images"` or `"seconds"`), mean, and half the width of the 95 % interval
        of the mean over runs (Student's t with runs - 1 degrees of freedom), each of shape (steps,).
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
    Draws the mean of every row of `eval.json` under every one of `rewards`, with its interval; `trained` names the
    optimised ones, `labels` says what the chart calls a row.
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
                low, high, own = found.get("ci_low"), found.get("ci_high"), colour if row["adapter"] else palette.base
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=own, linewidth=2)
                axes.plot(found["mean"], y, "o", color=own, markersize=6)
            kind = ("  (trained)" if reward in trained else "  (held out)") if trained else ""
            axes.set_title(_plain(reward) + kind, color=palette.ink, fontsize=10)
            axes.grid(axis="x", color=palette.line, linewidth=0.8)
        panels[0].set_yticks(range(len(rows)), [_plain(labels.get(row["name"], row["name"])) for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        return figure

    return draw


def side_by_side(draws: Sequence[Any], columns: int = 2, legend: Sequence[tuple[str, int]] = ()):
    """Several charts as one picture, for READMEs; `legend` has label and colour of every series of a comparison."""

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


def panel(palette: Palette, title: str, label: str, axes=None, grid: str = "y", size: tuple[float, float] = SIZE):
    """A figure and its axes in the page's style, `label` below; `axes` where the chart is a part of another figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained") if axes is None else axes.figure
    axes = figure.subplots() if axes is None else axes
    _style(axes, palette)
    axes.grid(axis=grid, color=palette.line, linewidth=0.8)
    axes.set_title(title, color=palette.ink, fontsize=10.5)
    axes.set_xlabel(label, color=palette.muted, fontsize=9)
    return figure, axes


def count_images(axes) -> None:
    """Thousands of images as `2k`."""
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")


def _curve_panel(palette: Palette, name: str, note: str, axis: str, curves, axes):
    """`panel` of one reward against `axis`, and what its values on the axis are divided by."""
    from matplotlib.ticker import MaxNLocator

    unit, scale = _time_unit(curves) if axis == "seconds" else ("", 1.0)
    title = _plain(name) + (f"  ({note})" if note else "")
    figure, axes = panel(palette, title, AXES[axis] + (f", {unit}" if unit else ""), axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if axis == "images":
        count_images(axes)
    return figure, axes, scale


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


def _time_unit(curves) -> tuple[str, float]:
    """The unit that the longest of the curves is told in, and its seconds."""
    longest = curves["seconds"].max()  # NaN where no log has times
    return ("hours", 3600.0) if longest >= 3 * 3600 else ("minutes", 60.0) if longest >= 180 else ("seconds", 1.0)


def _plain(text: str) -> str:
    """Names of users in a figure: one line, and no formula of matplotlib's."""
    line = " ".join(str(text).split())
    return (line if len(line) <= 40 else f"{line[:37]}...").replace("$", r"\$")
