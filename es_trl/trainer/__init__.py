"""Trainers: a method is its config and its training step; everything else is shared."""

import difflib
import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "AdapterView": "adapter_view",
    "DDPOConfig": "ddpo_config",
    "DDPOTrainer": "ddpo",
    "DiffusionConfig": "config",
    "DiffusionDPOConfig": "dpo_config",
    "DiffusionDPOTrainer": "dpo",
    "DiffusionTrainer": "base",
    "ESConfig": "es_config",
    "ESTrainer": "es",
    "GRPOConfig": "grpo_config",
    "GRPOTrainer": "grpo",
    "GradientConfig": "gradient_config",
    "GradientTrainer": "gradient_trainer",
    "PolicyGradientConfig": "policy_gradient_config",
    "PolicyGradientTrainer": "policy_gradient",
    "PrefGRPOConfig": "pref_grpo_config",
    "PrefGRPOTrainer": "pref_grpo",
}

# method -> names of its config and its trainer
METHODS = {
    "es": ("ESConfig", "ESTrainer"),
    "ddpo": ("DDPOConfig", "DDPOTrainer"),
    "grpo": ("GRPOConfig", "GRPOTrainer"),
    "pref_grpo": ("PrefGRPOConfig", "PrefGRPOTrainer"),
    "dpo": ("DiffusionDPOConfig", "DiffusionDPOTrainer"),
}

__all__ = [
    "METHODS",
    "AdapterView",
    "DDPOConfig",
    "DDPOTrainer",
    "DiffusionConfig",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionTrainer",
    "ESConfig",
    "ESTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "GradientConfig",
    "GradientTrainer",
    "PolicyGradientConfig",
    "PolicyGradientTrainer",
    "PrefGRPOConfig",
    "PrefGRPOTrainer",
    "method_classes",
]

if TYPE_CHECKING:
    from .adapter_view import AdapterView
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
    from .policy_gradient import PolicyGradientTrainer
    from .policy_gradient_config import PolicyGradientConfig
    from .pref_grpo import PrefGRPOTrainer
    from .pref_grpo_config import PrefGRPOConfig


def method_classes(method: str) -> "tuple[type[DiffusionConfig], type[DiffusionTrainer]]":
    """The config class and the trainer class of a method. Raises `ValueError` for an unknown one."""
    if not isinstance(method, str) or method not in METHODS:  # a config file may hold anything
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.{hint}")
    config, trainer = METHODS[method]
    return __getattr__(config), __getattr__(trainer)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
