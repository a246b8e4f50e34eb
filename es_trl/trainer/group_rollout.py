"""Rollouts of a policy: for every prompt a group of images, their paths, and their scores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..es import make_generator
from ..pipelines import PolicySampler, Trajectory, rows_of
from ..rewards import RewardSet
from .policy_gradient_config import PolicyGradientConfig
from .prompt_batches import columns_of


@dataclass
class GroupBatch:
    """
    The `P` prompts of a step, a group of `num_generations` images each, with the data set's other columns; `step` and
    `micro` are part of every key of their randomness.
    """

    prompts: list[str]
    columns: dict[str, list]
    num_generations: int
    step: int
    micro: int

    @classmethod
    def from_rows(cls, rows: list[dict], num_generations: int, step: int, micro: int) -> "GroupBatch":
        """From `P` rows of a data set with the column "prompt" and any others."""
        return cls([row["prompt"] for row in rows], columns_of(rows), num_generations, step, micro)

    def __len__(self) -> int:
        return len(self.prompts) * self.num_generations

    def blocks(self, groups_per_block: int) -> list[range]:
        """The groups that are drawn together, by index."""
        groups = range(len(self.prompts))
        return [groups[start : start + groups_per_block] for start in range(0, len(groups), groups_per_block)]


@dataclass
class Piece:
    """A part of a block that is drawn at once: its images as (group, image) pairs, and their paths."""

    keys: list[tuple[int, int]]
    trajectory: Trajectory
    references: dict[int, torch.Tensor] = field(default_factory=dict)  # mean of the frozen base, by step


@dataclass
class Rollout:
    """
    What became of a batch, of all processes: scores `(P, G, K)` fp64, NaN where a reward is missing, and win rates
    `(P, G)` if a judge compared the images; of this process the pieces by block, and the seconds.
    """

    batch: GroupBatch
    scores: np.ndarray
    preferences: np.ndarray | None = None
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    num_blocks: int = 0
    generate_time: float = 0.0
    reward_time: float = 0.0


Judge = Callable[..., np.ndarray]


class GroupRollout:
    """
    Draws and scores the groups of this process; `check_stop` is called before each block and may raise to stop.

    Blocks are fixed by `images_per_forward` and groups are never split, so that any number of processes computes the
    same images in the same batches.
    """

    def __init__(
        self, sampler: PolicySampler, rewards: RewardSet, config: PolicyGradientConfig, check_stop: Callable[[], None]
    ):
        self.sampler, self.rewards, self.config, self.check_stop = sampler, rewards, config, check_stop

    def latent_generators(self, batch: GroupBatch, keys: Sequence[tuple[int, int]]) -> list[torch.Generator]:
        """Generators of the initial latents, fresh, for replays as well."""
        seed, same = self.config.seed, self.config.init_same_noise
        return [make_generator(seed, "latents", batch.step, batch.micro, p, 0 if same else g) for p, g in keys]

    def draw(self, batch: GroupBatch, steps: Sequence[int], judge: Judge | None = None, **reward_context) -> Rollout:
        """
        The rollout of a batch, with zeros in place of what other processes draw.

        Args:
            batch (`GroupBatch`), steps (`Sequence[int]`): `P` prompts, and the trained steps of the sampler.
            judge (`Callable`, *optional*): Called with the prompts of a block, their groups of images, their columns,
                and the keywords `where` and those of `reward_context`; returns `(groups, G)` win rates.
            **reward_context: Passed on to the reward functions; `log_extra_of` gives the `log_extra` of the images
                that are named by (prompt, image).
        """
        log_extra_of = reward_context.pop("log_extra_of", None)
        blocks = batch.blocks(self.config.groups_per_block)
        shape = len(batch.prompts), batch.num_generations
        rollout = Rollout(batch, np.zeros((*shape, len(self.rewards))), num_blocks=len(blocks))
        if judge is not None:
            rollout.preferences = np.zeros(shape)
        for block, groups in enumerate(blocks):
            if block % self.config.world_size != self.config.process_index:
                continue
            self.check_stop()
            keys = [(p, g) for p in groups for g in range(batch.num_generations)]
            started = time.perf_counter()
            images = self._draw_block(batch, block, keys, steps, rollout)
            drawn = time.perf_counter()
            where = f"step {batch.step}, prompts {groups[0]}-{groups[-1]}"
            values = self.rewards(
                [batch.prompts[p] for p, _ in keys],
                images,
                rows_of(batch.columns, [p for p, _ in keys]),
                where=where,
                groups=[p for p, _ in keys],
                step_prompts=batch.prompts,
                log_extra=log_extra_of(keys) if log_extra_of else None,
                **reward_context,
            )
            rollout.scores[list(groups)] = np.asarray(values).reshape(len(groups), batch.num_generations, -1)
            if judge is not None and rollout.preferences is not None:
                size = batch.num_generations
                rollout.preferences[list(groups)] = judge(
                    [batch.prompts[p] for p in groups],
                    [images[start : start + size] for start in range(0, len(images), size)],
                    rows_of(batch.columns, groups),
                    where=where,
                    **reward_context,
                )
            rollout.generate_time += drawn - started
            rollout.reward_time += time.perf_counter() - drawn
        return rollout

    def _draw_block(
        self, batch: GroupBatch, block: int, keys: list[tuple[int, int]], steps: Sequence[int], rollout: Rollout
    ) -> list[Image.Image]:
        images = []
        size = self.config.images_per_forward
        for piece in (keys[start : start + size] for start in range(0, len(keys), size)):
            noise = [make_generator(self.config.seed, "transitions", batch.step, batch.micro, *key) for key in piece]
            prompts, columns = [batch.prompts[p] for p, _ in piece], rows_of(batch.columns, [p for p, _ in piece])
            drawn, trajectory = self.sampler.rollout(
                prompts, self.latent_generators(batch, piece), noise, steps, columns=columns
            )
            images += drawn
            rollout.pieces.setdefault(block, []).append(Piece(piece, trajectory))
        return images
