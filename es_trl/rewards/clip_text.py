"""Text alignment: how well an image fits its prompt, by CLIP."""

from __future__ import annotations

from .clip_features import get_scorer


class ClipText:
    """
    `(1 + cos(image, prompt)) / 2`, in [0, 1]; about 0.6 to 0.7 for a fitting image under ViT-B/32.

    Args:
        checkpoint (`str`, *optional*, defaults to `"openai/clip-vit-base-patch32"`): a CLIP checkpoint.
        device, dtype: see `ClipScorer`.
    """

    default_checkpoint = "openai/clip-vit-base-patch32"
    __name__ = "clip_text"
    rises_with_steps = True

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None):
        self.scorer = get_scorer(checkpoint or self.default_checkpoint, device, dtype)

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return ((1 + self.scorer.cosine(prompts, images)) / 2).tolist()

    def across(self, prompts, images):
        """`(B, P)`: the score of every image under every prompt."""
        return (1 + self.scorer.cosines(prompts, images)) / 2
