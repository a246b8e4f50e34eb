"""Rewards written for TRL's former DDPOTrainer or for ddpo-pytorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..pictures import private_copy, rgb
from .calling import function_name


def from_ddpo(fn: Callable, image_format: str = "pt") -> Callable:
    """
    Adapt `fn(images, prompts, metadata) -> (scores, info)` to a reward of ours.

    Args:
        fn (`Callable`): the DDPO reward. `metadata` is a tuple of one dict per image: the dataset's other columns.
            Lists of one value per image in `info` go to `log_extra`.
        image_format (`str`, *optional*, defaults to `"pt"`):
            `"pt"`: a float32 tensor (B, 3, H, W) in [0, 1], what DDPOTrainer passes; `"np"`: a uint8 array
            (B, H, W, 3); `"pil"`: the list of PIL images.

    Returns:
        `Callable`: a reward with the same name.

    Raises:
        `ValueError`: unknown `image_format`; when called, images of different sizes for `"pt"` and `"np"`.
    """
    if image_format not in ("pt", "np", "pil"):
        raise ValueError(f"image_format must be 'pt', 'np' or 'pil', not {image_format!r}")

    def reward(prompts, images, trainer_state=None, log_extra=None, log_metric=None, **columns):
        rows = zip(*columns.values(), strict=True) if columns else [()] * len(images)
        metadata = tuple(private_copy(dict(zip(columns, row, strict=True))) for row in rows)
        result = fn(_convert(images, image_format), tuple(prompts), metadata)
        scores, info = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if log_extra is not None and isinstance(info, dict):
            for key, values in info.items():
                if isinstance(values, list | tuple | np.ndarray) and len(values) == len(images):
                    log_extra(key, list(values))
        return scores

    reward.__name__ = function_name(fn)
    return reward


def _convert(images, image_format: str):
    if image_format == "pil":
        return private_copy(list(images))
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"a DDPO reward takes images of one size, not {sizes}: use image_format='pil'")
    pixels = np.stack([np.asarray(rgb(image)) for image in images])
    if image_format == "np":
        return pixels
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
