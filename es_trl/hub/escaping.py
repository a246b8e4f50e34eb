"""The one door for text of users (prompts, names, settings) into Markdown."""

import html
import re
import unicodedata
from typing import Any


MAX_LENGTH = 300
_SECRETS = (
    (re.compile(r"hf_[A-Za-z0-9]{20,}"), "hf_***"),
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+@"), "***@"),
)
_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|api_?key|authorization)$", re.IGNORECASE)
# What Markdown, its tables, its autolinks or a template engine would act on. A numeric reference shows the same letter
# and is never read as syntax (CommonMark 0.31, 2.5).
_ACTIVE = re.compile(
    r"[\\`*\[\]{}|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|@(?=[A-Za-z])|-{3,}|:(?=//)|(?<=www)\.", re.IGNORECASE
)


def redact(text: str) -> str:
    """Hides Hub tokens and passwords in URLs."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redact_all(data: Any) -> Any:
    """A copy of JSON-able data without secrets: what its strings hold, and whatever a key like `token` names."""
    if isinstance(data, dict):
        return {
            key: "***" if isinstance(value, str) and _SECRET_KEY.search(str(key)) else redact_all(value)
            for key, value in data.items()
        }
    if isinstance(data, (list, tuple)):
        return [redact_all(value) for value in data]
    return redact(data) if isinstance(data, str) else data


def one_line(text: object, length: int = MAX_LENGTH) -> str:
    """`text` without secrets, control or invisible characters and line breaks, cut to `length` letters."""
    visible = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text))
    line = " ".join(redact(visible).split())
    return line if len(line) <= length else line[: length - 3].rstrip() + "..."


def md_escape(text: object, length: int = MAX_LENGTH) -> str:
    """
    One line of Markdown that shows any `text`, cut to `length` letters, as it is: without HTML, links, emphasis, code,
    rules or template syntax, also in a cell of a table.
    """
    escaped = []
    position = 0
    line = one_line(text, length)
    for found in _ACTIVE.finditer(line):
        escaped.append(html.escape(line[position : found.start()]))
        escaped += [f"&#{ord(letter)};" for letter in found.group()]
        position = found.end()
    return "".join([*escaped, html.escape(line[position:])])
