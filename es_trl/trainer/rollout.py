"""Rollouts: the images of every member for the prompts of a step, and their scores."""

import logging
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..es import Factors, Population, PopulationShapeError, make_generator
from ..pipelines import PipelineAdapter
from ..rewards import RewardSet
from .micro_batches import MicroBatches


logger = logging.getLogger(__name__)


@dataclass
class PromptBatch:
    """
    The rollout columns of a step: every prompt `images_per_prompt` times, each with latents of its own.

    Attributes:
        prompts (`list[str]`): `J` prompts.
        columns (`dict[str, list]`): The data set's other columns, `J` values each.
        images_per_prompt (`int`): Consecutive columns that share a prompt.
    """

    prompts: list[str]
    columns: dict[str, list] = field(default_factory=dict)
    images_per_prompt: int = 1

    @classmethod
    def from_rows(cls, rows: list[dict], images_per_prompt: int) -> "PromptBatch":
        repeated = [row for row in rows for _ in range(images_per_prompt)]
        names = [name for name in rows[0] if name != "prompt"]
        return cls(
            [row["prompt"] for row in repeated], {n: [row[n] for row in repeated] for n in names}, images_per_prompt
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def generators(self, seed: int, step: int, micro: int) -> list[torch.Generator]:
        """One generator per column, the same for every member (common random numbers)."""
        k = self.images_per_prompt
        return [make_generator(seed, "latents", step, micro, j // k, j % k) for j in range(len(self))]


@dataclass
class RolloutTimes:
    """Seconds spent by this process in one rollout."""

    generate: float = 0.0
    reward: float = 0.0


class PopulationRollout:
    """
    Draws and scores the members of this process.

    Micro-batches are fixed by `members_per_forward`; micro-batch `c` belongs to process `c % num_processes`, so that
    any number of processes computes the same images in the same batches.

    Args:
        adapter (`PipelineAdapter`), rewards (`RewardSet`), population (`Population`): What draws, scores and is drawn.
        sigma (`float`): Perturbation size.
        members_per_forward (`int`): Members per batch.
        seed (`int`): Seed of the latents.
        process_index, num_processes (`int`): This process and how many there are.

    Attributes:
        micro_batches (`MicroBatches`): Asked before each micro-batch (it may stop the run, or know the scores), and
            told after it.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        rewards: RewardSet,
        population: Population,
        sigma: float,
        members_per_forward: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.adapter, self.rewards, self.population = adapter, rewards, population
        self.sigma, self.members_per_forward, self.seed = sigma, members_per_forward, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.micro_batches = MicroBatches()

    def owner(self, member: int) -> int:
        """The process that draws `member`."""
        return (member // self.members_per_forward) % self.num_processes

    def scores(
        self, batch: PromptBatch, factors: dict[str, Factors], step: int, micro: int = 0, **reward_context
    ) -> tuple[torch.Tensor, RolloutTimes]:
        """
        Args:
            batch (`PromptBatch`): `J` rollout columns.
            factors (`dict[str, Factors]`): All directions of the step.
            step, micro (`int`): Part of the latents' keys.
            **reward_context: Passed on to the reward functions (`trainer_state`, `log_extra`, `log_metric`).

        Returns:
            `(N, J, K)` fp64 scores, 0 for members of other processes; and the seconds spent.
        """
        scores = torch.zeros(self.population.size, len(batch), len(self.rewards.names), dtype=torch.float64)
        times = RolloutTimes()
        for chunk in self.population.chunks(self.members_per_forward):
            if self.owner(chunk[0]) != self.process_index:
                continue
            earlier = self.micro_batches.earlier(chunk)
            if earlier is not None:
                scores[chunk] = earlier
                continue
            started = time.perf_counter()
            images = self.draw(chunk, batch, factors, step, micro)
            drawn = time.perf_counter()
            values = self.rewards(
                batch.prompts * len(chunk),
                images,
                {name: column * len(chunk) for name, column in batch.columns.items()},
                where=f"step {step}, members {chunk[0]}-{chunk[-1]}",
                **reward_context,
            )
            scores[chunk] = torch.from_numpy(np.asarray(values)).view(len(chunk), len(batch), -1)
            self.micro_batches.finished(chunk, scores[chunk])
            times.generate += drawn - started
            times.reward += time.perf_counter() - drawn
        return scores, times

    def draw(
        self, members: list[int], batch: PromptBatch, factors: dict[str, Factors], step: int, micro: int = 0
    ) -> list[Image.Image]:
        """The images of `members`, member by member; one member at a time where a batch cannot be shared."""
        try:
            return self._draw_together(members, batch, factors, step, micro)
        except PopulationShapeError as error:
            logger.warning(
                "Members run one after the other from here on (same result, slower), because this pipeline's batch "
                "cannot be shared by several: %s",
                error,
            )
            self._draw_together = self._draw_one_by_one
            return self._draw_one_by_one(members, batch, factors, step, micro)

    def _draw_together(
        self, members: list[int], batch: PromptBatch, factors: dict[str, Factors], step: int, micro: int
    ) -> list[Image.Image]:
        directions = torch.tensor(self.population.directions(members))
        selected = {name: value.select(directions.to(value.U.device)) for name, value in factors.items()}
        generators = [g for _ in members for g in batch.generators(self.seed, step, micro)]
        with self.adapter.members(selected, self.population.signs(members), self.sigma, rows=len(batch)):
            return self.adapter.generate(batch.prompts * len(members), generators)

    def _draw_one_by_one(self, members: list[int], *args) -> list[Image.Image]:
        together = type(self)._draw_together
        return [image for member in members for image in together(self, [member], *args)]
