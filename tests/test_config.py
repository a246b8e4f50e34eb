"""Configs explain themselves: help, docstring and defaults agree, and each field is exercised by some test."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from es_trl.trainer import DiffusionConfig, ESConfig


ROOT = Path(__file__).resolve().parent.parent


def own_fields(config: type) -> list[dataclasses.Field]:
    """The fields that this class itself adds or gives another default."""
    return [f for f in dataclasses.fields(config) if f.name in vars(config).get("__annotations__", {})]


OWN = [(config, field) for config in (DiffusionConfig, ESConfig) for field in own_fields(config)]
IDS = [f"{config.__name__}.{field.name}" for config, field in OWN]


def documented_default(config: type, name: str) -> str | None:
    """The default that the class docstring states, `None` for a bare *optional*; fails without an entry."""
    entry = re.search(rf"^    *{name} \((.*)\):$", inspect.getdoc(config), flags=re.M)
    assert entry, f"{config.__name__}'s docstring has no entry `{name} (...):`"
    stated = re.search(r"defaults to `(.*)`", entry.group(1))
    assert stated or "*optional*" in entry.group(1), entry.group(0)
    return stated.group(1) if stated else None


@pytest.mark.parametrize(("config", "field"), OWN, ids=IDS)
def test_field_explains_itself(config, field):
    assert field.metadata.get("help", "").strip().endswith("."), "help is a sentence"
    stated = documented_default(config, field.name)
    assert (ast.literal_eval(stated) if stated else None) == field.default


def test_help_can_be_printed():
    """argparse formats help with `%`: a bare percent sign would break `--help` for every user."""
    text = HfArgumentParser(ESConfig).format_help()
    for _, field in OWN:
        assert f"--{field.name}" in text


def test_every_field_is_exercised():
    """Some test sets each field: an option that nothing ever turned on is an option that does not work."""
    used = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword):
                used.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # a dict key, `--field` of a command line, or `field: value` in a YAML text; not a word of a sentence
                used.update(re.findall(r"^(?:--)?(\w+)$", node.value))
                used.update(re.findall(r"^(\w+):", node.value, flags=re.M))
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for _, field in OWN} - used - inherited == set()
