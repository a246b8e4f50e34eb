"""`es-trl export RUN --format F`: an adapter for other programs, or merged into its base model."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .messages import refuse


FORMATS = ("diffusers", "comfyui", "kohya", "merged")


def main(argv: Sequence[str]) -> int:
    """Writes a `.safetensors` file, or for `merged` a folder, and prints its path."""
    parser = argparse.ArgumentParser(
        "es-trl export",
        description="Writes an adapter in the names of another program, always at the strength it was trained at.",
    )
    parser.add_argument("adapter", help="a run folder, a LoRA file or folder, or a Hub id")
    parser.add_argument("--format", required=True, choices=FORMATS, help="merged is a whole pipeline for diffusers")
    parser.add_argument("--output", help="by default RUN/export/NAME-FORMAT.safetensors, or the folder NAME-merged")
    parser.add_argument("--model", help="the base model; by default what the run folder says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of merged; by default the run's")
    parser.add_argument("--allow_partial", action="store_true", help="leave out what is not the denoiser's")
    try:
        path = export(**vars(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        return refuse("export", error)
    sys.stdout.write(f"{path}\n")
    return 0


def export(
    adapter: str,
    format: str,
    output: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    allow_partial: bool = False,
) -> str:
    """
    Writes `adapter` (a run folder, a LoRA file or folder, or a Hub id) for another program, by default below its
    folder, and returns the path. Base model and the dtype of `"merged"` are by default what the run folder says; for
    all other formats only the model's configuration is read.

    Raises:
        `ValueError`: the program has no such model, or the adapter does not fit the base model.
    """
    from safetensors.torch import save_file

    from ..hub import find_adapter
    from ..pipelines import empty_denoiser, export_tensors, read_lora

    file = find_adapter(adapter)
    run = _run(os.path.dirname(file))
    model = model or run.get("base_model")
    if not model:
        raise ValueError("--model is missing, and no run folder says what the adapter was trained on.")
    denoiser_name, denoiser = empty_denoiser(model)
    lora = read_lora(file, denoiser)
    strange = lora.strange + [pair.name for pair in lora.pairs if pair.layer is None]
    if strange and not allow_partial:
        raise ValueError(
            f"{file!r} holds {', '.join(strange[:3])}, no matrices of {model}; to leave them out, --allow_partial."
        )
    lora.pairs = [pair for pair in lora.pairs if pair.layer is not None]
    name = os.path.basename(os.path.dirname(os.path.abspath(file)))
    ending = "-merged" if format == "merged" else f"-{format}.safetensors"
    output = output or os.path.join(os.path.dirname(file), "export", name + ending)
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    if format == "merged":
        _merge(model, lora.state_dict(denoiser_name), dtype or run.get("config", {}).get("dtype"), output)
        return output
    if format == "diffusers":
        tensors = {name: value.float().contiguous() for name, value in lora.state_dict(denoiser_name).items()}
    else:
        tensors = export_tensors(denoiser, lora.pairs, format)
    save_file(tensors, output, metadata={"format": "pt"})
    return output


def _merge(model: str, tensors: dict, dtype: str | None, output: str) -> None:
    import torch

    from ..pipelines import load_pipeline

    pipe = load_pipeline(model, getattr(torch, dtype or "float32"))
    pipe.load_lora_weights(tensors)
    pipe.fuse_lora(components=[pipe._lora_loadable_modules[0]])
    pipe.unload_lora_weights()
    pipe.save_pretrained(output)


def _run(folder: str) -> dict:
    """The `es_config.json` of a run folder; empty for other people's adapters."""
    path = os.path.join(folder, "es_config.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
