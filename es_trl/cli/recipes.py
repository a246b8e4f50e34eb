"""`es-trl recipes`: the configs that come with the package, by name, for `--config` and for copying."""

import argparse
import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .messages import refuse


def recipes() -> dict[str, Path]:
    """
    Name to file: `sana_sprint/es` for `recipes/sana_sprint/es/config.yaml`, and the file's name in place of
    `config.yaml` where a method has several (`tiny_sana_sprint/es/config_long`).
    """
    package = Path(__file__).parents[1]
    shipped = package / "recipes"  # of a wheel; in a clone they are beside the package
    folder = shipped if shipped.is_dir() else package.parent / "recipes"
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.glob("*/*/*.yaml")}
    return {name.removesuffix("/config"): path for name, path in sorted(names.items())}


def with_recipes(args: Sequence[str]) -> list[str]:
    """`args` with the file of a recipe in place of its name after `--config`; a file of that name comes first."""
    known, found = recipes(), list(args)
    for i, word in enumerate(found):
        option, equals, name = word.partition("=")
        if word == "--config" and i + 1 < len(found):
            found[i + 1] = _file(found[i + 1], known)
        elif option == "--config" and equals:
            found[i] = f"--config={_file(name, known)}"
    return found


def _file(name: str, known: dict[str, Path]) -> str:
    return name if os.path.isfile(name) else str(known.get(name, name))


def _purpose(path: Path) -> str:
    """The first sentence of the comment that the file begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def main(argv: Sequence[str]) -> int:
    """Lists the recipes, or copies one to edit; what cannot be copied is one line and exit code 2."""
    parser = argparse.ArgumentParser("es-trl recipes", description=f"{__doc__}")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names and what they are for")
    copy = actions.add_parser("copy", help="a copy to edit: es-trl recipes copy sana_sprint/es my.yaml")
    copy.add_argument("name", choices=list(recipes()), metavar="name", help="as listed")
    copy.add_argument("to", nargs="?", default="config.yaml", help="file to write (config.yaml); it must be new")
    arguments = parser.parse_args(argv)
    if arguments.action == "list":
        known = recipes()
        width = max(map(len, known), default=0)
        for name, path in known.items():
            sys.stdout.write(f"{name:<{width}}  {_purpose(path)}\n")
        return 0
    try:
        with open(arguments.to, "xb") as file, open(recipes()[arguments.name], "rb") as source:
            shutil.copyfileobj(source, file)
    except OSError as error:
        return refuse("recipes", f"{arguments.to} cannot be written: {error.strerror}")
    sys.stdout.write(f"{arguments.to}: es-trl train --config {arguments.to}\n")
    return 0
