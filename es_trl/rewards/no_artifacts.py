"""Absence of visible defects: one minus the similarity of an image to fixed complaints."""

from __future__ import annotations

from .clip_features import ClipReward


# Our own wording, one text per kind of defect.
NEGATIVE_TEXTS = (
    "a blurry, out of focus image",
    "an image full of noise and grain",
    "an image with compression artifacts and glitches",
    "a deformed, distorted picture with broken anatomy",
    "a picture with a watermark or garbled text",
)


class NoArtifacts(ClipReward):
    """
    `1 - s` with s the mean over `NEGATIVE_TEXTS` of `(1 + cos(image, text)) / 2`, in [0, 1]; about 0.4 under ViT-B/32.
    """

    __name__ = "no_artifacts"

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return (1 - (1 + self.scorer.mean_cosine(NEGATIVE_TEXTS, images)) / 2).tolist()
