"""The settings that a config class has, read from its source: a wrong key is said before anything is imported."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

from ..trainer import METHODS


TRAINER = Path(__file__).parents[1] / "trainer"


def config_keys(method: str) -> set[str]:
    """The names of a method's settings, those of the Trainer too."""
    module, _, name = METHODS[method][0].partition(":")
    return set(_fields(TRAINER / f"{module}.py", name))


@cache
def _fields(path: Path, name: str) -> frozenset[str]:
    """The annotated names of a class and of the classes that it is made of, as `dataclasses.fields` gives them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    names = (ast.unparse(line.target) for line in found.body if isinstance(line, ast.AnnAssign))
    fields = frozenset(own for own in names if not own.startswith("_"))
    for base in (base.id for base in found.bases if isinstance(base, ast.Name)):
        for line in (line for line in tree.body if isinstance(line, ast.ImportFrom)):
            if base in {alias.name for alias in line.names}:
                fields |= _fields(_source(path, line), base)
    return fields


def _source(path: Path, line: ast.ImportFrom) -> Path:
    if line.level:
        return path.parents[line.level - 1] / f"{(line.module or '').replace('.', '/')}.py"
    package = importlib.util.find_spec(line.module)  # finds it and imports nothing
    return Path(package.origin).with_name("training_args.py")
