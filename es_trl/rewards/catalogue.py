"""What each named reward measures, in one line: the table of `es-trl reward list` and of the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardEntry:
    """One row."""

    name: str
    measures: str
    range: str
    checkpoint: str  # what is loaded by default
    licence: str  # of that checkpoint, as far as we could read it
    cost: str  # of one picture


_CLIP_B, _MIT = "openai/clip-vit-base-patch32", "MIT (OpenAI's CLIP)"
_PICK = "yuvalkirstain/PickScore_v1"
_PICK_LICENCE = "often given as MIT, which we could not confirm: read its card"

CATALOGUE = (
    RewardEntry("pickscore", "what people choose for the prompt", "about 18 to 26", _PICK, _PICK_LICENCE, "ViT-H/14"),
    RewardEntry("clip_text", "fits the prompt", "0 to 1, about .6 to .7", _CLIP_B, _MIT, "ViT-B/32"),
    RewardEntry("clip_aesthetic", "resembles fixed praise", "0 to 1, about .6", _CLIP_B, _MIT, "ViT-B/32"),
    RewardEntry("no_artifacts", "does not resemble fixed complaints", "0 to 1, about .4", _CLIP_B, _MIT, "ViT-B/32"),
    RewardEntry("pairwise", "share of its group that it beats, by PickScore", "0 to 1, .5 on average", _PICK,
                _PICK_LICENCE, "ViT-H/14"),
    RewardEntry("aesthetic", "looks good, by LAION's ratings", "about 4 to 7 (of 1 to 10)",
                "openai/clip-vit-large-patch14 + trl-lib/ddpo-aesthetic-predictor",
                "MIT + Apache-2.0 (LAION's repository)", "ViT-L/14"),
    RewardEntry("hpsv2", "what people choose for the prompt", "about .2 to .35", "xswu/HPSv2 (v2.1)", "Apache-2.0",
                "ViT-H/14"),
    RewardEntry("image_reward", "what people rate high for the prompt", "about -2 to 2", "zai-org/ImageReward",
                "Apache-2.0", "ViT-L/16 + BERT-base"),
    RewardEntry("jpeg_compressibility", "small as a JPEG", "below 0, in kB", "none", "none", "no network"),
    RewardEntry("jpeg_incompressibility", "large as a JPEG", "above 0, in kB", "none", "none", "no network"),
    RewardEntry("ocr", "shows the words in quotes", "0 to 1, none without quotes", "in the wheel of rapidocr",
                "Apache-2.0", "two small networks on the CPU"),
    RewardEntry("human", "wins people's votes within its group", "0 to 1, .5 on average", "none", "none", "your time"),
    RewardEntry("remote", "whatever your server computes", "the server's", "none", "the server's", "a request"),
    RewardEntry("vlm_judge", "what a vision-language model says", "0 to 1", "of your server", "of that model",
                "a request"),
)  # fmt: skip
