"""From a model name to a pipeline: shipped models by name, folders, Hub ids."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .. import assets
from ..names import hint
from .generators import GeneratorPipeline


logger = logging.getLogger(__name__)


def load_pipeline(
    model: str | os.PathLike[str], dtype: torch.dtype | None = None, **model_init_kwargs: Any
) -> DiffusionPipeline:
    """
    Loads a diffusers pipeline from safetensors.

    Args:
        model (`str` or `PathLike`): A shipped name (`"tiny-sana-sprint"`), a folder, or a Hub id.
        dtype (`torch.dtype`, *optional*): Weights' dtype; fp32 by default.
        **model_init_kwargs: Passed on to `DiffusionPipeline.from_pretrained` (`revision`, `variant`, ...).

    Raises:
        `ValueError`: if nothing loads under that name, or the pipeline has no LoRA loader.
    """
    model = os.fspath(model)
    source = assets.resolve(model)
    if "/" not in source and not os.path.isdir(source):  # ids on the Hub have an owner: nothing is asked there
        near = hint(model, assets.SHIPPED)
        raise ValueError(f"There is no model {model!r}. {near}{' ' if near else ''}{_what_helps()}")
    kwargs = {"use_safetensors": True, "dtype": dtype or torch.float32} | model_init_kwargs
    logger.info("loading %s", model)
    try:
        with _without_bars():
            pipe = DiffusionPipeline.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        refused = _why_refused(model, error)
        if refused:
            raise ValueError(refused) from error
        raise ValueError(
            f"No diffusers pipeline could be loaded from {model!r} ({str(error).splitlines()[0]}). {_what_helps()}"
        ) from error
    check_pipeline(pipe)
    return pipe


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, diffusers and transformers draw no bars for the parts they load: one line says what is loaded."""
    libraries = [(library, library.is_progress_bar_enabled()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, enabled in libraries:
            if enabled:
                library.enable_progress_bar()


def _what_helps() -> str:
    shipped = ", ".join(name for name in assets.SHIPPED if os.path.isfile(assets.path(name, "model_index.json")))
    return f"Give a folder with a model_index.json, a Hub id you have access to, or a shipped model ({shipped})."


def _why_refused(model: str, error: BaseException | None) -> str | None:
    """What to do where the Hub refuses a model to this login; None where `error` came of something else."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    while error is not None:
        if isinstance(error, GatedRepoError):
            return (
                f"The model {model!r} is gated: accept the licence at {constants.ENDPOINT}/{model} and log in with "
                "`hf auth login` (or set HF_TOKEN)."
            )
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"The Hub shows no model {model!r} to this login: check the name, or if it is private log in with "
                "`hf auth login` (or set HF_TOKEN)."
            )
        error = error.__cause__ or error.__context__
    return None


def empty_denoiser(model: str, **kwargs: Any) -> tuple[str, torch.nn.Module]:
    """
    The name of the denoiser of `model` (as in [`load_pipeline`]), and the denoiser without its weights: only
    configurations are read; `kwargs` are for `load_config` (`revision`, ...).

    Raises:
        `ValueError`: if there is no such pipeline, or it has no LoRA loader.
    """
    source = assets.resolve(model)
    try:
        index = DiffusionPipeline.load_config(source, **kwargs)
        pipeline_class = getattr(diffusers, index["_class_name"])
        check_pipeline_class(pipeline_class)
        name = pipeline_class._lora_loadable_modules[0]
        denoiser_class = getattr(diffusers, index[name][1])
        config = denoiser_class.load_config(source, subfolder=name, **kwargs)
    except (OSError, KeyError, AttributeError) as error:
        reason = f"The configuration of {model!r} cannot be read ({str(error).splitlines()[0]})."
        raise ValueError(_why_refused(model, error) or reason) from error
    with torch.device("meta"):
        return name, denoiser_class.from_config(config)


def check_pipeline(pipe: Any) -> None:
    """Raises `ValueError` for a pipeline whose LoRA could not be loaded again with `load_lora_weights`."""
    if isinstance(pipe, GeneratorPipeline):
        return
    check_pipeline_class(type(pipe))
    denoiser_of(pipe)


def check_pipeline_class(pipeline_class: type) -> None:
    """As [`check_pipeline`], before there is one."""
    if not issubclass(pipeline_class, LoraBaseMixin):
        raise ValueError(
            f"{pipeline_class.__name__} has no LoRA loader (load_lora_weights), so an adapter trained on it could not "
            "be used. Choose a class with one, for example SanaSprintPipeline or StableDiffusionPipeline, or give an "
            "object of your own with `module` and `generate(prompts, generators)` that calls this pipeline."
        )


def denoiser_of(pipe: Any) -> str:
    """
    The name of the part that LoRA goes on: the first of the class's loadable parts that is no text encoder.

    Raises:
        `ValueError`: if the pipeline has none of them.
    """
    found = lora_parts(pipe)
    if not found:
        names = [name for name in pipe._lora_loadable_modules if not name.startswith("text_encoder")]
        raise ValueError(
            f"{type(pipe).__name__} says that LoRA goes on {', '.join(names) or 'its text encoder'}, but it has only "
            f"{', '.join(name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module))}: "
            "correct its _lora_loadable_modules, or load the missing part."
        )
    return found[0]


def lora_parts(pipe: Any) -> list[str]:
    """The names of all parts that are no text encoder and that its LoRA loader would put LoRA on."""
    names = [name for name in pipe._lora_loadable_modules if not name.startswith("text_encoder")]
    return [name for name in names if isinstance(getattr(pipe, name, None), torch.nn.Module)]
