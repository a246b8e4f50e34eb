"""`es-trl`: the command line, and what the recipe scripts share with it."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "RunArguments": "arguments",
    "load_config": "arguments",
    "main": "commands",
    "parse": "arguments",
    "prepare": "training",
    "run": "training",
}

__all__ = ["RunArguments", "load_config", "main", "parse", "prepare", "run"]

if TYPE_CHECKING:
    from .arguments import RunArguments, load_config, parse
    from .commands import main
    from .training import prepare, run


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
