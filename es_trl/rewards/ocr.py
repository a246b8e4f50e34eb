"""Text in pictures: does the picture show the words that the prompt puts in quotes? Read by RapidOCR."""

from __future__ import annotations

import re

import numpy as np

from ..pictures import rgb


QUOTED = re.compile('"([^"]+)"|\u201c([^\u201d]+)\u201d')
INSTALL = "pip install 'es-trl[ocr]'"


class Ocr:
    """
    `max(0, 1 - d / n)` with `d` the edit distance between the text read off the picture and the wanted one of `n`
    characters, both in lower case without spaces; 1 if the wanted text is part of what was read (the score of
    Flow-GRPO, https://huggingface.co/papers/2505.05470). In [0, 1].

    Wanted is the first text in double quotes of the prompt (`a sign that says "open"`), or the entry of the dataset's
    column `text`. Without either the answer is None: the reward does not apply.

    The reader is RapidOCR (PP-OCR networks under onnxruntime, on the CPU); its weights come with the package, nothing
    is downloaded. Lines are read in RapidOCR's order, from top to bottom.

    Args:
        threads (`int`, *optional*, defaults to `1`): threads of onnxruntime. Larger is faster on a quiet machine; one
            thread leaves the others to the pipeline and gives the same text every time.

    Raises:
        `ImportError`: `rapidocr` or `onnxruntime` is not installed.
    """

    __name__ = "ocr"

    def __init__(self, threads: int = 1):
        self.read = _reader(threads)

    def __call__(self, prompts, images, text=None, **kwargs) -> list[float | None]:
        wanted = [quoted(prompt) for prompt in prompts] if text is None else list(text)
        return [
            text_score(self.read(image), target) if target else None
            for image, target in zip(images, wanted, strict=True)
        ]


def quoted(prompt: str) -> str | None:
    """The first text between double quotes, straight or typographic, or None."""
    match = QUOTED.search(prompt)
    return (match[1] or match[2]) if match else None


def text_score(read: str, wanted: str) -> float:
    """`max(0, 1 - edit_distance / len(wanted))`, ignoring case and spaces; 1 if `wanted` is part of `read`."""
    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))
    if not wanted or wanted in read:
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
    engine = RapidOCR(
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
