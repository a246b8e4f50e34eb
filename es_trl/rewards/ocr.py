"""Text in pictures: does the picture show the words that the prompt puts in quotes? Read by RapidOCR."""

from __future__ import annotations

import math
import numbers
import re
import unicodedata
from typing import Any

import numpy as np

from ..pictures import rgb


# Opening and closing marks of many languages. A straight one behind a digit is an inch and opens nothing.
MARKS = {
    r'(?<!\d)"': '"',
    "\u201e": "\u201c\u201d",
    "\u201c": "\u201d",
    "\u201d": "\u201d",
    "\u201a": "\u2018\u2019",
    "\u00ab": "\u00bb",
    "\u00bb": "\u00ab",
    "\u2039": "\u203a",
    "\u203a": "\u2039",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "\u301d": "\u301e\u301f",
    "\uff02": "\uff02",
    "\uff62": "\uff63",
}
# Typographic single quotes: within a word the closing one is an apostrophe.
SINGLE = "(?<!\\w)\u2018((?:[^\u2018\u2019]|\u2019(?=\\w))*)\u2019(?!\\w)"
QUOTED = re.compile("|".join([*(f"{start}([^{ends}]*)[{ends}]" for start, ends in MARKS.items()), SINGLE]))
INSTALL = "pip install 'es-trl[ocr]'"


class Ocr:
    """
    `max(0, 1 - d / n)` with `d` the edit distance between the text read off the picture and the wanted one of `n`
    characters, ignoring case, spaces and how letters are composed (NFKC); 1 if the wanted text is part of what was
    read (the score of Flow-GRPO, https://huggingface.co/papers/2505.05470). In [0, 1].

    Wanted is the first text in double quotes of the prompt (`a sign that says "open"`; also typographic quotes, single
    ones too, German and Polish low ones, guillemets, corner brackets; a straight single one is an apostrophe), or the
    entry of the dataset's column `text`, a text or a number.
    Without either, or where it is blank, the answer is None: the reward does not apply.

    The reader is RapidOCR (PP-OCR networks under onnxruntime, on the CPU); its weights come with the package, nothing
    is downloaded. Lines are read in RapidOCR's order, from top to bottom.

    Args:
        threads (`int`, *optional*, defaults to `1`): threads of onnxruntime. Larger is faster on a quiet machine; one
            thread leaves the others to the pipeline and gives the same text every time.

    Raises:
        `ValueError`: when called, an entry of `text` that is neither a string, a number nor None.
        `ImportError`: `rapidocr` or `onnxruntime` is not installed.
    """

    __name__ = "ocr"
    rises_with_steps = True

    def __init__(self, threads: int = 1):
        self.read = _reader(threads)

    def __call__(self, prompts, images, text=None, **kwargs) -> list[float | None]:
        wanted = [quoted(prompt) for prompt in prompts] if text is None else [wanted_text(entry) for entry in text]
        return [
            text_score(self.read(image), target) if target else None
            for image, target in zip(images, wanted, strict=True)
        ]


def quoted(prompt: str) -> str | None:
    """The first text between quotes that is not blank, or None."""
    found = (match[match.lastindex or 0] for match in QUOTED.finditer(prompt))
    return next((text.strip() for text in found if plain(text)), None)


def wanted_text(entry: Any) -> str | None:
    """An entry of the column `text`, None where it is missing or blank; a whole number has no decimal point."""
    if entry is None or isinstance(entry, float) and math.isnan(entry):
        return None
    if isinstance(entry, numbers.Real) and not isinstance(entry, bool | np.bool_):
        whole = isinstance(entry, numbers.Integral) or float(entry).is_integer()
        exact: Any = entry
        entry = str(int(exact) if whole else exact)
    if not isinstance(entry, str):
        raise ValueError(f"the column 'text' of the ocr reward holds a {type(entry).__name__} ({entry!r}): give a str")
    return entry if plain(entry) else None


def plain(text: str) -> str:
    """Without case, spaces and invisible characters; composed and decomposed letters become one (NFKC)."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def text_score(read: str, wanted: str) -> float | None:
    """
    `max(0, 1 - edit_distance / len(wanted))` of the two as [`plain`] gives them; 1 if `wanted` is part of `read`, None
    if nothing is wanted.
    """
    read, wanted = plain(read), plain(wanted)
    if not wanted:
        return None
    if wanted in read:
        return 1.0
    return max(0.0, 1 - edit_distance(read, wanted) / len(wanted))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def _reader(threads: int):
    """`image -> text`."""
    try:
        import onnxruntime  # noqa: F401 - rapidocr would only miss it at the first picture
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(f"reward 'ocr' needs rapidocr and onnxruntime: {INSTALL}") from error
    engine: Any = RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(image) -> str:
        pixels = np.asarray(rgb(image))[:, :, ::-1]  # RapidOCR takes OpenCV's order, BGR
        return "".join(engine(np.ascontiguousarray(pixels)).txts or ())

    return read
