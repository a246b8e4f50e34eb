"""Trainers: a method is its config and its training step; everything else is shared."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "AdapterView": "adapter_view",
    "CheckpointCorrupt": "checkpoint",
    "DiffusionConfig": "config",
    "DiffusionTrainer": "base",
    "ESConfig": "es_config",
    "ESTrainer": "es",
}

__all__ = ["AdapterView", "CheckpointCorrupt", "DiffusionConfig", "DiffusionTrainer", "ESConfig", "ESTrainer"]

if TYPE_CHECKING:
    from .adapter_view import AdapterView
    from .base import DiffusionTrainer
    from .checkpoint import CheckpointCorrupt
    from .config import DiffusionConfig
    from .es import ESTrainer
    from .es_config import ESConfig


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
