"""`es-trl dry-run --gpu 12GB`: whether a config fits on a card, and what to change if not."""

import re
import sys
from collections.abc import Iterator, Sequence

from ..trainer import DiffusionConfig, ESConfig
from .arguments import parse
from .memory_plan import MemoryPlan, plan_memory
from .messages import refuse


NF4 = (
    '{"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", '
    '"bnb_4bit_compute_dtype": "bfloat16"}}'
)


def split_gpu(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--gpu`, and the other words."""
    found, rest, words = None, [], iter(argv)
    for word in words:
        if word == "--gpu":
            found = next(words, "")
        elif word.startswith("--gpu="):
            found = word.partition("=")[2]
        else:
            rest.append(word)
    return found, rest


def gigabytes(text: str) -> float:
    """
    GB (10^9 bytes) that a run may take of a card that is sold as `text`, such as 12GB. Cards have GiB: the 7 % between
    them are left to CUDA itself. `ValueError` for anything but a number above 0, with or without GB.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--gpu must be the size of a card, such as 12GB, got {text!r}.")
    return float(found[1])


def row(name: str, text: str) -> None:
    """A line of what a dry run finds, at once."""
    sys.stdout.write(f"{name:<16}{text}\n")
    sys.stdout.flush()


def answer(gpu: str, argv: Sequence[str]) -> int:
    """Prints the plan of a config and whether it fits; the exit code: 0 if it does, 1 if not, 2 if it cannot work."""
    try:
        size = gigabytes(gpu)
        arguments, config = parse(args=[*argv, "--use_cpu", "True"])
        plan = plan_memory(arguments, config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return refuse("dry-run", error)

    def line(name: str, text: str) -> None:
        row(f"{name:<24}", text)

    line("model", f"{arguments.model_name_or_path}, {config.dtype}; shapes from {plan.source}")
    for moment in plan.moments:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in moment.parts.items() if value >= 0.005)
        line(moment.name, f"{moment.total:.1f} GB ({parts})")
    for note in plan.notes:
        line("not counted", note)
    peak = plan.peak
    if peak.total <= size:
        line("fits", f"{peak.total:.1f} of {size:g} GB at most, {peak.name}; not measured on a GPU")
        return 0
    line("does not fit", f"{peak.total:.1f} of {size:g} GB, {peak.name}")
    changes, after = what_helps(argv, size, config, plan)
    for name, value in changes:
        line("change", f"{name}: {value}")
    too_much = "" if after <= size else ": still too much, take a smaller model or another card"
    line("then", f"{after:.1f} GB{too_much}")
    return 1


def what_helps(
    argv: Sequence[str], size: float, config: DiffusionConfig, plan: MemoryPlan
) -> tuple[list[tuple[str, str]], float]:
    """Settings that make a config with this plan fit into `size` GB, the least harmful first, and GB with all."""
    changes: list[tuple[str, str]] = []

    def planned(more: Sequence[tuple[str, str]]) -> tuple[DiffusionConfig, MemoryPlan]:
        words = [word for name, value in more for word in (f"--{name}", value)]
        arguments, config = parse(args=[*argv, "--use_cpu", "True", *words])
        return config, plan_memory(arguments, config)

    while plan.peak.total > size:
        for change in candidates(config):
            new_config, new = planned([*changes, change])
            if new.peak.total < plan.peak.total - 0.01:
                changes = [*(pair for pair in changes if pair[0] != change[0]), change]
                config, plan = new_config, new
                break
        else:
            break
    return changes, plan.peak.total


def candidates(config: DiffusionConfig) -> Iterator[tuple[str, str]]:
    """Settings that take less memory, by what they cost: rounding and time, then precision, then pictures."""
    if not config.release_text_encoder:
        yield "release_text_encoder", "true"
    if config.dtype == "float32":
        yield "dtype", "bfloat16"
    if not config.vae_slicing:
        yield "vae_slicing", "true"
    others = ["images_per_backward", "images_per_forward"]
    batches = ["members_per_forward"] if isinstance(config, ESConfig) else others
    for name in ["per_device_eval_batch_size", *batches]:
        pair = name == "images_per_backward" and hasattr(config, "noise_draws")  # DPO: the two of a pair
        least, now = 2 if pair else 1, getattr(config, name)
        if now > least:
            yield name, str(max(least, now // 2))
    if getattr(config, "checkpoint_activations", True) is False:
        yield "checkpoint_activations", "true"
    if config.reward_dtype == "float32":
        yield "reward_dtype", "bfloat16"
    if not config.quantization_config:
        yield "quantization_config", NF4
    if config.release_text_encoder and config.text_encoder_device is None:
        yield "text_encoder_device", "cpu"
    if config.reward_device is None:
        yield "reward_device", "cpu"
    if not config.vae_tiling:
        yield "vae_tiling", "true"
    for name in ("height", "width"):
        if (getattr(config, name) or 0) > 512:
            yield name, "512"
