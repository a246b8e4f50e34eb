"""`rerun.yaml` of a run folder: what was asked for, from the file and the command line, ready to run again."""

import dataclasses
import os
from typing import Any

import yaml

from ..files import write_text
from ..trainer import DiffusionConfig
from .arguments import RunArguments


FILE = "rerun.yaml"


def write_rerun(arguments: RunArguments, config: DiffusionConfig) -> str:
    """
    Writes every argument that is not at its default, and returns the path; `es-trl train --config RUN/rerun.yaml` is
    then the same run.
    """
    own = {name: kind for name, kind in config.changes().items() if kind == "process"}
    chosen = _chosen(arguments) | {k: v for k, v in _chosen(config).items() if k not in own}
    path = os.path.join(config.output_dir, FILE)
    text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
    write_text(path, f"# es-trl train --config rerun.yaml --output_dir NEW_FOLDER\n{text}")
    return path


def _chosen(values: Any) -> dict[str, Any]:
    """Fields of a dataclass that are not at their default, as plain data."""
    found = {}
    for field in dataclasses.fields(values):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = _plain(getattr(values, field.name))
        if field.init and value != _plain(default):
            resolved = field.name == "report_to" and value == []
            found[field.name] = "none" if resolved else value
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = getattr(value, "value", value)  # enumerations of the Trainer
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
