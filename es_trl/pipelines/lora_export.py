"""LoRA in the names of other programs. A matrix that they keep joined (q, k, v) gets the parts' ranks together."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from torch import nn

from .lora_files import LoraPair, listed


# One rule: a pattern of diffusers' layer names, and the other program's layer with the part's place within it.
Rules = Sequence[tuple[str, str, int]]


def joined(where: str, layers: Sequence[str], name: str) -> Rules:
    """One layer of the other program that holds these of diffusers, in order; most hold a single one."""
    return tuple((rf"{where}\.{layer}", name, place) for place, layer in enumerate(layers))


BLOCK, SINGLE = r"transformer_blocks\.(\d+)", r"single_transformer_blocks\.(\d+)"
FLUX_BLOCKS: Rules = (
    *joined(rf"{BLOCK}\.attn", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn.qkv"),
    *joined(rf"{BLOCK}\.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), r"double_blocks.\1.txt_attn.qkv"),
    *joined(rf"{BLOCK}\.attn", (r"to_out\.0",), r"double_blocks.\1.img_attn.proj"),
    *joined(rf"{BLOCK}\.attn", ("to_add_out",), r"double_blocks.\1.txt_attn.proj"),
)
FLUX: Rules = (
    *FLUX_BLOCKS,
    *joined(rf"{BLOCK}\.ff", (r"net\.0\.proj",), r"double_blocks.\1.img_mlp.0"),
    *joined(rf"{BLOCK}\.ff", (r"net\.2",), r"double_blocks.\1.img_mlp.2"),
    *joined(rf"{BLOCK}\.ff_context", (r"net\.0\.proj",), r"double_blocks.\1.txt_mlp.0"),
    *joined(rf"{BLOCK}\.ff_context", (r"net\.2",), r"double_blocks.\1.txt_mlp.2"),
    *joined(SINGLE, (r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp"), r"single_blocks.\1.linear1"),
    *joined(SINGLE, ("proj_out",), r"single_blocks.\1.linear2"),
)
FLUX2: Rules = (
    *FLUX_BLOCKS,
    *joined(rf"{BLOCK}\.ff", ("linear_in",), r"double_blocks.\1.img_mlp.0"),
    *joined(rf"{BLOCK}\.ff", ("linear_out",), r"double_blocks.\1.img_mlp.2"),
    *joined(rf"{BLOCK}\.ff_context", ("linear_in",), r"double_blocks.\1.txt_mlp.0"),
    *joined(rf"{BLOCK}\.ff_context", ("linear_out",), r"double_blocks.\1.txt_mlp.2"),
    *joined(rf"{SINGLE}\.attn", ("to_qkv_mlp_proj",), r"single_blocks.\1.linear1"),
    *joined(rf"{SINGLE}\.attn", ("to_out",), r"single_blocks.\1.linear2"),
)
KREA2: Rules = (
    *(
        (rf"transformer_blocks\.(\d+)\.attn\.{ours}", rf"blocks.\1.attn.{theirs}", 0)
        for ours, theirs in (("to_q", "wq"), ("to_k", "wk"), ("to_v", "wv"), (r"to_out\.0", "wo"), ("to_gate", "gate"))
    ),
    *((rf"transformer_blocks\.(\d+)\.ff\.{part}", rf"blocks.\1.mlp.{part}", 0) for part in ("gate", "up", "down")),
)
SAME: Rules = ((r"(.+)", r"\1", 0),)  # the program's module names are diffusers'


@dataclass(frozen=True)
class Family:
    """How other programs name the layers of one denoiser class, and which of them have it."""

    rules: Rules
    programs: tuple[str, ...] = ("comfyui", "kohya")
    factors: tuple[str, str] = ("lora_A", "lora_B")


FAMILIES: Mapping[str, Family] = {
    "FluxTransformer2DModel": Family(FLUX, factors=("lora_down", "lora_up")),
    "Flux2Transformer2DModel": Family(FLUX2),
    "ZImageTransformer2DModel": Family(SAME),
    "QwenImageTransformer2DModel": Family(SAME),
    "Krea2Transformer2DModel": Family(KREA2, programs=("comfyui",)),
}
UNET = "UNet2DConditionModel"


def export_tensors(denoiser: nn.Module, pairs: Sequence[LoraPair], program: str) -> dict[str, torch.Tensor]:
    """
    The tensors of a LoRA file for `"comfyui"` or `"kohya"`: scale 1, written as `.alpha` = rank.

    Args:
        denoiser (`nn.Module`): The model, which may lie on the meta device.
        pairs (`Sequence[LoraPair]`): With the names of its layers.

    Raises:
        `ValueError`: if that program has no such model, or no name for one of the layers.
    """
    kind = type(denoiser).__name__
    if kind == UNET:
        named = {f"unet.{p.layer}.lora_{part}.weight": f for p in pairs for part, f in (("A", p.A), ("B", p.B))}
        return {name: value.float().contiguous() for name, value in convert_state_dict_to_kohya(named).items()}
    if kind not in FAMILIES or program not in FAMILIES[kind].programs:
        known = sorted([*(name for name, family in FAMILIES.items() if program in family.programs), UNET])
        raise ValueError(
            f"{program} has no {kind}, or no names of it that are known here (known: {', '.join(known)}): export to "
            "'diffusers', or to 'merged' for a whole checkpoint."
        )
    family = FAMILIES[kind]
    down, up = ("lora_down", "lora_up") if program == "kohya" else family.factors
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in _joined(denoiser, pairs, family.rules, program).items():
        base = f"lora_unet_{name.replace('.', '_')}" if program == "kohya" else f"diffusion_model.{name}"
        A, B = _join(parts)
        tensors |= {f"{base}.{down}.weight": A, f"{base}.{up}.weight": B, f"{base}.alpha": torch.tensor(float(len(A)))}
    return tensors


def _joined(denoiser: nn.Module, pairs: Iterable[LoraPair], rules: Rules, program: str) -> dict[str, list[Any]]:
    """By their name: what each part of a joined matrix has, its rows and its pair, if any."""
    ours = {str(pair.layer): pair for pair in pairs}
    places: dict[str, dict[int, tuple[int, LoraPair | None]]] = {}
    for layer, module in denoiser.named_modules():
        rows = getattr(module, "out_features", 0)
        for pattern, name, place in rules if rows else ():
            if match := re.fullmatch(pattern, layer):
                places.setdefault(match.expand(name), {})[place] = (rows, ours.pop(layer, None))
                break
    if ours:
        raise ValueError(f"{program} has no name for {listed(ours)} that is known here: export to 'diffusers'.")
    joined = {name: [parts[place] for place in sorted(parts)] for name, parts in places.items()}
    return {name: parts for name, parts in joined.items() if any(pair for _, pair in parts)}


def _join(parts: Sequence[tuple[int, LoraPair | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts below one another: A is stacked, B block by block, zero rows where a part has no LoRA."""
    A = torch.cat([pair.A for _, pair in parts if pair]).float()
    B = torch.zeros(sum(rows for rows, _ in parts), len(A))
    row = column = 0
    for rows, pair in parts:
        if pair:
            rank = len(pair.A)
            B[row : row + rows, column : column + rank] = pair.B
            column += rank
        row += rows
    return A.contiguous(), B
