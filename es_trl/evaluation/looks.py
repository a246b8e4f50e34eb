"""How pictures look, in numbers that no reward gives: what an early warning sees without being told what to watch."""

import numpy as np
from PIL import Image

from ..pictures import rgb


# name -> what pictures become when it falls, and when it rises
LOOKS = {
    "brightness": ("darker", "brighter"),
    "contrast": ("flatter", "harsher"),
    "saturation": ("greyer", "more garish"),
    "edges": ("emptier", "busier"),
    "fine_detail": ("blurrier", "noisier"),
    "entropy": ("more uniform", "more cluttered"),
}
SIDE = 256  # pixels of the longer side; larger pictures are made smaller first
EDGE = 0.1  # of the range of luma, between neighbours


def looks_of(image: Image.Image) -> np.ndarray:
    """
    One float64 per name in `LOOKS`: mean luma in [0, 1]; its standard deviation; mean HSV saturation in [0, 1]; share
    of pixels whose luma differs from their neighbours' by more than 0.1; root mean square of the luma's Laplacian;
    entropy of the luma's histogram of 64 bins, in [0, 1].
    """
    picture = rgb(image)
    picture.thumbnail((SIDE, SIDE))
    pixels = np.asarray(picture, dtype=np.float64) / 255
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    high, low = pixels.max(axis=2), pixels.min(axis=2)
    saturation = np.where(high > 0, (high - low) / np.maximum(high, 1e-9), 0.0)
    padded = np.pad(luma, 1, mode="edge")
    across, down = padded[1:-1, 2:] - luma, padded[2:, 1:-1] - luma
    laplacian = 4 * luma - padded[:-2, 1:-1] - padded[2:, 1:-1] - padded[1:-1, :-2] - padded[1:-1, 2:]
    share = np.histogram(luma, 64, (0.0, 1.0))[0] / luma.size
    share = share[share > 0]
    return np.array([
        luma.mean(), luma.std(), saturation.mean(), (np.hypot(across, down) > EDGE).mean(),
        np.sqrt(np.square(laplacian).mean()), -(share * np.log2(share)).sum() / 6,
    ])  # fmt: skip
