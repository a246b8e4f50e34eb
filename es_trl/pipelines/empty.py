"""Pipelines without weights: every class and every shape of a model, before anything large is downloaded."""

import functools
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from .. import assets
from .equal_blocks import kind_of
from .replaced import replaced


TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endif %}{% endfor %}"
)
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def known_shapes() -> dict[str, dict[str, Any]]:
    """The shapes that ship with the package, by the model's name: `pipeline`, `components` and their `source`."""
    files = sorted(Path(assets.path("shapes")).glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {shapes["model"]: shapes for shapes in found if "model" in shapes}


def empty_pipeline(
    model: str, dtype: torch.dtype = torch.float32, **model_init_kwargs: Any
) -> tuple[DiffusionPipeline, str]:
    """
    A pipeline on torch's "meta" device, and where its shapes are from. It shares its parts with other such pipelines.

    Args:
        model (`str`): A model whose shapes ship with the package; a shipped name, a folder, or a Hub id, of which
            only the configuration files are read. The tokenizer is in any case the small one that ships.
        dtype (`torch.dtype`, *optional*): Of the weights.
        **model_init_kwargs: `revision` and the like.

    Raises:
        `ValueError`: if no configuration can be had.
    """
    asked = {name: value for name, value in model_init_kwargs.items() if name in ("revision", "token")}
    shapes = known_shapes().get(model) or _read_shapes(model, asked)
    return build_pipeline(shapes, dtype, "meta"), shapes["source"]


def build_pipeline(shapes: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu") -> DiffusionPipeline:
    """A pipeline of these shapes ([`known_shapes`]): with random weights, or on the "meta" device without any."""
    parts: dict[str, Any] = {}
    for name, config in shapes["components"].items():
        if not isinstance(config, Mapping):
            parts[name] = config
            continue
        settings = {key: value for key, value in config.items() if key != "_class"}
        parts[name] = _component(name, config["_class"], settings, dtype, device)
    kind = getattr(diffusers, shapes["pipeline"])
    expected, _ = kind._get_signature_keys(kind)
    parts |= {name: None for name in OPTIONAL if name in expected and name not in parts}
    if "safety_checker" in expected:
        parts["requires_safety_checker"] = False
    if device == "meta":  # times and latents have numbers; a pipeline would make them where its weights are
        here = {"_execution_device": property(lambda self: torch.device("cpu"))}
        kind = type(kind.__name__, (kind,), here)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def no_starting_values() -> AbstractContextManager[None]:
    """Inside, new layers keep what is in their memory: weights without numbers need none to start from."""
    own = [name for name, value in vars(nn.init).items() if name.endswith("_") and callable(value)]
    return replaced(nn.init, **dict.fromkeys(own, lambda tensor, *_args, **_kwargs: tensor))


def shorten(module: nn.Module) -> dict[str, int]:
    """
    Keeps two of every long row of equal blocks; by the name of the second one, how often it stands there in truth.
    What a block takes and does is the same for all of them, and two can be gone through in no time.
    """
    stands: dict[str, int] = {}
    for name, blocks in list(module.named_modules()):
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 4 and len({kind_of(block) for block in blocks}) == 1:
            stands[f"{name}.1"] = len(blocks) - 1
            del blocks[2:]
    return stands


def standing(name: str, stands: Mapping[str, int]) -> int:
    """How often the part `name` of a shortened module stands in the whole one."""
    return math.prod(count for block, count in stands.items() if name == block or name.startswith(f"{block}."))


def _component(name: str, class_name: str, config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    if name.startswith(("tokenizer", "processor")):
        made = transformers.AutoTokenizer.from_pretrained(assets.resolve("tiny-pickscore"))
        made.model_max_length, made.chat_template = config.get("model_max_length", 77), TEMPLATE
        return made
    if name == "scheduler":
        return getattr(diffusers, class_name).from_config(config)
    if device == "meta":
        return _without_numbers(class_name, json.dumps(config, default=str), dtype)
    return _made(class_name, config, dtype, device)


@functools.lru_cache(maxsize=16)
def _without_numbers(class_name: str, config: str, dtype: torch.dtype) -> nn.Module:
    """Models have text encoders and autoencoders in common."""
    with no_starting_values():
        return _made(class_name, json.loads(config), dtype, "meta")


def _made(class_name: str, config: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if hasattr(diffusers, class_name):
                made = getattr(diffusers, class_name).from_config(config)
            else:
                kind = getattr(transformers, class_name)
                made = kind(kind.config_class(**config))
    finally:
        torch.set_default_dtype(before)
    return made.eval().requires_grad_(False)


def _read_shapes(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """As the files that ship, of a folder or of the Hub, where only the small files are asked for."""
    source = assets.resolve(model)
    try:
        index = DiffusionPipeline.load_config(source, **options)
        components: dict[str, Any] = {}
        for name, entry in index.items():
            if not isinstance(entry, list | tuple) or len(entry) != 2 or entry[0] is None:
                components |= {} if name.startswith("_") or isinstance(entry, list) else {name: entry}
                continue
            library, class_name = entry
            config: dict[str, Any] = {}
            if hasattr(getattr(diffusers, class_name, None), "load_config"):
                config = dict(getattr(diffusers, class_name).load_config(source, subfolder=name, **options))
            elif not name.startswith("tokenizer"):
                config = transformers.AutoConfig.from_pretrained(source, subfolder=name, **options).to_dict()
            components[name] = {"_class": class_name, **config}
    except (OSError, KeyError, AttributeError) as error:
        known = ", ".join(known_shapes())
        raise ValueError(
            f"The configuration of {model!r} cannot be read ({str(error).splitlines()[0]}). Shapes of these models "
            f"ship with the package: {known}."
        ) from error
    return {"pipeline": index["_class_name"], "components": components, "source": "its configuration files"}
