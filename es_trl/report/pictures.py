"""Pictures for the inside of a page: read, made small enough, and turned into data URIs."""

import base64
import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..pictures import rgb
from .folder import Folder


logger = logging.getLogger(__name__)

LONGEST = 512  # pixels of a pair's longer side; larger originals stay in the folder
PAIR_ROWS = 5  # models to choose from under one slider


@dataclass
class Pair:
    """
    One prompt and noise under several models.

    Args:
        prompt, kind (`str`): The prompt; `"best"`, `"typical"` or `"worst"`.
        reward (`str`, *optional*): What the pairs are sorted by.
        change (`float`, *optional*): By how much it changed on this prompt, from the base to the trained model.
        images (`dict[str, str]`): Data URI by row name.
        width, height (`int`): Pixels.
        changes (`dict[str, float]`): Change on this prompt under every reward.
    """

    prompt: str
    kind: str
    reward: str | None
    change: float | None
    images: dict[str, str]
    width: int
    height: int
    changes: dict[str, float] = field(default_factory=dict)

    def only(self, *rows: str) -> dict[str, str]:
        """The pictures of some rows."""
        return {row: self.images[row] for row in rows if row in self.images}

    def shown_changes(self) -> list[tuple[str, float]]:
        """The changes to print, that of the reward the pairs are sorted by first."""
        found = self.changes or ({self.reward: self.change} if self.reward and self.change is not None else {})
        return sorted(found.items(), key=lambda item: item[0] != self.reward)


def data_uri(image: Image.Image | Path, longest: int = LONGEST) -> tuple[str, int, int] | None:
    """
    A picture as `data:image/...;base64,...` with width and height, the longer side of `longest` pixels at most; a JPEG
    or PNG file that is small enough is taken as it is. `None` for a file that is no picture.
    """
    try:
        opened = Image.open(image) if isinstance(image, Path) else image
        small = max(opened.size) <= longest
        if isinstance(image, Path) and small and opened.format in ("JPEG", "PNG"):
            opened.load()
            return _uri(image.read_bytes(), opened.format), *opened.size
        picture = rgb(opened)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        logger.warning("%s is left out of the report: %s", image, error)
        return None
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "PNG" if max(picture.size) <= 128 else "JPEG"
    how = {"optimize": True} if kind == "PNG" else {"quality": 88, "subsampling": 0}
    picture.save(buffer, kind, **how)
    return _uri(buffer.getvalue(), kind), *picture.size


def pairs(folder: Folder, limit: int = 6) -> list[Pair]:
    """
    The before/after pairs of an evaluation, best first, worst last, for every reward they were sorted by; `limit` of
    one kind (best, typical, worst) and reward, at most.
    """
    evaluation = folder.evaluation
    rows = [row["name"] for row in evaluation.get("rows") or []]
    prompt_changes = _prompt_changes(folder)
    found: list[Pair] = []
    count: dict[tuple, int] = {}
    for entry in evaluation.get("pictures") or []:
        kind, reward = str(entry.get("kind")), entry.get("reward")
        count[reward, kind] = count.get((reward, kind), 0) + 1
        if count[reward, kind] > limit:
            continue
        files = entry.get("files") or {}
        shown = sorted(files, key=lambda row: _place(row, entry, rows))[:PAIR_ROWS]
        images = {row: uri for row in shown if (path := folder.file(files[row])) and (uri := data_uri(path))}
        if len(images) >= 2:
            width, height = next(iter(images.values()))[1:]
            uris = {row: uri for row, (uri, *_) in images.items()}
            prompt, changes = str(entry.get("prompt", "")), prompt_changes.get(entry.get("prompt_index"), {})
            found.append(Pair(prompt, kind, reward, entry.get("change"), uris, width, height, changes))
    return found


def _place(row: str, entry: dict[str, Any], rows: list[str]) -> tuple:
    return (row != entry.get("against"), row != entry.get("row"), rows.index(row) if row in rows else len(rows))


def _prompt_changes(folder: Folder) -> dict[int, dict[str, float]]:
    """Per prompt index the change of every reward between the pair's two rows, from scores.parquet."""
    pictures = folder.evaluation.get("pictures") or []
    scores = folder.scores() if pictures else None
    if scores is None or not {"row", "prompt_index"} <= set(scores.columns):
        return {}
    row, against = pictures[0].get("row"), pictures[0].get("against")
    rewards = [column for column in scores.columns if column.startswith("reward/")]
    means = scores.groupby(["row", "prompt_index"])[rewards].mean()
    if not {row, against} <= set(means.index.get_level_values("row")):
        return {}
    change = (means.loc[row] - means.loc[against]).rename(columns=lambda name: name.removeprefix("reward/"))
    return {int(index): {k: float(v) for k, v in line.items() if v == v} for index, line in change.iterrows()}


def strengths(folder: Folder) -> dict[str, Any] | None:
    """The prompts that were drawn at several LoRA strengths, and `frames`: (strength, data URI, width, height)."""
    entry = folder.evaluation.get("strengths")
    if not entry:
        return None
    paths = [(strength, folder.file(name)) for strength, name in entry["files"].items()]
    frames = [(strength, *uri) for strength, path in paths if path is not None and (uri := data_uri(path, 1024))]
    return {"prompts": entry["prompts"], "frames": frames} if len(frames) > 1 else None


def sample_sheets(folder: Folder, limit: int = 9) -> list[tuple[int, str, int, int]]:
    """The sample sheets of a run as (step, data URI, width, height), from the first to the last, at most `limit`."""
    sheets = [entry for entry in folder.samples if "members" not in entry]
    found = []
    for entry in _spread(sheets, limit):
        path = folder.file(f"samples/{entry['file_name']}")
        if path is not None and (uri := data_uri(path, 1024)):
            found.append((entry["step"], *uri))
    return found


def populations(folder: Folder, limit: int = 6) -> list[dict[str, Any]]:
    """
    Best, median and worst member over time: per step `step`, `prompts`, and `members`: label, reward, data URI of its
    pictures in one row, width and height of that row.
    """
    found = []
    for entry in _spread([entry for entry in folder.samples if entry.get("members")], limit):
        path = folder.file(f"samples/{entry.get('tiles', '')}")
        if path is None:
            continue
        try:
            sheet = Image.open(path).convert("RGB")
        except (OSError, ValueError) as error:
            logger.warning("%s is left out of the report: %s", path, error)
            continue
        members = entry["members"]
        height = sheet.height // len(members)
        rows = []
        for i, member in enumerate(members):
            strip = sheet.crop((0, i * height, sheet.width, (i + 1) * height))
            if shown := data_uri(strip, 900):
                rows.append({**member, **dict(zip(("uri", "width", "height"), shown, strict=True))})
        found.append({"step": entry["step"], "prompts": entry.get("prompts") or [], "members": rows})
    return found


def _spread(entries: list, limit: int) -> list:
    """At most `limit` entries, evenly spread, the first and the last among them."""
    if len(entries) <= limit:
        return entries
    return [entries[round(i * (len(entries) - 1) / (limit - 1))] for i in range(limit)]


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"
