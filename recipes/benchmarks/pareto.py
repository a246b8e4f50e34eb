"""Gain against nearness to real pictures: every run of head_to_head.py on the test prompts as one point.

A gain in the held-out score that costs nearness to real renderings (Frechet distance) may be a taste of scorers; what
is wanted lies to the right and below. Lines join the seeds' mean of one method and reward over its budgets.

    python recipes/benchmarks/pareto.py --output outputs/head_to_head --picture docs/images/pareto.png
"""

import argparse
from pathlib import Path

import numpy as np
from head_to_head_tables import HELD_OUT, STAGES, TRAINED, judged, read

from es_trl.report import svg
from es_trl.report.theme import Palette


METHODS = {
    "es": "ES",
    "grpo": "GRPO",
    "ddpo": "DDPO",
    "pref_grpo": "Pref-GRPO",
    "dpo": "DPO",
    "seed_rule": "plain EGGROLL",
    "nft": "DiffusionNFT",
}
MARKS = {"untuned": "o", "budgets": "o", "images": "D", "seconds": "D", "objectives": "^", "opponents": "s"}
NAMES = {
    "o": "defaults",
    "D": "best of six trials",
    "^": "margin in the objective",
    "s": "others' rules at their defaults",
}


def points(output: Path) -> list[dict]:
    """Held-out gain and Frechet distance at one step of every run on a clean reward or its margin, with the base's."""
    found = []
    for row in read(output / "results.jsonl"):
        clean = row["reward"] == TRAINED or row["stage"] == "objectives"
        judge = judged(output / "runs" / row["name"])
        if row["stage"] not in STAGES or not clean or "adapter@1" not in judge:
            continue
        gain = row["table"]["adapter@1"][HELD_OUT] - row["table"]["base@1"][HELD_OUT]
        far, base = (judge[name]["frechet_distance"] for name in ("adapter@1", "base@1"))
        found.append(
            {
                **{k: row[k] for k in ("method", "stage", "budget_images", "seed")},
                "gain": gain,
                "far": far,
                "base": base,
            }
        )
    return found


def chart(found: list[dict]):
    """Draws the points of [`points`]."""

    def draw(palette: Palette):
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.subplots()
        for side in ("left", "bottom"):
            axes.spines[side].set_color(palette.line)
        axes.tick_params(colors=palette.muted, labelsize=9, length=0)
        axes.grid(color=palette.line, linewidth=0.8)
        axes.plot(0, found[0]["base"], marker="*", markersize=13, color=palette.base, linestyle="none")
        axes.annotate(
            "base", (0, found[0]["base"]), xytext=(8, 4), textcoords="offset points", color=palette.muted, fontsize=9
        )
        methods = [method for method in METHODS if any(point["method"] == method for point in found)]
        for method in methods:
            colour = palette.series[list(METHODS).index(method)]
            mine = [point for point in found if point["method"] == method]
            for point in mine:
                axes.plot(
                    point["gain"],
                    point["far"],
                    MARKS[point["stage"]],
                    color=colour,
                    markersize=5.5,
                    alpha=0.75,
                    markeredgewidth=0,
                )
            budgets = [point for point in mine if MARKS[point["stage"]] == "o"]
            sizes = sorted({point["budget_images"] for point in budgets})
            means = [
                np.mean([(p["gain"], p["far"]) for p in budgets if p["budget_images"] == n], axis=0) for n in sizes
            ]
            if len(sizes) > 1:
                axes.plot(*np.transpose(means), color=colour, linewidth=1.6)
                for n, (x, y) in zip(sizes, means, strict=True):
                    text = f"{n / 1024:g}k" if n >= 1024 else str(n)
                    axes.annotate(
                        text, (x, y), xytext=(5, -11), textcoords="offset points", color=colour, fontsize=8.5
                    )
        lines = [
            Line2D([], [], marker="o", linestyle="none", color=palette.series[list(METHODS).index(m)]) for m in methods
        ]
        used = [mark for mark in NAMES if any(MARKS[point["stage"]] == mark for point in found)]
        lines += [Line2D([], [], marker=mark, linestyle="none", color=palette.muted) for mark in used]
        names = [METHODS[method] for method in methods]
        names += [NAMES[mark] for mark in used]
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        axes.legend(lines, names, fontsize=8.5, labelcolor=palette.ink, **beside)
        axes.set_xlabel(f"gain in {HELD_OUT}, which no method trains, at one step", color=palette.muted, fontsize=9.5)
        axes.set_ylabel("Frechet distance to real renderings", color=palette.muted, fontsize=9.5)
        return figure

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/head_to_head"))
    parser.add_argument("--picture", type=Path, default=Path("outputs/pareto.png"))
    args = parser.parse_args()
    svg.save_png(chart(points(args.output)), args.picture)
    print(args.picture)


if __name__ == "__main__":
    main()
