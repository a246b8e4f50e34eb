"""`es-trl`: the command line, and what the recipe scripts share with it."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "RunArguments": "arguments",
    "load_config": "arguments",
    "main": "main",
    "parse": "arguments",
    "run": "run",
}

__all__ = ["RunArguments", "load_config", "main", "parse", "run"]

if TYPE_CHECKING:
    from .arguments import RunArguments, load_config, parse
    from .main import main
    from .run import run


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value  # `run` and `main` are also the names of the modules that the import leaves here
    return value
