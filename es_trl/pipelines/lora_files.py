"""LoRA files in the names of diffusers, peft, kohya or ComfyUI: read whole, and compared with what was applied."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn


# `layer.lora_A.weight`, peft's `layer.lora_A.default.weight`, kohya's `layer.lora_down.weight`, old diffusers' two.
FACTOR = re.compile(r"(.+?)(?:\.lora_(A|B|down|up)(?:\.[\w-]+)?\.weight|[._]lora\.(down|up)\.weight)")
PREFIXES = ("", "transformer.", "unet.", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_transformer_")
TEXT_ENCODERS = ("text_encoder", "lora_te")
TOLERANCE = 0.01  # of a pair's squared norm: what bf16 rounds is a tenth of it


@dataclass
class LoraPair:
    """
    The two factors of one matrix: `dW = B A`, alpha / rank included.

    Attributes:
        name (`str`): Its matrix's name in the file.
        A (`torch.Tensor`): `(r, n)`, or `(r, c, kh, kw)` of a convolution.
        B (`torch.Tensor`): `(m, r)`, or `(m, r, 1, 1)`.
        keys (`tuple[str, str]`): The file's names of A and B.
        layer (`str`, *optional*): The denoiser's layer of that name; `None` where the names are another program's.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    keys: tuple[str, str]
    layer: str | None = None


@dataclass
class LoraFile:
    """
    What a LoRA file holds.

    Attributes:
        pairs (`list[LoraPair]`): Matrices for the denoiser.
        strange (`list[str]`): Names of what is no such pair: half a pair, the text encoder's, DoRA, LoHa, biases.
    """

    pairs: list[LoraPair] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    def state_dict(self, denoiser_name: str) -> dict[str, torch.Tensor]:
        """The pairs for `load_lora_weights`: by the denoiser's names, or by the file's for diffusers to convert."""
        own = all(pair.layer is not None for pair in self.pairs)
        tensors: dict[str, torch.Tensor] = {}
        for pair in self.pairs:
            names = [f"{denoiser_name}.{pair.layer}.lora_{part}.weight" for part in "AB"] if own else pair.keys
            tensors |= zip(names, (pair.A, pair.B), strict=True)
        return tensors

    def not_in(self, layers: Mapping[str, LoraLayer], adapter_name: str) -> list[str]:
        """
        Names of the pairs that the adapter on `layers` lacks, or has at another strength. Compared by name; where
        another program's names were converted, by A, which one joined matrix of the file shares among its parts.
        """
        left = {name: _Applied(layer, adapter_name) for name, layer in layers.items()}
        lost, lost_energy = [], 0.0
        for pair in sorted(self.pairs, key=lambda pair: pair.layer not in left):
            energy, probe = _energy(pair.A, pair.B), _probe(pair.A)
            named = pair.layer in left
            parts = [str(pair.layer)] if named else [name for name, other in left.items() if other.fits(pair.A, probe)]
            taken: list[str] = []
            found = 0.0
            for name in parts:
                if found + left[name].energy <= (1 + TOLERANCE) * energy:
                    taken, found = [*taken, name], found + left[name].energy
            if taken and found >= (1 - TOLERANCE) * energy:
                for name in taken:
                    del left[name]
            else:
                lost.append(pair.name)
                lost_energy += energy
        # A converter may cut A into pieces as well; then all that is left over on both sides is the same.
        rest = sum(other.energy for other in left.values())
        return [] if rest and abs(rest - lost_energy) <= 1e-3 * rest else lost


def read_lora(path: str, denoiser: nn.Module | None = None) -> LoraFile:
    """
    Reads a LoRA with its strength: `.alpha` beside a pair, or else what diffusers or peft wrote down, or else 1.

    Args:
        path (`str`): A safetensors file; `adapter_config.json` beside it is read for peft's.
        denoiser (`nn.Module`, *optional*): The model whose layers the names are looked for in.

    Raises:
        `ValueError`: no readable safetensors file, no LoRA in it, or entries that are not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path!r} is not a readable safetensors file ({error}).") from error
    broken = [name for name, value in tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise ValueError(f"{path!r} has entries that are not finite in {listed(broken)}: it is damaged.")
    config = _config(path, header, tensors)
    layers = {name.replace(".", "_"): name for name, _ in denoiser.named_modules()} if denoiser is not None else {}

    lora = LoraFile()
    halves: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for key, value in tensors.items():
        if match := FACTOR.fullmatch(key):
            part = (match[2] or match[3]).replace("down", "A").replace("up", "B")
            halves.setdefault(match[1], {})[part] = key
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(value)
    if not halves:
        raise ValueError(f"{path!r} holds no LoRA matrices.")
    for name, keys in halves.items():
        if len(keys) < 2 or name.startswith(TEXT_ENCODERS):
            lora.strange += keys.values()
            continue
        A, B = tensors[keys["A"]], tensors[keys["B"]]
        scale = alphas[name] / len(A) if name in alphas else _scale(config, name, len(A))
        if scale != 1.0:
            A, B = A.float(), B.float() * scale
        lora.pairs.append(LoraPair(name, A, B, (keys["A"], keys["B"]), _layer(name, layers)))
    known = {key for keys in halves.values() for key in keys.values()} | {f"{name}.alpha" for name in halves}
    lora.strange += sorted(tensors.keys() - known)
    return lora


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers of `model` that carry `adapter_name`, by name."""
    modules = model.named_modules()
    return {
        name: module for name, module in modules if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def listed(names: Iterable[str], shown: int = 3) -> str:
    """The first few names and how many there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class _Applied:
    """One layer's adapter as the model has it."""

    def __init__(self, layer: LoraLayer, adapter_name: str):
        self.A = layer.lora_A[adapter_name].weight
        self.energy = layer.scaling[adapter_name] ** 2 * _energy(self.A, layer.lora_B[adapter_name].weight)
        self.probe = _probe(self.A)

    def fits(self, A: torch.Tensor, probe: torch.Tensor) -> bool:
        """Whether A is the same but for a factor and rounding."""
        return self.A.shape == A.shape and abs(float(self.probe @ probe)) > 0.999


def _energy(A: torch.Tensor, B: torch.Tensor) -> float:
    """Squared Frobenius norm of B A, without writing it out."""
    A, B = A.detach().cpu().float().flatten(1), B.detach().cpu().float().flatten(1)
    return float(((B.T @ B) * (A @ A.T)).sum())


def _probe(A: torch.Tensor) -> torch.Tensor:
    entries = A.detach().flatten()
    entries = entries[:: max(1, entries.numel() // 256)].cpu().float()
    return entries / entries.norm().clamp_min(1e-30)


def _layer(name: str, layers: Mapping[str, str]) -> str | None:
    """The layer that `name` means, whatever program's prefix and dots it has."""
    found = (layers.get(name[len(prefix) :].replace(".", "_")) for prefix in PREFIXES if name.startswith(prefix))
    return next((layer for layer in found if layer), None)


def _config(path: str, header: Mapping[str, str], tensors: Iterable[str]) -> dict[str, Any]:
    """peft's configuration, from the file's header or from beside it."""
    if "lora_adapter_metadata" in header:
        saved = json.loads(header["lora_adapter_metadata"])
        prefixes = {key.partition(".")[0] for key in saved} - {"text_encoder", "text_encoder_2"}
        return {key.partition(".")[2]: value for key, value in saved.items() if key.partition(".")[0] in prefixes}
    if not any(name.startswith("base_model.model.") for name in tensors):
        return {}
    beside = os.path.join(os.path.dirname(path), "adapter_config.json")
    if not os.path.isfile(beside):
        raise ValueError(f"{path!r} is peft's, and no adapter_config.json lies beside it: its alpha is not known.")
    with open(beside, encoding="utf-8") as file:
        return json.load(file)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """peft's scale of one pair; 1 when nothing was written down."""
    if not config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, name), config.get("lora_alpha", rank))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
