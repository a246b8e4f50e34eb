"""Finished LoRAs put on a pipeline, whole or not at all: to draw with, to stay beside a trained one, to start from."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .base_layers import PLAIN, compute_dtype
from .loading import denoiser_of
from .lora_files import LoraFile, listed, lora_layers, read_lora


logger = logging.getLogger(__name__)

Start = dict[str, tuple[torch.Tensor, torch.Tensor]]


def apply_lora(pipe: DiffusionPipeline, path: str, name: str, what: str, allow_partial: bool = False) -> None:
    """
    Loads the LoRA of the file `path` onto the denoiser of `pipe` as adapter `name`, and compares what was applied.

    Raises:
        `ValueError`: for a LoRA that does not fit or is not finite; for one of which the denoiser takes only a part,
            unless `allow_partial`: then the rest is named in a warning. `what` names it in messages.
    """
    model, denoiser_name = type(pipe).__name__, denoiser_of(pipe)
    denoiser = getattr(pipe, denoiser_name)
    try:
        lora = read_lora(path, denoiser)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    what = f"{what} from {path!r}"
    try:
        pipe.load_lora_weights(lora.state_dict(denoiser_name), adapter_name=name)
    except Exception as error:  # noqa: BLE001 - diffusers, peft, torch and safetensors each raise their own
        raise ValueError(
            f"{what} does not fit {model}: {' '.join(str(error).split())[:300]} Is `model` the one it was trained on?"
        ) from error
    applied = lora_layers(denoiser, name)
    if not applied:
        raise ValueError(f"{what} changes nothing of {model}: no layer of its {denoiser_name} has its names.")
    _leave_storage_dtype(denoiser, lora, applied, name, what)
    left_out = lora.not_in(applied, name) + lora.strange
    if left_out:
        text = f"{what}: {model} takes only a part of it, without {listed(left_out)}"
        if not allow_partial:
            raise ValueError(f"{text}. Is `model` the one it was trained on? To go on without, allow_partial.")
        logger.warning("%s, as allow_partial says.", text)
    if not any(layer.lora_B[name].weight.any() for layer in applied.values()):
        logger.warning("%s changes nothing: all its B are 0, so it draws the base.", what)


def carried_adapters(denoiser: nn.Module) -> list[str]:
    """The adapters that draw with the model as it is."""
    layers = denoiser.modules() if getattr(denoiser, "peft_config", None) else ()
    layer = next((module for module in layers if isinstance(module, BaseTunerLayer)), None)
    return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)


def activate(denoiser: nn.Module, names: Sequence[str]) -> None:
    """Lets exactly the adapters `names` draw, at the strengths they have; without names, none."""
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(bool(names))
            if names:
                module.set_adapter(list(names))
    # Switching an adapter on, peft lets its weights require gradients, and torch then computes with other kernels,
    # even under no_grad: pictures would differ in their last bits from those before.
    denoiser.requires_grad_(False)


def take_off(pipe: DiffusionPipeline, denoiser: nn.Module, names: Sequence[str], carried: Sequence[str]) -> None:
    """Takes adapters off, and lets `carried` draw; with no other left, the layers are the model's own again."""
    known = getattr(denoiser, "peft_config", {})
    names = [name for name in names if name in known]
    if set(known) - set(names):
        for name in names:
            for layer in lora_layers(denoiser, name).values():
                layer.delete_adapter(name)
            del known[name]
        activate(denoiser, carried)
    elif names and hasattr(denoiser, "unload_lora"):  # the pipeline's own would clear its text encoders too
        denoiser.unload_lora()
    elif names:
        pipe.unload_lora_weights()


def add_frozen(pipe: DiffusionPipeline, adapters: Iterable[tuple[str, float]]) -> None:
    """Puts finished LoRAs, `(file, scale)`, on `pipe` beside those it carries; all of them draw."""
    adapters = list(adapters)
    if not adapters:
        return
    denoiser = getattr(pipe, denoiser_of(pipe))
    carried = carried_adapters(denoiser)
    for path, scale in adapters:
        carried.append(f"frozen_{len(carried)}")
        apply_lora(pipe, path, carried[-1], "frozen_adapters: the adapter")
        set_scale(denoiser, carried[-1], scale)
    activate(denoiser, carried)


def set_scale(denoiser: nn.Module, name: str, scale: float) -> None:
    """Multiplies an adapter's effect as it was loaded by `scale`; 0 is as without it."""
    for layer in lora_layers(denoiser, name).values():
        layer.set_scale(name, scale)


def read_start(pipe: DiffusionPipeline, path: str) -> Start:
    """The factors by layer of the LoRA in `path`, their strength in B, fp32; `pipe` is left as it was."""
    denoiser, name = getattr(pipe, denoiser_of(pipe)), "init_adapter"
    carried = carried_adapters(denoiser)
    apply_lora(pipe, path, name, "init_adapter")
    start = {}
    for layer_name, layer in lora_layers(denoiser, name).items():
        A, B = (factors[name].weight.detach().float() for factors in (layer.lora_A, layer.lora_B))
        start[layer_name] = A.clone(), layer.scaling[name] * B
    take_off(pipe, denoiser, [name], carried)
    return start


def config_of(start: Start) -> LoraConfig:
    """The configuration of an adapter with these factors, each layer at scale 1."""
    ranks = {f"^{name}": len(A) for name, (A, _) in start.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: value for name, value in ranks.items() if value != rank}
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(start), rank_pattern=others, alpha_pattern=others)


def _leave_storage_dtype(
    denoiser: nn.Module, lora: LoraFile, applied: Mapping[str, LoraLayer], name: str, what: str
) -> None:
    """On a base whose weights are only stored in fp8, peft makes a LoRA of fp8, which cannot compute."""
    dtype = compute_dtype(denoiser)
    stored = {key: layer for key, layer in applied.items() if layer.lora_A[name].weight.dtype not in PLAIN}
    named = {pair.layer: pair for pair in lora.pairs}
    if not stored.keys() <= named.keys():
        raise ValueError(f"{what} is in another program's names, and the base is cast to 8 bit: load it uncast.")
    for key, layer in stored.items():
        for module, factor in (layer.lora_A[name], named[key].A), (layer.lora_B[name], named[key].B):
            module.to(dtype).weight.data.copy_(factor)
