"""How any run survives and shows itself: checkpoints, stopping, processes, samples, trackers, pushing, results."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "CheckpointCorrupt": "checkpoint",
    "TrainingStopped": "stopping",
    "peak_memory_gb": "memory",
    "running": "live",
}

__all__ = ["CheckpointCorrupt", "TrainingStopped", "peak_memory_gb", "running"]

if TYPE_CHECKING:
    from .checkpoint import CheckpointCorrupt
    from .live import running
    from .memory import peak_memory_gb
    from .stopping import TrainingStopped


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
