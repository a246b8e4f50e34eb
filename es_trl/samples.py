"""What a generator draws: a picture, or a video as a list of pictures; how to show it, and whether it has a score."""

from collections.abc import Mapping
from typing import Any

from PIL import Image


OUTPUTS = ("images", "image", "frames", "videos", "audios")  # where a pipeline's output has its pictures
_KEY = "es_trl_no_score"


def pictures_of(output: Any) -> Any:
    """
    What a pipeline's output holds, a list or an array: the first of `images`, `image`, `frames`, `videos`, `audios`.

    Raises:
        `ValueError`: if it has none of them.
    """
    for name in OUTPUTS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if found is not None:
            break
    else:
        found = output[0] if isinstance(output, tuple) and output else output
    if isinstance(found, Image.Image):
        return [found]
    if not isinstance(found, list | tuple) and not hasattr(found, "__array__"):
        raise ValueError(f"the pipeline's output {type(output).__name__} has none of {', '.join(OUTPUTS)}")
    return list(found) if isinstance(found, tuple) else found


def mark_unscored(sample: Any, reason: str) -> Any:
    """
    `sample` with the note that no reward may score it: numbers that are no numbers look like a black picture.

    What can carry no note (an array, a sound) is replaced by a black picture that does.
    """
    picture = _first_picture(sample)
    if picture is None:
        sample = picture = Image.new("RGB", (8, 8))
    picture.info[_KEY] = reason
    return sample


def why_unscored(sample: Any) -> str | None:
    """The reason why `sample` has no score, if it has none."""
    picture = _first_picture(sample)
    return None if picture is None else picture.info.get(_KEY)


def is_black(sample: Any) -> bool:
    """Whether every pixel is exactly 0; False for what is no picture."""
    if isinstance(sample, list | tuple):
        return bool(sample) and all(map(is_black, sample))
    return isinstance(sample, Image.Image) and not any(high for _, high in sample.convert("RGB").getextrema())


def still_of(sample: Any) -> Image.Image:
    """A picture to show: the picture, the middle frame of a video, or a grey one for what cannot be seen."""
    if isinstance(sample, list | tuple) and sample:
        return still_of(sample[len(sample) // 2])
    return sample if isinstance(sample, Image.Image) else Image.new("RGB", (64, 64), "grey")


def _first_picture(sample: Any) -> Image.Image | None:
    while isinstance(sample, list | tuple) and sample:
        sample = sample[0]
    return sample if isinstance(sample, Image.Image) else None
