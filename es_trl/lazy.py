"""Public names of a package that are imported when they are first used; one list of them, which editors read too."""

import ast
import difflib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def attach(
    package: str, file: str, more: Mapping[str, str] | None = None
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]], dict[str, str]]:
    """
    Serves the names that a package's `__init__.py` imports `if TYPE_CHECKING:` when they are asked for. `package` is
    its `__name__`, `file` its `__file__`, `more` further names with the modules (`".es"`) that have them.

    Returns:
        `__all__`, `__getattr__`, `__dir__`, and each name's module.
    """
    table = dict(more or {})
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for found in (line for line in node.body if isinstance(line, ast.ImportFrom)):
                module = "." * found.level + (found.module or "")
                table |= {alias.asname or alias.name: module for alias in found.names}
    names = sorted(table)

    def get(name: str) -> Any:
        if name not in table:
            near = difflib.get_close_matches(name, names, n=1) if not name.startswith("_") else ()
            hint = f" Did you mean `{near[0]}`?" if near else f" Public names: {', '.join(names)}."
            raise AttributeError(f"module `{package}` has no name `{name}`.{hint}")
        value = getattr(importlib.import_module(table[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return names, get, names_of_package, table
