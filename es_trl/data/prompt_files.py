"""Reading prompt files into columns. Every problem is a `ValueError` that names the file, the line and the fix."""

from __future__ import annotations

import csv
import io
import json
import os
from typing import Any


SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def read_columns(path: str, column: str) -> tuple[dict[str, list[Any]], int, list[int] | None]:
    """
    Read a .txt, .csv, .tsv or .jsonl file.

    Args:
        path (`str`): the file, UTF-8 with or without BOM, any line ends.
        column (`str`): the name given to the only column of a .txt file.

    Returns:
        `tuple[dict[str, list[Any]], int, list[int] | None]`: the columns, all of one length; the number of blank lines
            passed over; and for .jsonl, whose values may be anything, the line of each row.

    Raises:
        `ValueError`: not UTF-8, a null byte, a malformed line, or nothing in it.
    """
    text = _read_text(path)
    suffix, numbers = os.path.splitext(path)[1].lower(), None
    if suffix == ".jsonl":
        columns, blank, numbers = _from_jsonl(path, text)
    elif suffix in (".csv", ".tsv"):
        columns, blank = _from_table(path, text, tab=suffix == ".tsv")
    else:
        lines = [line.strip() for line in _lines(text)]
        columns = {column: [line for line in lines if line]}
        blank = len(lines) - len(columns[column])
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"prompt file {path!r} has no prompts in it: put one on each line")
    return columns, blank, numbers


def _read_text(path: str) -> str:
    with open(path, "rb") as file:
        raw = file.read()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"prompt file {path!r} is UTF-16: save it as UTF-8")
    null = raw.find(b"\x00")
    if null >= 0:
        line = raw.count(b"\n", 0, null) + 1
        raise ValueError(f"prompt file {path!r} has a null byte in line {line}: remove it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"prompt file {path!r} is not UTF-8 in line {line}: save it as UTF-8") from error


def _lines(text: str) -> list[str]:
    """Split at line ends only; `str.splitlines` would also cut a prompt at form feeds and Unicode separators."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _from_table(path: str, text: str, tab: bool) -> tuple[dict[str, list[Any]], int]:
    # A quotation mark in a TSV is an ordinary character: reading it as a quote swallows prompts of PartiPrompts.
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    header: list[str] | None = None
    rows, blank = [], 0
    try:
        for row in reader:
            if not any(field.strip() for field in row):
                blank += 1
            elif header is None:
                header = [name.strip() for name in row]
            elif len(row) > len(header) == 1 and not tab and set(header[0]) & {";", "\t"}:
                break  # said below
            elif len(row) > len(header):
                fix = "" if tab else ": quote fields with commas"
                raise ValueError(
                    f"prompt file {path!r} has {len(row)} fields in line {reader.line_num}, "
                    f"but {len(header)} columns{fix}"
                )
            else:
                rows.append([*(field.strip() for field in row), *[""] * (len(header) - len(row))])
    except csv.Error as error:
        raise ValueError(f"prompt file {path!r} is malformed in line {reader.line_num}: {error}") from error
    if header is None:
        return {}, blank
    for mark, name in () if tab or len(header) > 1 else ((";", "semicolons"), ("\t", "tabs")):
        if mark in header[0]:
            fix = "end its name in .tsv" if mark == "\t" else "save it with commas between the columns"
            raise ValueError(f"prompt file {path!r} has {name} between its columns, not commas: {fix}")
    if len(set(header)) < len(header):
        raise ValueError(f"prompt file {path!r} names a column twice: {', '.join(header)}")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}, blank


def _from_jsonl(path: str, text: str) -> tuple[dict[str, list[Any]], int, list[int]]:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    lines = _lines(text)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line).items()))
            numbers.append(number)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f'prompt file {path!r} needs a JSON object such as {{"prompt": "a cat"}} in line {number}: {error}'
            ) from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}, len(lines) - len(rows), numbers
