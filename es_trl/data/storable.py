"""What a table of prompts can hold: found before pyarrow, a tokenizer or the written file says it without a place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


HALF_PAIR = re.compile("[\\ud800-\\udfff]")


def unstorable(value: Any) -> str | None:
    """Why `value`, or something in it, is neither text of Unicode nor a number of 64 bits; None if it is."""
    if isinstance(value, str):
        return "half of a surrogate pair, as of an emoji that was cut in two: remove it" if _is_cut(value) else None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "an integer of more than 63 bits: write it as text"
    if isinstance(value, Mapping):
        return next(filter(None, map(unstorable, [*value.keys(), *value.values()])), None)
    if isinstance(value, np.ndarray):
        return unstorable(value.tolist()) if value.dtype.kind in "OU" else None
    if isinstance(value, list | tuple | set):
        return next(filter(None, map(unstorable, value)), None)
    return None


def all_unsigned(values: Sequence[Any]) -> bool:
    """Whether a column holds integers that fit 64 bits without a sign, such as seeds, and only so; None is allowed."""
    known = [value for value in values if value is not None]
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in known)
    return bool(known) and whole and min(known) >= 0 and 2**63 <= max(known) < 2**64


def _is_cut(text: str) -> bool:
    return not text.isascii() and HALF_PAIR.search(text) is not None
