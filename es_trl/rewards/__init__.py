"""Rewards: what is optimised or measured. Plain callables `f(prompts, images, **columns) -> list[float | None]`.

Nothing heavy is imported until a name below is used.
"""

from typing import TYPE_CHECKING

from ..lazy import attach


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

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
