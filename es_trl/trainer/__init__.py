"""Trainers: a method is its config and its training step; everything else is shared."""

import difflib
from typing import TYPE_CHECKING

from ..lazy import attach


# method -> its config and its trainer, as `module:class` of this room; also the order in which methods are listed
METHODS = {
    "es": ("es_config:ESConfig", "es:ESTrainer"),
    "ddpo": ("ddpo_config:DDPOConfig", "ddpo:DDPOTrainer"),
    "grpo": ("grpo_config:GRPOConfig", "grpo:GRPOTrainer"),
    "pref_grpo": ("pref_grpo_config:PrefGRPOConfig", "pref_grpo:PrefGRPOTrainer"),
    "dpo": ("dpo_config:DiffusionDPOConfig", "dpo:DiffusionDPOTrainer"),
}

if TYPE_CHECKING:
    from .base import DiffusionTrainer
    from .config import DiffusionConfig
    from .ddpo import DDPOTrainer
    from .ddpo_config import DDPOConfig
    from .dpo import DiffusionDPOTrainer
    from .dpo_config import DiffusionDPOConfig
    from .es import ESTrainer
    from .es_config import ESConfig
    from .gradient_config import GradientConfig
    from .gradient_trainer import GradientTrainer
    from .grpo import GRPOTrainer
    from .grpo_config import GRPOConfig
    from .inputs import AdapterView
    from .policy_gradient import PolicyGradientTrainer
    from .policy_gradient_config import PolicyGradientConfig
    from .pref_grpo import PrefGRPOTrainer
    from .pref_grpo_config import PrefGRPOConfig

__all__, __getattr__, __dir__, _ = attach(
    __name__,
    __file__,
    {name: f".{module}" for pair in METHODS.values() for module, _, name in (text.partition(":") for text in pair)},
)
__all__ += ["METHODS", "check_method", "config_of", "trainer_of"]


def check_method(method: str) -> str:
    """The method, without importing it. Raises `ValueError` for an unknown one."""
    if not isinstance(method, str) or method not in METHODS:  # a config file may hold anything
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.{hint}")
    return method


def config_of(method: str) -> "type[DiffusionConfig]":
    """The config class of a method, without its trainer. Raises `ValueError` for an unknown one."""
    return __getattr__(METHODS[check_method(method)][0].partition(":")[2])


def trainer_of(method: str) -> "type[DiffusionTrainer]":
    """The trainer class of a method. Raises `ValueError` for an unknown one."""
    return __getattr__(METHODS[check_method(method)][1].partition(":")[2])
