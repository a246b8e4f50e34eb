"""The names of settings, read from the source: a wrong key or option is said before anything heavy is imported."""

import ast
import importlib.util
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import yaml

from ..names import hint
from ..trainer import METHODS


TRAINER = Path(__file__).parents[1] / "trainer"


def config_keys(method: str) -> set[str]:
    """The names of a method's settings, those of the Trainer too."""
    module, _, name = METHODS[method][0].partition(":")
    return set(_fields(TRAINER / f"{module}.py", name))


def read_config(path: str) -> dict:
    """The mapping in a YAML file. Raises `ValueError` with one line if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no config file {path!r}, and no recipe of that name: `es-trl recipes list` names them."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The config file {path!r} cannot be read as text: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(config).__name__}.")
    return config


def check_keys(path: str | None, config: dict, known: Iterable[str], method: str | None = None) -> None:
    """Raises `ValueError` for a key of a file that is no setting, with the nearest one, and the method that has it."""
    known = {*known, "env"}
    for key in config:
        if key not in known:
            near = hint(str(key), known) or "Remove it."
            owners = [other for other in METHODS if method not in (None, other) and str(key) in config_keys(other)]
            if owners:
                near = f"It belongs to method {' and '.join(owners)}, this is {method}. {near}"
            raise ValueError(f"{path}: unknown key {key!r}. {near}")
    variables = config.get("env")
    for name, value in variables.items() if isinstance(variables, dict) else ():
        if not str(name) or "=" in str(name) or "\0" in f"{name}{value}":
            found = f"env has {name!r}: {value!r}, which no environment variable can be"
            raise ValueError(f"{path}: {found}: rename or remove it.")


def check_options(args: Sequence[str], known: Iterable[str]) -> None:
    """Raises `ValueError` for an option that there is not, with the nearest one. `--no_NAME` is left to the parser."""
    known = {*known, "config"}
    for word in args:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name and not {name, name.removeprefix("no_")} & known:
            near = hint(name, known).replace("Did you mean '", "Did you mean '--")
            raise ValueError(f"there is no option {word.partition('=')[0]}. {near}".rstrip())


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
    package = importlib.util.find_spec(str(line.module))  # finds it and imports nothing
    assert package is not None and package.origin is not None
    return Path(package.origin).with_name("training_args.py")
