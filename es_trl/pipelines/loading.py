"""From a model name to a pipeline: shipped models by name, folders, Hub ids."""

import os

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin

from .. import assets


def load_pipeline(model: str, dtype: torch.dtype | None = None, **model_init_kwargs) -> DiffusionPipeline:
    """
    Loads a diffusers pipeline from safetensors.

    Args:
        model (`str`): A shipped name (`"tiny-sana-sprint"`), a folder, or a Hub id.
        dtype (`torch.dtype`, *optional*): Weights' dtype; fp32 by default.
        **model_init_kwargs: Passed on to `DiffusionPipeline.from_pretrained` (`revision`, `variant`, ...).

    Raises:
        `ValueError`: if nothing loads under that name, or the pipeline has no LoRA loader.
    """
    source = assets.resolve(model)
    kwargs = {"use_safetensors": True, "dtype": dtype or torch.float32} | model_init_kwargs
    try:
        pipe = DiffusionPipeline.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        shipped = ", ".join(name for name in assets.SHIPPED if os.path.isfile(assets.path(name, "model_index.json")))
        raise ValueError(
            f"No diffusers pipeline could be loaded from {model!r} ({str(error).splitlines()[0]}). Give a folder with "
            f"a model_index.json, a Hub id you have access to, or a shipped model ({shipped})."
        ) from error
    check_pipeline(pipe)
    return pipe


def check_pipeline(pipe) -> None:
    """Raises `ValueError` for a pipeline whose LoRA could not be loaded again with `load_lora_weights`."""
    if not isinstance(pipe, LoraBaseMixin):
        raise ValueError(
            f"{type(pipe).__name__} has no LoRA loader (load_lora_weights), so an adapter trained on it could not be "
            "used. Choose a pipeline class with one, for example SanaSprintPipeline or StableDiffusionPipeline."
        )
