"""Text alignment: how well an image fits its prompt, by CLIP."""

from __future__ import annotations

from .clip_features import ClipReward


class ClipText(ClipReward):
    """`(1 + cos(image, prompt)) / 2`, in [0, 1]; about 0.6 to 0.7 for a fitting image under ViT-B/32."""

    __name__ = "clip_text"

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return ((1 + self.scorer.cosine(prompts, images)) / 2).tolist()

    def across(self, prompts, images):
        """`(B, P)`: the score of every image under every prompt."""
        return (1 + self.scorer.cosines(prompts, images)) / 2
