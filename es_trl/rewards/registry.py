"""From a string in a config to a reward. Everything is checked before any model is loaded."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from es_trl import assets

from .checkpoints import HUB_ID


# name -> (module, attribute): built from a CLIP checkpoint, ...
_CLIP_REWARDS = {
    "clip_text": ("clip_text", "ClipText"),
    "clip_aesthetic": ("clip_aesthetic", "ClipAesthetic"),
    "no_artifacts": ("no_artifacts", "NoArtifacts"),
    "pickscore": ("pickscore", "PickScore"),
    "pairwise": ("pairwise", "Pairwise"),
    "aesthetic": ("aesthetic", "Aesthetic"),
}
# ... from a checkpoint of a format of its own, ...
_MODEL_REWARDS = {"hpsv2": ("hpsv2", "HPSv2"), "image_reward": ("image_reward", "ImageReward")}
# ... plain functions, ...
_PLAIN_REWARDS = {
    "jpeg_compressibility": ("jpeg", "jpeg_compressibility"),
    "jpeg_incompressibility": ("jpeg", "jpeg_incompressibility"),
}
# ... classes that are called without anything, and those that need the address of a server.
_OWN_REWARDS = {"ocr": ("ocr", "Ocr"), "human": ("human", "Human")}
_SERVER_REWARDS = {"remote": "remote:https://host/path", "vlm_judge": "vlm_judge:MODEL@https://host/v1"}
_JUDGE_MODES = ("yes_no", "score", "pairwise")
REWARD_NAMES = (*_CLIP_REWARDS, *_MODEL_REWARDS, *_PLAIN_REWARDS, *_OWN_REWARDS, *_SERVER_REWARDS)


@dataclass(frozen=True)
class NamedReward:
    """A reward that was asked for by a string and is not built yet."""

    spec: str  # the string, with the sha256 of the file where it names one
    name: str  # in metrics
    build: Callable  # build(device, dtype) loads what is needed and returns the callable


def parse_reward(spec: str) -> NamedReward:
    """
    Understand a reward given as a string, without loading a model.

    Args:
        spec (`str`): one of `REWARD_NAMES`; `name:checkpoint`; a shipped scorer, CLIP folder or Hub id `org/name`
            (scored like `pickscore`); `human:PORT`; `remote:URL`; `vlm_judge:MODEL@URL`, `vlm_judge:score:MODEL@URL`
            or `vlm_judge:pairwise:MODEL@URL`; `margin:` and one of the scorers before it (see [`Margin`]); or
            `path/to/file.py:function`, which runs that file.

    Raises:
        `ValueError`: the name is unknown (with the nearest known one), or the folder, file or function is missing.
    """
    text = spec.strip()
    name, colon, rest = text.partition(":")
    if name in _SERVER_REWARDS:
        return _server_reward(spec, name, rest)
    if name == "margin":
        return _margin(spec, rest)
    path, _, function = text.rpartition(":")
    if path.endswith(".py") or text.endswith(".py"):
        return _from_file(spec, path, function)
    if name == "human" and colon:
        if not rest.isdecimal() or not 0 < int(rest) < 65536:
            raise ValueError(f"reward {spec!r} in reward_funcs: write human, or human:PORT with a port such as 8123")
        return NamedReward(spec, name, lambda device, dtype: _attribute(*_OWN_REWARDS[name])(port=int(rest)))
    if name in _PLAIN_REWARDS or name in _OWN_REWARDS:
        if colon:
            raise ValueError(f"reward {spec!r} in reward_funcs: {name} takes no checkpoint, write {name!r}")
        if name in _PLAIN_REWARDS:
            return NamedReward(spec, name, lambda device, dtype: _attribute(*_PLAIN_REWARDS[name]))
        return NamedReward(spec, name, lambda device, dtype: _attribute(*_OWN_REWARDS[name])())
    where = (_CLIP_REWARDS | _MODEL_REWARDS).get(name)
    if where is None:
        name, colon, rest, where = os.path.basename(os.path.normpath(text)), ":", text, _CLIP_REWARDS["pickscore"]
    if where in _MODEL_REWARDS.values():
        if colon and not os.path.isdir(os.path.expanduser(rest)) and not HUB_ID.fullmatch(rest):
            raise ValueError(f"reward {spec!r} in reward_funcs: {rest!r} is neither a folder nor a Hub id 'org/name'")
    elif colon:
        _check_checkpoint(spec, rest)
    return NamedReward(spec, name, lambda device, dtype: _attribute(*where)(rest or None, device, dtype))


def _margin(spec: str, scorer: str) -> NamedReward:
    if not scorer:
        raise ValueError(f"reward {spec!r} in reward_funcs: name the scorer too, as in 'margin:pickscore'")
    inner = parse_reward(scorer)
    name = f"{inner.name}_margin"
    return NamedReward(
        spec, name, lambda device, dtype: _attribute("margin", "Margin")(inner.build(device, dtype), name)
    )


def _server_reward(spec: str, name: str, rest: str) -> NamedReward:
    """`remote` and `vlm_judge`. They are built at once: that opens no connection and finds a wrong address now."""
    mode, _, model_at = rest.partition(":")
    mode, model_at = (mode, model_at) if mode in _JUDGE_MODES else ("yes_no", rest)
    model, at, base = model_at.rpartition("@http")
    if not rest or (name == "vlm_judge" and not (model and at)):
        raise ValueError(f"reward {spec!r} in reward_funcs needs an address: {_SERVER_REWARDS[name]}")
    try:
        if name == "remote":
            built = _attribute("remote", "Remote")(rest)
        else:
            built = _attribute("vlm_judge", "VlmJudge")(model, f"http{base}", mode)
    except ValueError as error:
        raise ValueError(f"reward {name!r} in reward_funcs: {error}") from None
    return NamedReward(spec, built.__name__, lambda device, dtype: built)


def _attribute(module: str, attribute: str):
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


def _check_checkpoint(spec: str, checkpoint: str) -> None:
    """Refuse what cannot be a CLIP checkpoint: not a CLIP folder, not shipped, not shaped like a Hub id."""
    folder = os.path.expanduser(assets.resolve(checkpoint))
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise ValueError(
                f"reward {spec!r} in reward_funcs: the folder {folder!r} has no config.json of a CLIP model"
            )
    elif checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise ValueError(f"reward {spec!r} in reward_funcs: there is no folder {folder!r}")
    elif not HUB_ID.fullmatch(checkpoint):
        scorers = [name for name in assets.SHIPPED if os.path.isfile(assets.path(name, "config.json"))]
        known = [*REWARD_NAMES, *scorers]
        head = spec.strip().partition(":")[0]
        near = difflib.get_close_matches((checkpoint if head in known else head).lower(), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"reward {spec!r} in reward_funcs is unknown: {hint}Known are {', '.join(known)}; "
            "also a CLIP folder, a Hub id 'org/name', 'name:checkpoint' and 'file.py:function'"
        )


def _from_file(spec: str, path: str, function: str) -> NamedReward:
    """A callable of a local Python file. The file runs once; its folder is not put on `sys.path`."""
    if not path.endswith(".py"):
        raise ValueError(f"reward {spec!r} in reward_funcs: name the function too, as in '{spec.strip()}:my_reward'")
    file = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise ValueError(f"reward {spec!r} in reward_funcs: there is no file {file!r}")
    module_name = f"es_trl_user_rewards_{hashlib.blake2b(os.fsencode(file), digest_size=6).hexdigest()}"
    found: Any = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # dataclasses and pickling look their module up by name
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(
            f"reward {spec!r} in reward_funcs: {file!r} failed while it was imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found) or inspect.isclass(found):
        names = [name for name, value in vars(module).items() if callable(value) and not inspect.isclass(value)]
        near = difflib.get_close_matches(function, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names) or 'none'}"
        raise ValueError(f"reward {spec!r} in reward_funcs: {file!r} has no function {function!r}: {hint}")
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return NamedReward(f"{spec} (sha256 {digest})", function, lambda device, dtype: found)
