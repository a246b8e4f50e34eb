"""What an evaluation leaves in its folder: tables as JSON and Markdown, every score, and the prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_text, writing
from .markdown import page
from .result import plain


if TYPE_CHECKING:
    from .result import Evaluation


def write_files(
    result: Evaluation, folder: str | os.PathLike[str], table: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Writes `eval.json`, `eval.md`, `scores.parquet` and `prompts.jsonl`, each whole or not at all, and returns what
    `eval.json` holds; `table` is `result.to_dict()`, where it is known already.
    """
    folder = Path(folder)
    table = result.to_dict() if table is None else table
    entries = [
        {"index": i, "prompt": prompt, **{name: values[i] for name, values in result.columns.items()}}
        for i, prompt in enumerate(result.prompts)
    ]
    # A NaN in a column is no JSON: like every number that does not exist it is null.
    lines = [json.dumps(plain(entry), ensure_ascii=False, allow_nan=False, default=str) + "\n" for entry in entries]
    write_text(folder / "prompts.jsonl", "".join(lines))
    with writing(folder / "scores.parquet") as path:
        _write_scores(result, path)
    write_text(folder / "eval.md", page(table))
    write_text(folder / "eval.json", json.dumps(table, indent=2, allow_nan=False) + "\n")
    return table


def _write_scores(result: Evaluation, path: Path) -> None:
    """One line per row, prompt and image: `reward/<name>` and `judge/<metric>`, NaN where there is none."""
    import pyarrow
    import pyarrow.parquet

    parts: dict[str, list[np.ndarray]] = {}
    metrics = list(dict.fromkeys(metric for scores in result.judge_scores.values() for metric in scores))
    for row in result.rows:
        prompts, images, _ = result.scores[row.name].shape
        columns = {
            "row": np.repeat(row.name, prompts * images),
            "prompt_index": np.repeat(np.arange(prompts), images),
            "image": np.tile(np.arange(images), prompts),
            "image_index": result.image_index[row.name].ravel(),
        }
        columns |= {f"reward/{name}": result.of(row.name, name).ravel() for name in result.reward_names}
        for metric in metrics:
            values = result.judge_scores.get(row.name, {}).get(metric, np.full((prompts, images), np.nan))
            columns[f"judge/{metric}"] = np.broadcast_to(values, (prompts, images)).ravel()
        for name, values in columns.items():
            parts.setdefault(name, []).append(values)
    table = pyarrow.table({name: np.concatenate(values) for name, values in parts.items()})
    pyarrow.parquet.write_table(table, path)
