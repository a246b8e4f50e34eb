"""Proof, for a user's own pipeline, that the fused forward draws what each member alone would draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..es import NoiseBank, Population, PopulationShapeError, make_generator
from .adapter import PipelineAdapter


@dataclass
class PopulationCheck:
    """
    Attributes:
        fused (`bool`): Whether rows could be mapped to members; if not, members run one after the other.
        max_difference (`float`): Largest absolute difference of a latent between the fused batch and weights written
            into the model member by member.
        spread (`float`): Largest difference between two members' latents: what the difference is to be compared with.
        reason (`str`): Why the batch could not be fused, else empty.
    """

    fused: bool
    max_difference: float
    spread: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Fused, and equal to a thousandth of the spread between members."""
        return self.fused and self.max_difference <= 1e-3 * max(self.spread, 1e-12)


@torch.no_grad()
def verify_population_forward(
    pipe_or_adapter,
    prompts: Sequence[str] = ("a red apple", "two blue cats"),
    population_size: int = 4,
    sigma: float = 0.1,
    es_space: str = "lora",
    seed: int = 0,
    **adapter_kwargs,
) -> PopulationCheck:
    """
    Draws every member twice: all in one fused batch, and one by one with its weights written into the LoRA modules
    (or into the frozen weights, for space `weight`) of the otherwise untouched pipeline.

    Args:
        pipe_or_adapter (`DiffusionPipeline` or `PipelineAdapter`): What to check. A bare pipeline gets an adapter.
        prompts (`Sequence[str]`): One image each.
        population_size (`int`), sigma (`float`), es_space (`str`), seed (`int`): The population.
        **adapter_kwargs: Passed on to `PipelineAdapter` (`settings`, `lora_config`).

    Returns:
        `PopulationCheck`; `.ok` says whether fused and merged agree to a thousandth of the spread between members.
    """
    adapter = pipe_or_adapter
    if not isinstance(adapter, PipelineAdapter):
        adapter = PipelineAdapter(adapter, es_space=es_space, seed=seed, **adapter_kwargs)
    population = Population(population_size)
    shapes = {site.name: tuple(site.theta.shape) for site in adapter.space.sites}
    device = next(iter(adapter.theta.values())).device
    factors = NoiseBank(seed, shapes).draw(0, range(population.num_directions), device=device)
    members = list(range(population_size))
    chosen = torch.tensor(population.directions(members), device=device)
    selected = {name: value.select(chosen) for name, value in factors.items()}
    signs = population.signs(members)

    def draw(rows: Sequence[str]) -> torch.Tensor:
        generators = [make_generator(seed, "verify", i % len(prompts)) for i in range(len(rows))]
        return adapter.generate(rows, generators, output_type="latent").float().cpu()

    merged = []
    for member in members:
        with _merged(adapter, {n: signs[member] * sigma * f.dense()[member] for n, f in selected.items()}):
            merged.append(draw(prompts))
    merged = torch.stack(merged)
    spread = float((merged - merged[:1]).abs().max())
    try:
        with adapter.members(selected, signs, sigma, rows=len(prompts)):
            fused = draw(list(prompts) * population_size).view_as(merged)
    except PopulationShapeError as error:
        return PopulationCheck(False, float("nan"), spread, str(error))
    return PopulationCheck(True, float((fused - merged).abs().max()), spread)


class _merged:
    """Writes `theta + delta` into the model for the time of a `with` block and restores theta from a copy."""

    def __init__(self, adapter: PipelineAdapter, deltas: dict[str, torch.Tensor]):
        self.adapter, self.deltas = adapter, deltas

    def __enter__(self) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in self.adapter.theta.items()}
        self.frozen = {}
        for site in self.adapter.space.sites:
            site.theta.add_(self.deltas[site.name])
            if site.additive:
                # The exported LoRA is a truncation, so the exact sum goes into the frozen weight itself.
                self.frozen[site.name] = site.module.weight.detach().clone()
                site.module.weight.add_(site.theta)
                self.adapter.denoiser.disable_adapters()

    def __exit__(self, *_exc) -> None:
        for site in self.adapter.space.sites:
            site.theta.copy_(self.kept[site.name])
            if site.additive:
                site.module.weight.copy_(self.frozen[site.name])
                self.adapter.denoiser.enable_adapters()
