"""Checks that a run makes of itself once, on its own prompts: rows, members and layers are what they are taken for."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..es import Perturbations, StepNoise


logger = logging.getLogger(__name__)

VISIBLE = 0.05  # members have to differ by this share of a picture's contrast before their difference says anything
AMPLIFIED = (1.0, 8.0, 64.0)
ROUNDING = 1e-5  # of a picture's contrast, in fp32
EIGHT_BITS = 0.1 / 255  # root mean square of what rounding to 8 bits adds to pictures that are almost equal


def rounding_limit(dtype: torch.dtype) -> float:
    """How far two ways of computing the same picture may be apart, as a share of what is to be told apart."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


def tolerance(numbers: torch.Tensor, spread: float, dtype: torch.dtype) -> float:
    """How far equal pictures may be apart where different ones are `spread` apart."""
    steps = numbers * 255
    eight_bits = bool((steps - steps.round()).abs().max() < 1e-3)
    contrast = rms(numbers - numbers.mean()) if rounding_limit(dtype) < 0.01 else 0.0
    return rounding_limit(dtype) * spread + ROUNDING * contrast + EIGHT_BITS * eight_bits


def numbers_of(samples: Any, kept: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """`(rows, D)` numbers of samples: those before 8 bits where they were kept, else the samples' own."""
    if kept and len(kept) % rows == 0 and len({value.numel() for value in kept}) == 1:
        return torch.stack([value.flatten() for value in kept]).view(rows, -1)
    return torch.stack([_array(sample).flatten() for sample in samples])


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def check_members(
    draw: Callable[[list[int], StepNoise | Perturbations], torch.Tensor],
    members: list[int],
    factors: StepNoise | Perturbations,
    dtype: torch.dtype,
) -> str:
    """
    Draws two members in one batch and each alone.

    Args:
        draw (`Callable`): `draw(members, factors)` gives `(len(members), ...)` numbers of what the members draw.
        members (`list[int]`): Two members that draw the same prompts from the same noise.
        factors (`StepNoise` or `Perturbations`): Their directions. Amplified until the members differ visibly, since
            a small sigma would hide a wrong row behind rounding.
        dtype (`torch.dtype`): What the model computes in.

    Returns:
        `str`: What is wrong; empty if the batch draws what each member draws alone.
    """
    for factor in AMPLIFIED:
        louder = factors.scaled(factor)
        alone = torch.cat([draw([member], louder) for member in members])
        spread = rms(alone[0] - alone[1])
        if spread >= VISIBLE * rms(alone[0] - alone[0].mean()):
            break
    if not torch.isfinite(alone).all() or not spread:
        return ""
    together = draw(members, louder)
    difference = max(rms(a - b) for a, b in zip(together, alone, strict=True))
    if difference <= tolerance(alone, spread, dtype):
        return ""
    return (
        f"two members drawn in one batch differ from the same two drawn alone by {difference / spread:.2g} of the "
        "difference between them"
    )


@contextmanager
def watching_layers(adapter: Any, consequence: str) -> Iterator[None]:
    """
    Around forward passes: names the LoRA layers that none of them called. Says nothing if there was none, or if the
    denoiser is compiled.

    Raises:
        `ValueError`: if it called none of them.
    """
    modules = adapter.space.layers
    if getattr(adapter.denoiser, "_compiled_call_impl", None) is not None:
        yield
        return
    called: set[str] = set()
    ran = []
    with ExitStack() as stack:
        stack.enter_context(adapter.denoiser.register_forward_pre_hook(lambda *_args: ran.append(True)))
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(lambda *_args, name=name: called.add(name)))
        yield
    idle = [name for name in modules if name not in called]
    if not idle or not ran:
        return
    message = (
        f"{len(idle)} of {len(modules)} LoRA layers are never called by {type(adapter.pipe).__name__}, the first "
        f"being {idle[0]}: {consequence}. The model computes without these layers (after fuse_qkv_projections(), or "
        "in a branch that this call does not take); choose others with lora_target_modules."
    )
    if not called:
        raise ValueError(message)
    logger.warning("%s", message)


def _array(sample: Any) -> torch.Tensor:
    if isinstance(sample, Image.Image):
        return torch.from_numpy(np.asarray(sample, dtype=np.float32) / 255)
    if isinstance(sample, list | tuple):
        return torch.stack([_array(part) for part in sample])
    return torch.as_tensor(sample).detach().float().cpu()
