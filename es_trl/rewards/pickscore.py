"""Human preference: PickScore (https://huggingface.co/papers/2305.01569), and any CLIP checkpoint used like it."""

from __future__ import annotations

from .clip_features import get_scorer


class PickScore:
    """
    `exp(logit_scale) * cos(image, prompt)`, raw: about 18 to 26 for PickScore_v1.

    Args:
        checkpoint (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            A CLIP checkpoint. PickScore_v1 has no processor files and uses those of the LAION ViT-H-14 it came from.
        device, dtype: see `ClipScorer`.
    """

    default_checkpoint = "yuvalkirstain/PickScore_v1"
    __name__ = "pickscore"
    rises_with_steps = True

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None):
        self.scorer = get_scorer(checkpoint or self.default_checkpoint, device, dtype)

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return (self.scorer.logit_scale * self.scorer.cosine(prompts, images)).tolist()

    def across(self, prompts, images):
        """`(B, P)`: the score of every image under every prompt."""
        return self.scorer.logit_scale * self.scorer.cosines(prompts, images)
