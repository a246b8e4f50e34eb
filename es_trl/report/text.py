"""The results of a page as plain text: Markdown whose columns are aligned, for READMEs and for the terminal alike."""

from collections.abc import Sequence
from typing import Any

from ..formatting import DASH, MINUS, NBSP, interval
from . import wording
from .folder import Folder
from .headline import headline
from .tables import reward_tables


def evaluation(folder: Folder) -> str:
    """The headline and the table of every reward of one folder; empty without an evaluation."""
    if not folder.evaluation:
        return ""
    head = headline(folder)
    parts = [[f"{head['title']}. {' '.join(head['lede'])}"]]
    for table in reward_tables(folder):
        rows = [[_named(table), "mean", f"difference to {table['base'] or 'the base'}", "better on"]]
        for line in table["lines"]:
            paired = line["paired"]
            row = [line["label"], wording.number(line["mean"]) + _brackets(line["low"], line["high"]), "", ""]
            if paired is not None:
                row[2] = wording.signed(paired["delta"]) + _brackets(paired["ci_low"], paired["ci_high"])
                row[3] = wording.percent(paired["win_rate"]) if paired["ci_low"] is not None else line["wins"]
            rows.append(row)
        parts.append(_table(rows))
    return _plain(parts)


def comparison(head: dict[str, Any], tables: Sequence[dict[str, Any]]) -> str:
    """The sentence of a comparison and its tables, methods in order of result: what a README can quote."""
    parts = [[f"{head['title']}. {head['lede']}"]]
    for table in tables:
        rows = [[_named(table), "gain", "better on", "images", "time"]]
        for line in [*table["lines"], *table["references"]]:
            found = line["found"] or {}
            change = wording.signed(found.get("delta")) + _brackets(found.get("low"), found.get("high"))
            cost = [wording.whole(line.get("images")), wording.duration(line.get("seconds"))]
            runs = f", {line['runs']} seeds" if line.get("runs", 1) > 1 else ""
            rows.append([line["label"] + runs, change, wording.percent(found.get("win_rate")), *cost])
        parts.append(_table(rows))
    return _plain(parts)


def _named(table: dict[str, Any]) -> str:
    return table["reward"] + (f" ({table['role']})" if table["role"] else "")


def _brackets(low: float | None, high: float | None) -> str:
    return interval(low, high, wording.number)


def _table(rows: list[list[str]]) -> list[str]:
    rows = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [f"| {' | '.join(row)} |" for row in padded]


def _plain(parts: list[list[str]]) -> str:
    """One text, in characters that any terminal has."""
    text = "\n\n".join("\n".join(lines) for lines in parts) + "\n"
    for special, plain in ((NBSP, " "), (MINUS, "-"), (DASH, "-"), ("\u00d7", "x")):
        text = text.replace(special, plain)
    return text
