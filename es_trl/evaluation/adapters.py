"""Adapters to evaluate: found by name, labelled, described by their own files; no model is loaded here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import LORA_WEIGHTS_NAME
from ..hub.adapters import PEFT_FILE, find_adapter


LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
RUN_FILE = "es_config.json"


@dataclass(frozen=True)
class AdapterSource:
    """
    One adapter of an evaluation.

    Args:
        label (`str`): Its name in the table, unique.
        method (`str`): The name it shares with other training runs of the same method.
        source (`str`): What the user gave: a folder or a Hub id.
        file (`str`): Where it lies.
        sha256 (`str`): Of that file.
        rank, alpha (`int`, `float`), target_modules (`list[str]`): From its metadata; `None` without.
        run (`dict`, *optional*): The `es_config.json` beside it.
    """

    label: str
    method: str
    source: str
    file: str
    sha256: str
    rank: int | None
    alpha: float | None
    target_modules: list[str] | None
    run: dict[str, Any] | None

    @property
    def trained_rewards(self) -> dict[str, float]:
        """The rewards it was trained on with their weights; empty when nobody wrote that down."""
        names = (self.run or {}).get("reward_funcs") or []
        weights = (self.run or {}).get("reward_weights") or [1.0] * len(names)
        return dict(zip(names, weights, strict=False))

    def describe(self) -> dict[str, Any]:
        """Its entry in `eval.json`."""
        run, config = self.run or {}, (self.run or {}).get("config", {})
        training: dict[str, Any] = {
            name: run[name] for name in ("method", "base_model", "reward_funcs") if name in run
        }
        training |= {name: config[name] for name in ("seed", "max_steps", "es_space") if config.get(name) is not None}
        own = ("label", "method", "source", "sha256", "rank", "alpha", "target_modules")
        return {name: getattr(self, name) for name in own} | {"training": training or None}


def find_adapters(adapters: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None) -> list[AdapterSource]:
    """
    Finds and describes adapters.

    Args:
        adapters (`str`, `list[str]` or `dict`): Run folders, LoRA files or folders, or Hub ids. `"name=source"`
            (or a dict `{name: source or sources}`) names the method; sources of one name are training runs of one
            method, labelled name-1, name-2, ... Without names, a single one is "adapter", several are called after
            their folders.

    Raises:
        `ValueError`: nothing there, a file that is no LoRA, a label that cannot be a file name, or one adapter twice.
    """
    named = _named(adapters)
    methods = [method for method, _ in named]
    found: list[AdapterSource] = []
    for i, (method, source) in enumerate(named):
        several = methods.count(method) > 1
        label = f"{method}-{methods[:i].count(method) + 1}" if several else method
        if method == "base":
            raise ValueError(
                f"the adapter name 'base' cannot be used, a row of the table is called so: name it, mine={source}."
            )
        if not LABEL.fullmatch(label):
            raise ValueError(
                f"the adapter name {method!r} cannot be used: give up to 36 letters, digits, '.', '_' or '-'."
            )
        found.append(_describe(label, method, source))
    for attribute, what in (("label", "are both called"), ("sha256", "are the same file, sha256")):
        seen: dict[str, AdapterSource] = {}
        for adapter in found:
            key = getattr(adapter, attribute)
            if key in seen:
                fix = "name them with name=source" if attribute == "label" else "give each once"
                raise ValueError(f"the adapters {seen[key].source!r} and {adapter.source!r} {what} {key[:12]}: {fix}.")
            seen[key] = adapter
    return found


def _named(adapters: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None) -> list[tuple[str, str]]:
    """(name of the method, source) of each adapter."""
    if isinstance(adapters, Mapping):
        return [(str(name), source) for name, sources in adapters.items() for source in _listed(sources)]
    texts, pairs = _listed(adapters or ()), []
    for text in texts:
        name, equals, source = text.partition("=")
        if equals and "/" not in name and not os.path.exists(os.path.expanduser(text)):
            pairs.append((name, source))
        else:
            pairs.append(("adapter" if len(texts) == 1 else _folder_name(text), text))
    return pairs


def _listed(sources: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    return [os.fspath(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]


def _folder_name(source: str) -> str:
    path = Path(source).expanduser()
    if path.name in (LORA_WEIGHTS_NAME, PEFT_FILE):
        path = path.parent
    name = path.stem if path.suffix == ".safetensors" else path.resolve().name if path.exists() else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._")[:36] or "adapter"


def _describe(label: str, method: str, source: str) -> AdapterSource:
    path = find_adapter(source)
    folder = os.path.dirname(path)
    metadata, run = _metadata(path, source), None
    if os.path.isfile(os.path.join(folder, RUN_FILE)):
        try:
            run = json.loads(Path(folder, RUN_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder}/{RUN_FILE} is not JSON ({error}): remove it or restore it.") from error
        run = run if isinstance(run, dict) else None
    targets = metadata.get("target_modules")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return AdapterSource(
        label=label, method=method, source=source, file=path, sha256=digest, run=run,
        rank=metadata.get("r"), alpha=metadata.get("lora_alpha"),
        target_modules=sorted(targets) if isinstance(targets, list) else targets,
    )  # fmt: skip


def _metadata(path: str, source: str) -> dict[str, Any]:
    """What the file says of its LoRA, without the component's name before each key; empty for other people's files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text, names = (file.metadata() or {}).get("lora_adapter_metadata"), list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter {source!r}: {path!r} is not a readable safetensors file ({error}).") from error
    if not any("lora" in name for name in names):
        raise ValueError(f"adapter {source!r}: {path!r} holds no LoRA matrices.")
    try:
        data = json.loads(text) if text else {}
    except ValueError:
        return {}
    return {key.partition(".")[2]: value for key, value in data.items()} if isinstance(data, dict) else {}
