"""What all rooms do with one picture: see it without transparency, and hand it out so that nobody can change it."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

from .files import writing


if TYPE_CHECKING:
    from PIL import Image


def on_white(image: Image.Image) -> Image.Image:
    """
    `image` itself, or where it has transparency (RGBA, LA, P with a transparent colour, ...) an RGB picture of it on
    white. Rewards, judges, saved files and pages all see this one, as CLIP's own processor does.
    """
    if not getattr(image, "has_transparency_data", False):
        return image
    from PIL import Image

    layers = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    paper = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(paper, layers).convert("RGB")


def rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, transparency on white."""
    return on_white(image).convert("RGB")


def save_jpeg(image: Image.Image, path: str | os.PathLike[str], comment: bytes = b"") -> None:
    """Writes a JPEG, whole or not at all, transparency on white."""
    with writing(path) as temporary:
        rgb(image).save(temporary, format="JPEG", quality=92, subsampling=0, comment=comment or None)


def private_copy(value: Any) -> Any:
    """A copy of a picture, a column or anything in one, so that whoever gets it may change it."""
    if isinstance(value, str | int | float | bool | bytes | None):
        return value
    if hasattr(value, "has_transparency_data"):  # a PIL picture
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(map(private_copy, value))
    if type(value) is dict:
        return {key: private_copy(item) for key, item in value.items()}
    return copy.deepcopy(value)
