"""Frozen layers in any storage, quantised, cast, offloaded: what a layer computes with, whatever its weight holds."""

from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 1024  # columns that an unknown format is asked for at once


@torch.no_grad()
def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """
    `(m, n)` fp32: the matrix that a Linear layer stands for. Its weight, or what its weight says it is, or, for any
    other format, the layer applied to the identity.

    Args:
        layer (`nn.Linear`): Of torch, or of a quantisation library that keeps its `in_features` and `out_features`.
        dtype (`torch.dtype`): What it is called with.
    """
    weight = layer.weight
    if weight.is_meta and hasattr(layer, "_hf_hook"):  # it comes for the layer's forward alone
        return _asked(layer, dtype, layer._hf_hook.execution_device)
    if type(weight).dequantize is not torch.Tensor.dequantize:  # a method of its own; torch's reads codes as numbers
        return weight.dequantize().detach().float()
    if weight.is_floating_point() and type(weight) in (torch.Tensor, nn.Parameter):
        return weight.detach().float()
    return _asked(layer, dtype, weight.device)


def _asked(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    identity = torch.eye(layer.in_features, dtype=dtype, device=device)
    columns = [layer(rows).float() for rows in identity.split(BLOCK)]
    W = torch.cat(columns)
    return (W if layer.bias is None else W - layer(0 * identity[:1]).float()).T.contiguous()


def compute_dtype(denoiser: nn.Module) -> torch.dtype:
    """What the denoiser computes in; never a dtype that weights are only stored in."""
    own = getattr(denoiser, "dtype", None)
    if own in PLAIN:
        return own
    return next((value.dtype for value in denoiser.parameters() if value.dtype in PLAIN), torch.float32)


@torch.no_grad()
def rounding_dtype(model: nn.Module) -> torch.dtype:
    """
    The dtype by whose rounding two ways of computing the same differ: what `model` computes in, or bfloat16, with its
    8 bits, where a packed layer rounds what goes into it as well and so is not quite linear.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not hasattr(layer, "in_features") or not isinstance(weight, torch.Tensor):
            continue
        if weight.is_meta or (type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in PLAIN):
            continue
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, layer.in_features, generator=generator).to(weight.device, compute_dtype(model))
        y, zero, both = layer(x).float(), layer(0 * x[:1]).float(), layer(x[:1] + x[1:]).float()
        if (both - y[:1] - y[1:] + zero).abs().max() > 1e-3 * y.abs().max():
            return torch.bfloat16
        break
    return compute_dtype(model)


def is_cast(model: nn.Module) -> bool:
    """Whether weights are cast to what they compute in for the forward of their layer alone (layerwise casting)."""
    hooks = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any("layerwise_casting" in found.hooks for found in hooks if found is not None)


def freeze(model: nn.Module) -> None:
    """No gradients, no dropout."""
    model.requires_grad_(False).eval()
    for module in model.modules():
        # In eval mode bitsandbytes packs 4-bit weights for CPUs, and fails where a row is no whole number of blocks.
        if type(module).__name__ == "Linear4bit":
            module.train()


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes has packed it, which it does on the GPU, where it then is."""
    return bool(getattr(module, "is_loaded_in_8bit", False) or getattr(module, "is_loaded_in_4bit", False))


def is_placed(pipe: "DiffusionPipeline") -> bool:
    """Whether the user has said where the pipeline's parts are: a device map, or any kind of offload."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return bool(getattr(pipe, "hf_device_map", None)) or any(
        hasattr(module, "_hf_hook") or _is_group_offload_enabled(module) for module in modules
    )
