"""A rough aesthetic score without a trained head: similarity of an image to fixed praise."""

from __future__ import annotations

from .clip_features import get_scorer


# Our own wording; several phrasings, so that no single one can be flattered.
POSITIVE_TEXTS = (
    "a beautiful, aesthetic image",
    "a masterpiece with harmonious colors and a balanced composition",
    "a stunning, professional photograph or illustration",
)


class ClipAesthetic:
    """
    Mean over `POSITIVE_TEXTS` of `(1 + cos(image, text)) / 2`, in [0, 1]. A proxy: it ignores the prompt.

    Args:
        checkpoint (`str`, *optional*, defaults to `"openai/clip-vit-base-patch32"`): a CLIP checkpoint.
        device, dtype: see `ClipScorer`.
    """

    default_checkpoint = "openai/clip-vit-base-patch32"
    __name__ = "clip_aesthetic"
    rises_with_steps = True

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None):
        self.scorer = get_scorer(checkpoint or self.default_checkpoint, device, dtype)

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return ((1 + self.scorer.mean_cosine(POSITIVE_TEXTS, images)) / 2).tolist()
