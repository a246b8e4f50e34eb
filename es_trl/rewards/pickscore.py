"""Human preference: PickScore (https://huggingface.co/papers/2305.01569), and any CLIP checkpoint used like it."""

from __future__ import annotations

from .clip_features import ClipReward


class PickScore(ClipReward):
    """
    `exp(logit_scale) * cos(image, prompt)`, raw: about 18 to 26 for PickScore_v1.

    PickScore_v1 has no processor files and uses those of the LAION ViT-H-14 it came from.
    """

    default_checkpoint = "yuvalkirstain/PickScore_v1"
    __name__ = "pickscore"

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return (self.scorer.logit_scale * self.scorer.cosine(prompts, images)).tolist()

    def across(self, prompts, images):
        """`(B, P)`: the score of every image under every prompt."""
        return self.scorer.logit_scale * self.scorer.cosines(prompts, images)
