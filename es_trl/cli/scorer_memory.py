"""What the rewards' own models take of a GPU's memory, from their shapes."""

import functools
import json
import os
from pathlib import Path

import torch
import transformers

from .. import assets
from ..pipelines import LiveBytes, equal_blocks_once, no_starting_values
from ..rewards import CATALOGUE


SCORED_AT_ONCE = 64  # pictures, as ClipScorer has it on a GPU


def checkpoint_of(spec: str) -> str | None:
    """What a reward loads; None if it loads nothing on the GPU."""
    name, _, rest = spec.removeprefix("margin:").partition(":")
    entry = next((entry for entry in CATALOGUE if entry.name == name), None)
    if entry is None:
        return None if ".py" in spec else spec
    elsewhere = entry.checkpoint in ("none", "the server's", "of your server") or name == "ocr"
    return None if elsewhere else rest or entry.checkpoint


@functools.lru_cache(maxsize=16)
def scorer_memory(checkpoint: str, dtype: str) -> tuple[float, float] | None:
    """GB of a scorer, and of the activations of one batch of pictures; None if its shape is not known here."""
    known = json.loads(Path(assets.path("shapes", "rewards.json")).read_text(encoding="utf-8"))
    settings = known.get(checkpoint.split(" + ")[0])
    folder = assets.resolve(checkpoint)
    if settings is None and os.path.isfile(os.path.join(folder, "config.json")):
        settings = transformers.AutoConfig.from_pretrained(folder).to_dict()
    if settings is None:
        return None
    with torch.device("meta"), no_starting_values():
        model = transformers.CLIPModel(transformers.CLIPConfig(**settings)).eval().requires_grad_(False)
        model = model.to(getattr(torch, dtype))
    size, live = model.config.vision_config.image_size, LiveBytes()
    with torch.no_grad(), live, equal_blocks_once(live, [model]):
        pixels = torch.empty(SCORED_AT_ONCE, 3, size, size, dtype=model.dtype, device="meta")
        model.get_image_features(pixel_values=pixels)
    return sum(value.nbytes for value in model.state_dict().values()) / 1e9, live.peak / 1e9
