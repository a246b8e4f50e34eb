"""Which layers get LoRA: attention and feed-forward layers found by the model's structure, whatever their names."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from .lora_files import listed


ATTENTION = "attention"
FEED_FORWARD = "feed_forward"
DEFAULT_TARGETS = (ATTENTION,)

_ATTENTION_CLASS = re.compile(r"Attention|Attn")
_FEED_FORWARD_PART = re.compile(r"ff|ffn|mlp|feed_forward|.*_(ff|ffn|mlp)|(ff|mlp|feed_forward)_.*|proj_mlp")
_QKV = (("q", "uery"), ("k", "ey"), ("v", "alue"))
_NORM_PART = re.compile(r"norm|ada_?ln|modulation")


def resolve_targets(denoiser: nn.Module, targets: Sequence[str] | str | None) -> list[str] | str:
    """
    Layer names as peft takes them.

    Args:
        denoiser (`nn.Module`): Transformer or UNet.
        targets (`list[str]` or `str`, *optional*): Names, or the words `"attention"` (all projections of all attention
            layers in blocks) and `"feed_forward"` (Linear layers of their MLPs); `None` is `["attention"]`. A string
            is a regular expression and is left alone.

    Raises:
        `ValueError`: if the model has no layer that a word names.
    """
    if isinstance(targets, str):
        return targets
    found: list[str] = []
    for target in DEFAULT_TARGETS if targets is None else targets:
        if target not in (ATTENTION, FEED_FORWARD):
            found.append(target)
            continue
        layers = attention_layers(denoiser) if target == ATTENTION else feed_forward_layers(denoiser)
        if not layers:
            names = listed(_layers(denoiser, nn.Linear), 8)
            raise ValueError(
                f"{type(denoiser).__name__} has no Linear layers that are {target} by their place: set "
                f"lora_target_modules to names of its layers ({names or 'it has no Linear ones'})."
            )
        found += _shortened(denoiser, layers)
    return found


def attention_layers(denoiser: nn.Module) -> list[str]:
    """
    Linear layers of the innermost attention modules of numbered blocks, but for those in norms. A block that has its
    queries, keys and values itself is its own attention module, without its MLP.
    """
    modules = dict(denoiser.named_modules())
    inside: dict[str, list[str]] = {}
    for name in _block_layers(denoiser):
        parts = name.split(".")
        parents = [".".join(parts[:i]) for i in range(1, len(parts))]
        attention = [parent for parent in parents if _ATTENTION_CLASS.search(type(modules[parent]).__name__)]
        if not attention and not any(_FEED_FORWARD_PART.fullmatch(part) for part in parts):
            attention = [parent for parent in parents if _has_queries(modules[parent])]
        if attention and not any(_NORM_PART.search(part) for part in parts):
            inside.setdefault(attention[-1], []).append(name)
    # A block whose class is named after attention holds more than attention.
    innermost = [name for name in inside if not any(other.startswith(f"{name}.") for other in inside)]
    return [layer for name in innermost for layer in inside[name]]


def feed_forward_layers(denoiser: nn.Module) -> list[str]:
    """Linear layers of the MLPs of numbered blocks, with the joint output of blocks that have no other."""
    layers, attention = _block_layers(denoiser), set(attention_layers(denoiser))
    found = [name for name in layers if any(_FEED_FORWARD_PART.fullmatch(part) for part in _after_block(name))]
    single = {name.removesuffix("proj_mlp") for name in found if name.endswith("proj_mlp")}
    found += [f"{block}proj_out" for block in sorted(single) if f"{block}proj_out" in layers]
    return [name for name in found if name not in attention]


def _has_queries(module: nn.Module) -> bool:
    """Whether a module has a layer each for queries, keys and values."""
    names = [name.lower() for name, _ in module.named_children()]
    return all(any(re.search(rf"(^|_){letter}({word})?(_|$)", name) for name in names) for letter, word in _QKV)


def coverage(denoiser: nn.Module, adapted: Iterable[str]) -> str:
    """`"LoRA on 190 of 502 layers; none in ..."`, of Linear and convolution layers."""
    adapted = set(adapted)
    names = _layers(denoiser, nn.Linear, nn.Conv2d)
    total = Counter(_group(name) for name in names)
    covered = Counter(_group(name) for name in names if name in adapted)
    without = [group for group in total if not covered[group]]
    none = f"; none in {listed(without, 8)}" if without else ""
    return f"LoRA on {sum(covered.values())} of {len(names)} layers{none}"


def _layers(denoiser: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """The model's own layers, whether or not they carry an adapter already."""
    names = [name for name, module in denoiser.named_modules() if isinstance(module, kinds) and ".lora_" not in name]
    return list(dict.fromkeys(name.removesuffix(".base_layer") for name in names))


def _block_layers(denoiser: nn.Module) -> list[str]:
    return [name for name in _layers(denoiser, nn.Linear) if re.search(r"\.\d+\.", name)]


def _after_block(name: str) -> list[str]:
    parts = name.split(".")
    return parts[next(i for i, part in enumerate(parts) if part.isdigit()) + 1 :]


def _group(name: str) -> str:
    """A layer's place: `transformer_blocks.*.ff`."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return ".".join(parts[: parts.index("*") + 2]) if "*" in parts[:-1] else parts[0]


def _shortened(denoiser: nn.Module, layers: Sequence[str]) -> list[str]:
    """Their last names, if these mean the same layers to peft; else the whole names."""
    last = {found[0] for name in layers if (found := re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name))}
    meant = {
        name for name, _ in denoiser.named_modules() if any(name == end or name.endswith(f".{end}") for end in last)
    }
    return sorted(last) if meant == set(layers) else list(layers)
