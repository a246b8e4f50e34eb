"""The pairs worth looking at, on disk: where an adapter changed most for the better, typically, and for the worse."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..pictures import save_jpeg
from ..samples import still_of
from .grids import tiles
from .protocol import Keys, draw_images
from .rows import EvaluationRow
from .statistics import prompt_means


if TYPE_CHECKING:
    from ..pipelines import LoadedAdapters, PipelineAdapter
    from .result import Evaluation


IMAGES = "images"
DrawRow = Callable[[EvaluationRow, Keys], Iterator[tuple[Keys, list[Image.Image]]]]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # LoRA scales; 0 is the base, 1 as trained
MOST_STRENGTHS = 4  # prompts that are drawn at all of them


def choose_pairs(result: Evaluation, count: int) -> list[dict[str, Any]]:
    """
    A third of the pairs with the largest gain, a third around the median, a third with the largest loss; once by the
    first held-out reward and once by the first optimised one (by the first reward when nobody said which is which),
    `count` prompts of each at most. Best first, worst last, as in `pictures` of `eval.json`, without `files`.

    The change is that from the base to the adapters with as many steps, averaged over the adapters. Of a prompt's
    images the one is shown whose change is nearest to the prompt's mean, so that a pair is neither lucky nor unlucky
    within its prompt.
    """
    pairs = result.adapter_pairs() if count > 0 else []
    if not pairs:
        return []
    trained = result.trained or {}
    held_out = [name for name in result.reward_names if trained and name not in trained][:1]
    optimised = next((name for name in result.reward_names if name in trained), result.reward_names[0])
    return [entry for reward in [*held_out, optimised] for entry in _pairs_by(result, pairs, reward, count)]


def _pairs_by(result: Evaluation, pairs: list[tuple[str, str]], reward: str, count: int) -> list[dict[str, Any]]:
    changes = np.stack([result.of(row, reward) - result.of(base, reward) for row, base in pairs]).mean(axis=0)
    means = prompt_means(changes)
    order = sorted(np.flatnonzero(np.isfinite(means)).tolist(), key=lambda i: (-means[i], i))
    parts = zip(("best", "typical", "worst"), _ends_and_middle(order, count), strict=True)
    entries = []
    for prompt, kind in [(prompt, kind) for kind, prompts in parts for prompt in prompts]:
        distance = np.abs(changes[prompt] - means[prompt])
        image = int(np.argmin(np.where(np.isfinite(distance), distance, np.inf)))
        entries.append({
            "prompt_index": prompt, "image": image, "prompt": result.prompts[prompt], "kind": kind,
            "change": float(means[prompt]), "reward": reward, "row": pairs[0][0], "against": pairs[0][1],
        })  # fmt: skip
    return entries


def _ends_and_middle(ranked: list[Any], count: int) -> tuple[list[Any], list[Any], list[Any]]:
    """The first, the middle and the last of a ranking, `count` together, about a third each; all where it is short."""
    count = min(count, len(ranked))
    third = len(ranked) // 3 if count == len(ranked) else max(1, count // 3)
    middle = max(0, count - 2 * third)
    start = (len(ranked) - middle) // 2
    last = ranked[len(ranked) - third :] if count > 1 else []
    return ranked[:third], ranked[start : start + middle], last


def first_look(pairs: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """By rule, what to look at first: the two ends and the middle of the first ranking."""
    ranked = [pair for pair in pairs if pair["reward"] == pairs[0]["reward"]]
    return [pair for part in _ends_and_middle(ranked, count) for pair in part]


def save_pictures(
    model: PipelineAdapter | LoadedAdapters,
    result: Evaluation,
    count: int,
    folder: str | os.PathLike[str],
    batch_size: int = 16,
) -> None:
    """
    Draws the pictures that are worth looking at again from their keys, with the `model` that drew the rows, below
    `folder/images`: of `count` prompts for each reward, at most. Notes their files in `result.pictures` and
    `result.strengths`; they are named by numbers and checked labels, never by prompts.
    """
    pairs = choose_pairs(result, count)
    how: dict[str, Any] = {"seed": result.noise, "batch_size": batch_size, "columns": result.columns}
    draw = partial(draw_images, model, result.prompts, **how)
    result.pictures = _save_pairs(draw, result, pairs, folder)
    result.strengths = _save_strengths(draw, result, pairs, folder)


def _save_pairs(
    draw: DrawRow, result: Evaluation, pairs: Sequence[dict[str, Any]], folder: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """`pairs` with `files`, paths below `folder` by row name: `images/<draw>/00012-00.jpg`."""
    pairs = [{**pair, "files": {}} for pair in pairs]
    for row in result.rows:
        directory = Path(folder, IMAGES, row.draw.folder)
        directory.mkdir(parents=True, exist_ok=True)
        wanted = {}
        for pair in pairs:
            prompt = pair["prompt_index"]
            key = (prompt, int(result.image_index[row.name][prompt, pair["image"]]))
            name = f"{key[0]:05d}-{key[1]:02d}.jpg"
            pair["files"][row.name] = f"{IMAGES}/{row.draw.folder}/{name}"
            wanted[key] = directory / name
        for keys, images in draw(row, list(wanted)):
            for key, image in zip(keys, images, strict=True):
                save_jpeg(still_of(image), wanted[key])
    return pairs


def _save_strengths(
    draw: DrawRow, result: Evaluation, pairs: Sequence[dict[str, Any]], folder: str | os.PathLike[str]
) -> dict[str, Any] | None:
    """
    The most typical prompts with the first adapter at several LoRA strengths, from the table's noise, side by side
    without any text: `row`, `prompts`, and `files` (`images/strength-0.25.jpg`) by strength; `None` without pairs.
    """
    if not pairs:
        return None
    first = [pair for pair in pairs if pair["reward"] == pairs[0]["reward"]]
    chosen = ([pair for pair in first if pair["kind"] == "typical"] or first)[:MOST_STRENGTHS]
    adapter = next(row for row in result.rows if row.name == chosen[0]["row"])
    keys = [(pair["prompt_index"], pair["image"]) for pair in chosen]
    files = {}
    for strength in STRENGTHS:
        row = replace(adapter, name=f"strength {strength:g}", adapter_scale=strength)
        drawn: dict[tuple[int, int], Image.Image] = {}
        for batch, images in draw(row, keys):
            drawn |= dict(zip(batch, map(still_of, images), strict=True))
        path = Path(folder, IMAGES, f"strength-{strength:g}.jpg")
        save_jpeg(tiles([[drawn[key] for key in keys]]), path)
        files[f"{strength:g}"] = f"{IMAGES}/{path.name}"
    return {"row": adapter.name, "prompts": [pair["prompt"] for pair in chosen], "files": files}
