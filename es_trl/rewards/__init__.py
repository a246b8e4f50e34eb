"""Rewards: what is optimised or measured. Plain callables `f(prompts, images, **columns) -> list[float | None]`.

Nothing heavy is imported until a name below is used.
"""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "Aesthetic": "aesthetic",
    "CATALOGUE": "catalogue",
    "ClipAesthetic": "clip_aesthetic",
    "ClipScorer": "clip_features",
    "ClipText": "clip_text",
    "HPSv2": "hpsv2",
    "Human": "human",
    "ImageReward": "image_reward",
    "Margin": "margin",
    "NamedReward": "registry",
    "NoArtifacts": "no_artifacts",
    "Ocr": "ocr",
    "Pairwise": "pairwise",
    "PendingScores": "reward_set",
    "PickScore": "pickscore",
    "REWARD_NAMES": "registry",
    "Remote": "remote",
    "RewardSet": "reward_set",
    "VlmJudge": "vlm_judge",
    "from_ddpo": "ddpo",
    "has_margin": "margin",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "parse_reward": "registry",
}

__all__ = [
    "REWARD_NAMES",
    "Aesthetic",
    "CATALOGUE",
    "ClipAesthetic",
    "ClipScorer",
    "ClipText",
    "HPSv2",
    "Human",
    "ImageReward",
    "Margin",
    "NamedReward",
    "NoArtifacts",
    "Ocr",
    "Pairwise",
    "PendingScores",
    "PickScore",
    "Remote",
    "RewardSet",
    "VlmJudge",
    "from_ddpo",
    "has_margin",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "parse_reward",
]

if TYPE_CHECKING:
    from .aesthetic import Aesthetic
    from .catalogue import CATALOGUE
    from .clip_aesthetic import ClipAesthetic
    from .clip_features import ClipScorer
    from .clip_text import ClipText
    from .ddpo import from_ddpo
    from .hpsv2 import HPSv2
    from .human import Human
    from .image_reward import ImageReward
    from .jpeg import jpeg_compressibility, jpeg_incompressibility
    from .margin import Margin, has_margin
    from .no_artifacts import NoArtifacts
    from .ocr import Ocr
    from .pairwise import Pairwise
    from .pickscore import PickScore
    from .registry import REWARD_NAMES, NamedReward, parse_reward
    from .remote import Remote
    from .reward_set import PendingScores, RewardSet
    from .vlm_judge import VlmJudge


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
