"""The only writer of files that are whole or not there, and of files of JSON lines; and their reader."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

MAX_LINE = 64 * 1024 * 1024  # bytes; more than the scores of any population, less than what fills a memory
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # what diffusers' loaders look for in a folder
TEMPORARY = ".tmp-"  # how everything begins that is not whole yet


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Yields a path beside `path` to write a file to; on leaving it is brought to the disk and takes the place of `path`
    in one step, with the rights that the umask gives. If anything fails, what stood at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays, since some writers choose their format by it.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb"):
            mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some writers replace the file by one that only its owner may read
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Yields an empty folder to write files to; on leaving each takes its place in `folder` as with `writing`. If
    anything fails before that, `folder` is untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{os.getpid()}-files"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        open_to_all(temporary)
        for path in sorted(temporary.iterdir()):
            sync(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_to_all(folder: Path) -> None:
    """Gives every file below a folder the rights that the umask gives, which some writers do not ask."""
    probe = folder / f"{TEMPORARY}{os.getpid()}-mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def left_by(path: Path) -> int | None:
    """The number of the process that was writing this file or folder and had not finished; None for anything else."""
    found = re.fullmatch(rf"{re.escape(TEMPORARY)}(\d+)-.+", path.name)
    return int(found.group(1)) if found else None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes JSON, whole or not at all; what JSON does not know is written as text."""
    write_text(path, json.dumps(data, indent=2, default=str) + "\n")


def write_lines(path: str | os.PathLike[str], entries: Iterable[Any]) -> None:
    """Writes JSON lines, whole or not at all."""
    with writing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(entry, default=str)}\n" for entry in entries)


def append_whole(path: str | os.PathLike[str], text: str) -> None:
    """Appends all of a text, or nothing where the disk refuses it, so that the next line begins a line."""
    path = Path(path)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def read_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """
    The entries of a file of JSON lines. A last line without its end, which a killed run leaves, is passed over; any
    other line that is not a JSON object is said aloud and passed over.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                yield entry
            else:
                logger.warning("Line %d of %s is not a JSON object and is left out.", number, path)


def sync(path: str | os.PathLike[str]) -> None:
    """Brings a file, or the names in a folder, to the disk; Windows does that for files alone, open for writing."""
    try:
        descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    except PermissionError:
        if os.path.isdir(path):
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
