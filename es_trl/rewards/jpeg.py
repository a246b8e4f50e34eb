"""File size after JPEG compression, the two toy rewards of DDPO (https://huggingface.co/papers/2305.13301)."""

from __future__ import annotations

import io

from ..pictures import rgb


JPEG_QUALITY = 95


def jpeg_kilobytes(image) -> float:
    """Size of `image` as a JPEG of quality 95, in kB (bytes / 1000)."""
    buffer = io.BytesIO()
    rgb(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell() / 1000


def jpeg_compressibility(prompts, images, **kwargs) -> list[float]:
    """Minus the JPEG size in kB: smooth, simple images score high."""
    return [-jpeg_kilobytes(image) for image in images]


def jpeg_incompressibility(prompts, images, **kwargs) -> list[float]:
    """The JPEG size in kB: busy, detailed images score high."""
    return [jpeg_kilobytes(image) for image in images]
