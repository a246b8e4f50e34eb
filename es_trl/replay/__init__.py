"""A run proven and redrawn from its journal."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "ReplayError": "replay",
    "Verification": "replay",
    "redraw_member": "replay",
    "verify_run": "replay",
}

__all__ = ["ReplayError", "Verification", "redraw_member", "verify_run"]

if TYPE_CHECKING:
    from .replay import ReplayError, Verification, redraw_member, verify_run


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
