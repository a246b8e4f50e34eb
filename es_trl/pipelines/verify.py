"""Proof, for a user's own pipeline, that the fused forward draws what each member alone would draw."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..es import NoiseBank, Population, PopulationShapeError, make_generator
from .adapter import PipelineAdapter
from .base_layers import rounding_dtype
from .self_check import numbers_of, rounding_limit


@dataclass
class PopulationCheck:
    """
    Attributes:
        fused (`bool`): Whether rows could be mapped to members; if not, members run one after the other.
        max_difference (`float`): Largest absolute difference of a pixel (a picture is 1 or 2 high) between the fused
            batch and weights written into the model member by member.
        spread (`float`): Largest difference between two members' pixels: what the difference is to be compared with.
        reason (`str`): Why the batch could not be fused, else empty.
        limit (`float`): Share of the spread that the difference may have, by the dtype of the model.
    """

    fused: bool
    max_difference: float
    spread: float
    reason: str = ""
    limit: float = 1e-3

    @property
    def ok(self) -> bool:
        """Fused, and equal to a small share of the spread between members: a thousandth, more in half precision."""
        return self.fused and self.max_difference <= self.limit * max(self.spread, 1e-12)


@torch.no_grad()
def verify_population_forward(
    pipe_or_adapter: Any,
    prompts: Sequence[str] = ("a red apple", "two blue cats"),
    population_size: int = 4,
    sigma: float = 0.1,
    es_space: str = "lora",
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    **adapter_kwargs: Any,
) -> PopulationCheck:
    """
    Draws every member twice: all in one fused batch, and one by one with its weights written into the LoRA modules
    (or added to the frozen layers' output, for space `weight`) of the otherwise untouched pipeline.

    Args:
        pipe_or_adapter (`DiffusionPipeline` or `PipelineAdapter`): What to check. A bare pipeline gets an
            adapter for as long as this takes.
        prompts (`Sequence[str]`): One image each.
        population_size (`int`), sigma (`float`), es_space (`str`), seed (`int`): The population.
        columns (`Mapping[str, Sequence]`, *optional*): Further columns of the prompts for the call (`image`, ...).
        **adapter_kwargs: Passed on to `PipelineAdapter` (`settings`, `lora_config`).

    Returns:
        `PopulationCheck`; `.ok` says whether fused and merged agree to a thousandth of the spread between members.
    """
    if isinstance(pipe_or_adapter, PipelineAdapter):
        return _check(pipe_or_adapter, prompts, population_size, sigma, seed, columns)
    adapter = PipelineAdapter(pipe_or_adapter, es_space=es_space, seed=seed, **adapter_kwargs)
    try:
        return _check(adapter, prompts, population_size, sigma, seed, columns)
    finally:
        adapter.unload()


def _check(
    adapter: PipelineAdapter,
    prompts: Sequence[str],
    population_size: int,
    sigma: float,
    seed: int,
    columns: Mapping[str, Sequence[Any]] | None,
) -> PopulationCheck:
    population = Population(population_size)
    shapes = {site.name: tuple(site.theta.shape) for site in adapter.space.sites}
    device = next(iter(adapter.theta.values())).device
    factors = NoiseBank(seed, shapes).draw(0, range(population.num_directions), device=device)
    members = list(range(population_size))
    chosen = torch.tensor(population.directions(members), device=device)
    selected = factors.select(chosen, device)
    signs = population.signs(members)

    def draw(count: int) -> torch.Tensor:
        generators = [make_generator(seed, "verify", i) for _ in range(count) for i in range(len(prompts))]
        own = {name: list(values) * count for name, values in (columns or {}).items()}
        drawn = adapter.generate(list(prompts) * count, generators, columns=own, keep_numbers=True)
        return numbers_of(drawn, adapter.drawer.last_watch.numbers, len(drawn)).view(count, len(prompts), -1)

    merged = []
    for member in members:
        with merged_weights(adapter, {n: signs[member] * sigma * f.dense()[member] for n, f in selected.items()}):
            merged.append(draw(1))
    merged = torch.cat(merged)
    spread = float((merged - merged[:1]).abs().max())
    try:
        with adapter.members(selected, signs, sigma, rows=len(prompts)):
            fused = draw(population_size)
    except PopulationShapeError as error:
        return PopulationCheck(False, float("nan"), spread, str(error))
    limit = rounding_limit(rounding_dtype(adapter.denoiser))
    return PopulationCheck(True, float((fused - merged).abs().max()), spread, limit=limit)


@contextmanager
def merged_weights(adapter: PipelineAdapter, deltas: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, without gradients, the model holds `theta + delta`; theta is restored from a copy."""
    sites, kept = adapter.space.sites, {name: parameter.detach().clone() for name, parameter in adapter.theta.items()}
    with ExitStack() as stack:
        for site in sites:
            site.theta.add_(deltas[site.name])
            if site.additive:
                # The exported LoRA is a truncation, and a frozen weight may be packed: the exact sum is added to what
                # the layer gives.
                stack.enter_context(site.module.register_forward_hook(partial(_add, site.theta)))
        if any(site.additive for site in sites):
            stack.enter_context(adapter.adapter_disabled())
        try:
            yield
        finally:
            for site in sites:
                site.theta.copy_(kept[site.name])


def _add(theta: torch.Tensor, _layer: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output + F.linear(args[0], theta.detach().to(args[0].dtype))
