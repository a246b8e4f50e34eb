"""What an ES run says about its own way, out of its log: slopes of all it scored, and which layers learn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .charts import SIZE, count_images, panel
from .theme import Palette


SLOPE, ERROR, ENERGY = "es/slope/", "es/slope_error/", "es/energy/"
TOTALS = {"reward": "the weighted reward", "margin": "the margin", "guard": "the guard's margin"}


@dataclass
class Way:
    """
    Attributes:
        slopes (`dict[str, np.ndarray]`): By name `(n, 4)`: step, images drawn, slope, its standard error.
        energy (`dict[str, float]`): Share of the signal by kind of layer, as last logged, where there is any; some
            may be below 0 by chance.
        signal (`tuple[float, float]`, *optional*): Share of the fitness variance that is signal, and its error.
        sigma, travel_left (`float`, *optional*): As last logged.
        turns (`list[tuple[float, float]]`): Steps and images at which the log first shows a turn of what is watched.
    """

    slopes: dict[str, np.ndarray] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    signal: tuple[float, float] | None = None
    sigma: float | None = None
    travel_left: float | None = None
    turns: list[tuple[float, float]] = field(default_factory=list)

    @property
    def watched(self) -> str | None:
        """`"guard"` or `"margin"`: what ends the run or makes it start again when it falls."""
        return next((name for name in ("guard", "margin") if name in self.slopes), None)


def read_way(history: Sequence[dict[str, Any]]) -> Way:
    """The way of a run from its log entries (`trainer_state.json`); empty for methods that have none."""
    rows: dict[str, dict[float, tuple]] = {}
    way, turned = Way(), 0.0
    for entry in history:
        step, images = entry["step"], _number(entry.get("num_images"))
        for key in entry:
            name = key.removeprefix(SLOPE)
            value, error = _number(entry.get(SLOPE + name)), _number(entry.get(ERROR + name))
            if key.startswith(SLOPE) and value is not None and error is not None:
                rows.setdefault(name, {})[step] = (step, np.nan if images is None else images, value, error)
        if any(key.startswith(ENERGY) for key in entry):
            kinds = {key.removeprefix(ENERGY): _number(entry[key]) or 0.0 for key in entry if key.startswith(ENERGY)}
            total = sum(kinds.values())
            signal, error = _number(entry.get("es/signal")), _number(entry.get("es/signal_error"))
            way.signal = None if signal is None or error is None else (signal, error)
            seen = way.signal is not None and way.signal[0] > 2 * way.signal[1]
            way.energy = {name: value / total for name, value in kinds.items()} if seen and total > 0 else {}
        way.sigma = _number(entry.get("es/sigma"), way.sigma)
        way.travel_left = _number(entry.get("es/travel_left"), way.travel_left)
        if (_number(entry.get("es/turns")) or 0) > turned:
            turned = entry["es/turns"]
            way.turns.append((step, np.nan if images is None else images))
    way.slopes = {name: np.array([found[step] for step in sorted(found)]) for name, found in rows.items()}
    return way


def facts(way: Way) -> list[tuple[str, str]]:
    """The way as terms and values, for the page."""
    found = []
    if way.sigma is not None:
        found.append(("sigma", f"{way.sigma:.3g}"))
    if way.signal is not None:
        value, error = way.signal
        seen = "" if value >= 2 * error else ": no signal found; more images or a larger output_change may show one"
        found.append(("signal in the fitness", f"{100 * value:.1f} % of its variance (error {100 * error:.1f}){seen}"))
    if way.travel_left is not None:
        found.append(("travel left", f"{way.travel_left:.3g}"))
    what = TOTALS.get(way.watched or "", "")
    return [*found, *(("turn", f"{what} had surely fallen by step {step:g}") for step, _ in way.turns)]


def slope_chart(way: Way, names: Sequence[str], title: str = "Slopes along the way", judged=None):
    """
    Draws the slopes `names` against images, with twice their standard error, and where the watched margin turned.
    `judged` is a held-out reward's name with `(n, 2)` images and values, drawn on an axis of its own, so that one sees
    what it did when the slopes turned.
    """

    def draw(palette: Palette, axes=None):
        figure, axes = panel(palette, title, "images drawn in training", axes)
        axes.axhline(0, color=palette.muted, linewidth=1)
        for k, name in enumerate(names):
            at, value, error = way.slopes[name][:, 1], way.slopes[name][:, 2], way.slopes[name][:, 3]
            colour = palette.series[k % len(palette.series)]
            label = TOTALS.get(name, name).replace("$", r"\$")
            axes.plot(at, value, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)
            axes.fill_between(at, value - 2 * error, value + 2 * error, color=colour, alpha=0.16, linewidth=0)
        for _, images in way.turns:
            axes.axvline(images, color=palette.ink, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylabel("deviations per unit of length", color=palette.muted, fontsize=9)
        count_images(axes)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}
        axes.legend(labelcolor=palette.ink, fontsize=8.5, **below)
        if judged is not None:
            name, points = judged
            other = axes.twinx()
            other.spines["right"].set_visible(False)
            other.tick_params(colors=palette.muted, labelsize=9, length=0)
            other.plot(points[:, 0], points[:, 1], color=palette.muted, linewidth=1.6, linestyle=(0, (1, 1)))
            other.set_ylabel(f"{name} (dotted)", color=palette.muted, fontsize=9)
        return figure

    return draw


def energy_chart(way: Way, title: str = "Which layers learn"):
    """Draws the share of the signal by kind of layer, the largest first; below 0 is chance."""

    def draw(palette: Palette, axes=None):
        from matplotlib.ticker import PercentFormatter

        kinds = sorted(way.energy, key=way.energy.__getitem__)[-12:]
        label, height = "share of the signal that the estimates have in common", max(1.6, 0.7 + 0.3 * len(kinds))
        figure, axes = panel(palette, title, label, axes, "x", (SIZE[0], height))
        axes.barh(range(len(kinds)), [way.energy[kind] for kind in kinds], color=palette.trained, height=0.66)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return figure

    return draw


def shown_slopes(way: Way, others: Sequence[str] = ()) -> list[str]:
    """The slopes that a chart shows: the weighted reward, what is watched, and what was scored for its slope only."""
    first = [name for name in ("reward", way.watched) if name in way.slopes]
    return [*first, *[name for name in others if name in way.slopes]][:5]


def _number(value: Any, otherwise: float | None = None) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else otherwise
