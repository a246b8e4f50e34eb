"""Preference pairs: the best against the worst of the images of a prompt, or the pictures of a data set."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, UnidentifiedImageError

from ..rewards.results import weighted_total
from .advantages import moments


# Pick-a-Pic: two pictures, and 1 if the first one was preferred, 0 if the second, 0.5 for neither.
PICK_A_PIC = ("jpg_0", "jpg_1", "label_0")


@dataclass
class Pairs:
    """
    Preferred and other images of `n` prompts, as latents `(n, ...)` fp32; `indices` are the places of the prompts in
    the step's batch, which key their noise.
    """

    prompts: list[str]
    columns: dict[str, list]
    indices: list[int]
    chosen: torch.Tensor
    rejected: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompts)


def totals(scores: np.ndarray, weights: np.ndarray, aggregation: str) -> np.ndarray:
    """
    One number per image, `(P, G)` fp64, of scores `(P, G, K)` and weights `(K,)`; NaN where any reward that applies to
    the prompt is not finite. `"normalize_then_sum"` divides each reward by its standard deviation within prompts
    first.
    """
    if aggregation == "normalize_then_sum":
        finite = np.isfinite(scores)
        centred = np.where(finite, scores - moments(scores)[0], 0.0)
        spread = np.sqrt(np.square(centred).sum(axis=(0, 1)) / np.maximum(finite.sum(axis=(0, 1)), 1))
        scores = np.where(finite, centred / np.where(spread > 0, spread, 1.0), np.nan)
    return weighted_total(scores, weights)


def best_and_worst(values: np.ndarray) -> list[tuple[int, int, int]]:
    """
    Rows (prompt, best image, worst image) of `(P, G)` values; prompts whose finite values are fewer than two or all
    equal are left out.
    """
    found = []
    for prompt, row in enumerate(values):
        finite = np.flatnonzero(np.isfinite(row))
        if len(finite) > 1 and row[finite].max() > row[finite].min():
            best, worst = finite[row[finite].argmax()], finite[row[finite].argmin()]
            found.append((prompt, int(best), int(worst)))
    return found


# ---- a data set of pairs ----


def check_pairs(dataset: Dataset, chosen: str, rejected: str) -> Dataset:
    """
    The data set, without the ties of Pick-a-Pic.

    Raises:
        `ValueError`: if a column is missing, or the first row has no readable picture.
    """
    columns = dataset.column_names
    if set(PICK_A_PIC) <= set(columns) and chosen not in columns:
        labels = np.asarray(dataset["label_0"], dtype=np.float64)
        dataset = dataset.select(np.flatnonzero(labels != 0.5))
        if not len(dataset):
            raise ValueError("Every label_0 of the pairs is 0.5: there are only ties, and nothing to learn from.")
    else:
        missing = [name for name in (chosen, rejected) if name not in columns]
        if missing:
            raise ValueError(
                f"online=False needs pictures in the columns {chosen!r} and {rejected!r} (or Pick-a-Pic's "
                f"{', '.join(PICK_A_PIC)}); {missing[0]!r} is not among {', '.join(columns)}. Set chosen_column and "
                "rejected_column, or online=True to draw the pairs."
            )
    pictures_of(dataset[0], chosen, rejected)
    return dataset


def pictures_of(row: dict, chosen: str, rejected: str) -> tuple[Image.Image, Image.Image]:
    """The preferred and the other picture of a row."""
    names = (chosen, rejected)
    if chosen not in row:
        names = PICK_A_PIC[:2] if row["label_0"] > 0.5 else PICK_A_PIC[1::-1]
    return tuple(_picture(row[name], name, row["prompt"]) for name in names)


def _picture(value, column: str, prompt: str) -> Image.Image:
    where = f"column {column!r}, prompt {prompt[:60]!r}"
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | os.PathLike) and not os.path.isfile(value):
        raise ValueError(f"{where}: there is no picture file {str(value)!r}.")
    if not isinstance(value, str | os.PathLike | bytes):
        raise ValueError(
            f"{where}: a picture is a PIL image, a path, the bytes of a file or a dict with one of them, not "
            f"{type(value).__name__}."
        )
    try:
        picture = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        picture.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where}: the picture cannot be read ({error}).") from error
    return picture


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` out of `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
