"""How much perturbing theta changes what the denoiser puts out: the natural unit of sigma."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..es import NoiseBank, make_generator
from .adapter import PipelineAdapter
from .watching import dtype_of


MEMBERS = 8  # each draws one picture; their changes are pooled
PROBE = 0.03
ROUNDS = 3


@torch.no_grad()
def output_change(
    adapter: PipelineAdapter,
    prompts: Sequence[str],
    noise: NoiseBank,
    seed: int,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[float], float]:
    """
    A function of sigma: `|X(theta + sigma E) - X(theta)| / |X(theta)|` over all outputs `X` of the denoiser while
    `MEMBERS` members draw one picture each, with one prompt, latents and rank-r perturbation of their own.
    """
    members = range(MEMBERS)
    own = {name: [values[i % len(prompts)] for i in members] for name, values in (columns or {}).items()}
    prompts = [prompts[i % len(prompts)] for i in members]
    device = next(iter(adapter.theta.values())).device
    factors = [noise.draw(0, [i], device=device, tag="calibration_noise") for i in members]

    def drawn(sigma: float) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        with adapter.denoiser.register_forward_hook(lambda module, args, output: outputs.extend(tensors_of(output))):
            for i in members:
                with adapter.members(factors[i], torch.ones(1), sigma, 1):
                    columns = {name: values[i : i + 1] for name, values in own.items()}
                    adapter.generate([prompts[i]], [make_generator(seed, "calibration", i)], columns=columns)
        return torch.cat([output.flatten().float() for output in outputs])

    start = drawn(0.0)
    return lambda sigma: float((drawn(sigma) - start).norm() / start.norm())


def calibrate_sigma(
    adapter: PipelineAdapter,
    prompts: Sequence[str],
    noise: NoiseBank,
    seed: int,
    target: float,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> float:
    """
    The sigma at which perturbed members change the denoiser's output by `target` of its norm (about 32 pictures).

    Args:
        adapter (`PipelineAdapter`): With theta at the run's start.
        prompts (`Sequence[str]`): Of the training set; the first ones are drawn.
        noise (`NoiseBank`): For shapes and rank of the perturbations.
        seed (`int`): Of the run.
        target (`float`): Relative change of the output, above 0.
        columns (`Mapping[str, Sequence]`, *optional*): The prompts' other columns, for the call.

    Raises:
        `ValueError`: if the perturbations change nothing, or the output is not finite.
    """
    change, sigma = output_change(adapter, prompts, noise, seed, columns), PROBE
    for _ in range(ROUNDS):
        found = change(sigma)
        if not 0 < found < float("inf"):
            reason = "is not finite" if found != 0 else "does not change at all: the layers with LoRA are never called"
            raise ValueError(
                f"output_change={target:g} cannot be reached: with theta perturbed by sigma={sigma:.3g} the output of "
                f"{type(adapter.denoiser).__name__} ({dtype_of(adapter.denoiser)}) {reason}. Set lora_target_modules "
                "to layers that it uses, dtype to one that it can compute in, or sigma by hand."
            )
        sigma *= target / found
    return sigma


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Tensors of a denoiser's output: a tensor, a tuple or list of them, or an output object."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if hasattr(output, "values") else output
    return [tensor for part in parts for tensor in tensors_of(part)]
