"""A rough aesthetic score without a trained head: similarity of an image to fixed praise."""

from __future__ import annotations

from .clip_features import ClipReward


# Our own wording; several phrasings, so that no single one can be flattered.
POSITIVE_TEXTS = (
    "a beautiful, aesthetic image",
    "a masterpiece with harmonious colors and a balanced composition",
    "a stunning, professional photograph or illustration",
)


class ClipAesthetic(ClipReward):
    """Mean over `POSITIVE_TEXTS` of `(1 + cos(image, text)) / 2`, in [0, 1]. A proxy: it ignores the prompt."""

    __name__ = "clip_aesthetic"

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return ((1 + self.scorer.mean_cosine(POSITIVE_TEXTS, images)) / 2).tolist()
