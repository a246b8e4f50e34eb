"""Scores on disk, batch by batch: an interrupted evaluation goes on where it was and scores no image twice."""

from __future__ import annotations

import base64
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .fingerprint import differences
from .rows import Draw


logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
Known = dict[tuple[int, int], tuple[np.ndarray, np.ndarray | None]]


class Journal:
    """
    The folder `journal/` of an evaluation: one JSON line per scored image, in files that are only appended to.

    Every process writes files of its own and reads those of all, so the number of processes may change between an
    interruption and its continuation. What was torn by a crash is a line that does not end or cannot be read: it is
    left out, and its image is drawn and scored again.

    Args:
        folder (`str` or `Path`): The journal's folder; made if needed.
        fingerprint (`dict`): What the scores depend on, but for the weights of the adapters, as plain data.
        weights (`Mapping[str, str]`): Checksum of the weights behind each label of a [`Draw`], without the base.
        process_index (`int`, *optional*): Names this process's files; process 0 also writes the fingerprint.
        overwrite (`bool`, *optional*): Forget what is there.
        barrier (`Callable`, *optional*): Waits for all processes.

    Raises:
        ValueError: the folder holds scores of something else; the message says what differs.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        fingerprint: dict[str, Any],
        weights: Mapping[str, str],
        process_index: int = 0,
        overwrite: bool = False,
        barrier: Callable[[], Any] = lambda: None,
    ):
        self.folder, self.weights, self.process_index = Path(folder), dict(weights), process_index
        if process_index == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in [*self.folder.glob("*.jsonl"), self.folder / FINGERPRINT] if overwrite else ():
                path.unlink(missing_ok=True)
        barrier()
        path = self.folder / FINGERPRINT
        if path.is_file():
            changed = differences(_read_json(path), fingerprint)
            if changed:
                raise ValueError(
                    f"output_dir={str(self.folder.parent)!r} holds the scores of another evaluation "
                    f"({'; '.join(changed)}): give another output_dir, or overwrite (--overwrite) to drop them."
                )
        barrier()  # everybody has looked before it appears
        if process_index == 0 and not path.is_file():
            write_text(path, json.dumps(fingerprint, indent=2) + "\n")

    def read(self, draw: Draw, features: bool) -> Known:
        """
        What is known of a draw: by (prompt, image) the scores (K,) and the judge's features (D,) or `None`.

        Args:
            draw ([`Draw`]): Which images.
            features (`bool`): Whether features are needed; a line without them is then left out.
        """
        known: Known = {}
        torn = 0
        stem = self.stem(draw)
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.stem.rpartition(".")[0] != stem:
                continue
            for line in path.read_bytes().split(b"\n"):
                if not line:
                    continue
                try:
                    entry = json.loads(line)
                    prompt, image = entry["key"]
                    scores = np.array([math.nan if s is None else s for s in entry["scores"]], np.float64)
                    found = np.frombuffer(base64.b64decode(entry["features"]), np.float32) if features else None
                except (ValueError, KeyError, TypeError):
                    torn += 1
                    continue
                known[int(prompt), int(image)] = scores, found
        if torn:
            logger.warning("%s: %d unreadable lines are left out, their images are drawn again.", draw.folder, torn)
        return known

    def append(
        self,
        draw: Draw,
        keys: Sequence[tuple[int, int]],
        scores: np.ndarray,
        features: np.ndarray | None = None,
    ) -> None:
        """
        Writes a batch and waits until it is on disk.

        Args:
            draw ([`Draw`]): Which images.
            keys (`Sequence[tuple[int, int]]`): (prompt index, image index) of B images.
            scores (`np.ndarray`): (B, K); what is not finite is written as missing.
            features (`np.ndarray`, *optional*): (B, D) float32.
        """
        lines = []
        for i, key in enumerate(keys):
            values = [float(score) if math.isfinite(score) else None for score in scores[i]]
            entry: dict[str, Any] = {"key": [int(key[0]), int(key[1])], "scores": values}
            if features is not None:
                entry["features"] = base64.b64encode(np.ascontiguousarray(features[i], np.float32).tobytes()).decode()
            lines.append(json.dumps(entry))
        path = self.folder / f"{self.stem(draw)}.{self.process_index}.jsonl"
        remove_torn_line(path)
        with open(path, "ab") as file:
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def stem(self, draw: Draw) -> str:
        """The name of a draw's files: another adapter under the same label has another one."""
        checksum = self.weights.get(draw.weights)
        return draw.folder if checksum is None else f"{draw.folder}-{checksum[:12]}"


def remove_torn_line(path: Path) -> None:
    """Cuts a file behind its last line end, so that what is appended does not continue a half line."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): give another output_dir, or --overwrite.") from error
    return data if isinstance(data, dict) else {}
