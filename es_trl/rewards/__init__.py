"""Rewards: what is optimised or measured. Plain callables `f(prompts, images, **columns) -> list[float | None]`.

Nothing heavy is imported until a name below is used.
"""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "ClipAesthetic": "clip_aesthetic",
    "ClipScorer": "clip_features",
    "ClipText": "clip_text",
    "NoArtifacts": "no_artifacts",
    "PickScore": "pickscore",
    "REWARD_NAMES": "registry",
    "RewardSet": "reward_set",
    "from_ddpo": "ddpo",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "parse_reward": "registry",
}

__all__ = [
    "REWARD_NAMES",
    "ClipAesthetic",
    "ClipScorer",
    "ClipText",
    "NoArtifacts",
    "PickScore",
    "RewardSet",
    "from_ddpo",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "parse_reward",
]

if TYPE_CHECKING:
    from .clip_aesthetic import ClipAesthetic
    from .clip_features import ClipScorer
    from .clip_text import ClipText
    from .ddpo import from_ddpo
    from .jpeg import jpeg_compressibility, jpeg_incompressibility
    from .no_artifacts import NoArtifacts
    from .pickscore import PickScore
    from .registry import REWARD_NAMES, parse_reward
    from .reward_set import RewardSet


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
