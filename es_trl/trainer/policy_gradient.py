"""PolicyGradientTrainer: rollouts, advantages, and the clipped policy gradient that DDPO, GRPO and Pref-GRPO share."""

import time
from abc import abstractmethod
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ..es import make_generator
from ..evaluation import EvaluationRow
from ..names import checked
from ..pipelines import Gaussian, PolicySampler, PolicySettings, dtype_of, rounding_limit, watching_layers
from ..run.metrics import log_cost
from .base import DiffusionTrainer
from .gradient_trainer import GradientTrainer
from .group_rollout import GroupBatch, GroupRollout, Judge, Piece, Rollout
from .policy_gradient_config import PolicyGradientConfig


FIRST_RATIO_LIMIT = 2.0  # times the dtype's rounding limit: log-probabilities are means over thousands of pixels


class PolicyGradientTrainer(GradientTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline by policy gradients over its denoising steps.

    The steps of a stochastic sampler are the actions of a Gaussian policy. Each training step draws a group of images
    per prompt with the pipeline's own call, scores them, and for every image of advantage A and every trained step
    with log-probability ratio r minimises `max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon))`. A subclass says what the
    advantage is.

    Args: as in [`DiffusionTrainer`], with `args` a [`PolicyGradientConfig`].
    """

    config_class = PolicyGradientConfig
    metric_prefix = "policy"

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config: PolicyGradientConfig = self.args
        self.sampler = PolicySampler(self.adapter, self._policy_settings(config))
        if config.sde_window_size is not None and config.sde_window_size > len(self.sampler.stochastic_steps):
            raise ValueError(
                f"sde_window_size={config.sde_window_size} is more than the {len(self.sampler.stochastic_steps)} "
                "steps of a rollout that have a density; lower it, or leave it out to train all of them."
            )
        self._ratio_checked = False
        self.rollout = GroupRollout(self.sampler, self.rewards, config, self.stopping.check_own)

    @staticmethod
    def _policy_settings(config: PolicyGradientConfig) -> PolicySettings:
        assert config.sample_num_steps is not None, "set where it is not given"
        return PolicySettings(
            config.sample_num_steps, config.intermediate_times, config.noise_level, config.output_noise
        )

    def evaluation_rows(self) -> list[EvaluationRow]:
        """Base and adapter at the protocol's steps, and at every other count of `eval_num_inference_steps`."""
        rows = super().evaluation_rows()
        for steps in self.args.eval_num_inference_steps:
            rows += [EvaluationRow(f"base@{steps}", False, steps), EvaluationRow(f"adapter@{steps}", True, steps)]
        return list({row.name: row for row in rows}.values())

    # ---- what a method says ----

    @abstractmethod
    def advantages(self, rollout: Rollout) -> np.ndarray:
        """`(P, G)` advantages from `rollout.scores`, the same on every process; 0 where a reward is missing."""

    def judge(self) -> Judge | None:
        """What compares the images of a group with each other, if the method does."""
        return None

    @property
    def beta(self) -> float:
        """Weight of the KL divergence from the frozen base."""
        return 0.0

    # ---- a training step ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One rollout and its updates: the last update's gradient is left in `.grad`; returns its loss."""
        started = time.perf_counter()
        step, micro = self.state.global_step, self.next_micro()
        batch = GroupBatch.from_rows(inputs, self.args.num_generations, step, micro)
        rollout = self._draw(batch)
        rewards = self.rewards.total(rollout.scores)
        self.check_and_log_rewards(rewards, rollout.scores, batch.prompts)
        advantages = np.clip(self.advantages(rollout), -self.args.advantage_clip, self.args.advantage_clip)
        images = np.arange(batch.num_generations)
        prompts = np.array(batch.prompts, dtype=object)[:, None]
        self.image_table.add(micro, rollout.scores, prompt=prompts, image=images, advantage=advantages)
        if not advantages.any():
            self.warn_once(
                "every image has an advantage of 0, so this step teaches nothing. The reward may be constant, or the "
                "rollouts of a prompt too much alike (intermediate_times, noise_level)."
            )
        if self.beta:
            self._add_references(rollout)
        sums: dict[str, float] = defaultdict(float)
        updates = self._updates(rollout)
        gradient_started = time.perf_counter()
        for number, blocks in enumerate(updates):
            loss = self._accumulate(rollout, torch.from_numpy(advantages), blocks, sums, first=number == 0)
            if number < len(updates) - 1:
                self._update_now()
        gradient_seconds = time.perf_counter() - gradient_started
        self._log_policy(sums)
        self.add_metric("policy/generate_time", rollout.generate_time)
        self.add_metric("policy/reward_time", rollout.reward_time)
        self.add_metric("policy/gradient_time", gradient_seconds)
        log_cost(self, started)
        return torch.tensor(loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def trained_steps(self) -> list[int]:
        """The denoising steps that are trained now: all that have a density, or the window's."""
        steps, size = self.sampler.stochastic_steps, self.args.sde_window_size
        if size is None:
            return steps
        start = self.state.global_step // self.args.sde_window_interval % (len(steps) - size + 1)
        return steps[start : start + size]

    def _draw(self, batch: GroupBatch) -> Rollout:
        idle = nullcontext() if self._ratio_checked else watching_layers(self.adapter, "they get no gradient")
        with self.share_of(f"step {batch.step}", "images_per_forward"), idle:
            context = {"trainer_state": self.state, "log_metric": self.add_metric}
            extras = self.image_table.extras(batch.step, batch.micro)
            rollout = self.rollout.draw(batch, self.trained_steps(), self.judge(), log_extra_of=extras, **context)
        rollout.scores = self.collect(rollout.scores)
        if rollout.preferences is not None:
            rollout.preferences = self.collect(rollout.preferences)
        return rollout

    def _updates(self, rollout: Rollout) -> list[list[int]]:
        """The blocks of every update: each pass deals all blocks, shuffled, to `steps_per_generation` updates."""
        updates = []
        for iteration in range(self.args.num_iterations):
            order = list(range(rollout.num_blocks))
            if self.args.steps_per_generation > 1:
                key = make_generator(self.args.seed, "minibatches", rollout.batch.step, iteration)
                order = torch.randperm(rollout.num_blocks, generator=key).tolist()
            parts = np.array_split(order, self.args.steps_per_generation)
            updates += [sorted(int(block) for block in part) for part in parts]
        return updates

    # ---- gradients ----

    def _check_first_ratio(self, step: int, deviation: float) -> None:
        """
        Raises `RuntimeError`, before anything is updated, if replaying a path under the weights that drew it gives
        another likelihood: the gradient would be that of another policy.
        """
        limit = FIRST_RATIO_LIMIT * rounding_limit(dtype_of(self.adapter.denoiser))
        if self._ratio_checked or not deviation > limit:
            self._ratio_checked = True
            return
        raise RuntimeError(
            f"Step {step}: the first probability ratio of {type(self.adapter.pipe).__name__} differs from 1 by "
            f"{deviation:.2g} (limit {limit:g} in {self.args.dtype}), so what is replayed is not what was drawn, and "
            "policy gradients would follow another policy. The adapter was not updated. Use ESTrainer, which needs no "
            "likelihoods, or a scheduler whose steps are Gaussian."
        )

    def _accumulate(
        self, rollout: Rollout, advantages: torch.Tensor, blocks: list[int], sums: dict[str, float], first: bool
    ) -> float:
        """Adds the gradient of the mean loss over the images of `blocks` to `.grad`; returns that loss."""
        gradients = self.block_gradients(blocks)
        groups = rollout.batch.blocks(self.prompts_per_block)
        images = sum(len(groups[block]) for block in blocks) * rollout.batch.num_generations
        totals: dict[str, float] = defaultdict(float)
        with self.share_of(f"step {rollout.batch.step}, gradient", "images_per_backward"):
            for block in gradients.mine:
                gradients.begin_block()
                for piece in rollout.pieces[block]:
                    self.stopping.check_own()
                    self._backward(piece, rollout.batch, advantages, images, totals, first)
                gradients.end_block()
        self.write_gradient(gradients)
        totals = self._sum_over_processes(totals)
        if first:
            self._check_first_ratio(rollout.batch.step, totals["max_ratio_deviation"])
        for name, value in totals.items():
            sums[name] = max(sums[name], value) if name.startswith("max_") else sums[name] + value
        return totals["loss"]

    def _backward(
        self,
        piece: Piece,
        batch: GroupBatch,
        advantages: torch.Tensor,
        images: int,
        totals: dict[str, float],
        first: bool,
    ) -> None:
        """Backpropagates the loss of a piece, `images_per_backward` at a time, each image weighing `1 / images`."""
        weight = 1 / (images * len(piece.trajectory.steps))
        for rows, steps, shared in self._parts(piece, batch.num_generations):
            keys, part = piece.keys[rows], piece.trajectory.rows(rows)
            A = torch.stack([advantages[p, g] for p, g in keys]).to(self.args.device, torch.float32)

            def visit(index: int, gaussian: Gaussian, state: torch.Tensor, part=part, A=A, rows=rows) -> None:
                log_ratio = self.log_ratio(gaussian, state, part.log_probs[index], part.means[index])
                kl = gaussian.kl(piece.references[index][rows]) if self.beta else None
                found = self._losses(log_ratio, A, kl)
                (found["loss"].sum() * weight).backward()
                for name, values in found.items():
                    totals[name] += values.sum().item() * weight
                if first:
                    deviation = (found["ratio"] - 1).abs().max().item()
                    totals["max_ratio_deviation"] = max(totals["max_ratio_deviation"], deviation)

            generators = self.rollout.latent_generators(batch, keys)
            self.sampler.replay(part, generators, visit, steps=steps, shared=shared)

    def _parts(self, piece: Piece, group: int) -> list[tuple[slice, list[int], int]]:
        """What is replayed at once: images, steps, and how many of the images are one row."""
        images, steps, size = len(piece.trajectory), piece.trajectory.steps, self.args.images_per_backward
        parts = []
        if self.args.init_same_noise and steps[:1] == [0] and len(piece.keys) % group == 0:
            # The first step of a group is one row, so a batch holds `size` groups of it.
            parts = [(slice(i, i + size * group), [0], group) for i in range(0, images, size * group)]
            steps = steps[1:]
        if steps:
            parts += [(slice(i, i + size), steps, 1) for i in range(0, images, size)]
        return parts

    def _losses(self, log_ratio: torch.Tensor, A: torch.Tensor, kl: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """`(B,)` losses of the images at one step, and what is logged of them."""
        ratio = torch.exp(log_ratio)
        clipped = torch.clamp(ratio, 1 - self.args.epsilon, 1 + self.args.epsilon_high)
        found = {
            "loss": torch.maximum(-A * ratio, -A * clipped),
            "clip_fraction": A * clipped < A * ratio,
            "approx_kl": 0.5 * log_ratio.square(),
            "ratio": ratio,
        }
        return found if kl is None else found | {"kl": kl, "loss": found["loss"] + self.beta * kl}

    def log_ratio(
        self, gaussian: Gaussian, state: torch.Tensor, old: torch.Tensor, old_mean: torch.Tensor
    ) -> torch.Tensor:
        """`(B,)`: log-probability of the drawn latents now, minus that of the policy that drew them."""
        return gaussian.log_prob(state) - old

    def _add_references(self, rollout: Rollout) -> None:
        """The frozen base's mean of every trained step."""
        for piece in (piece for pieces in rollout.pieces.values() for piece in pieces):

            def visit(index: int, gaussian: Gaussian, _state: torch.Tensor, piece=piece) -> None:
                piece.references[index] = gaussian.mean

            with self.adapter.adapter_disabled():
                generators = self.rollout.latent_generators(rollout.batch, piece.keys)
                self.sampler.replay(piece.trajectory, generators, visit, grad=False)

    def _sum_over_processes(self, totals: dict[str, float]) -> dict[str, float]:
        names = ("loss", "kl", "clip_fraction", "approx_kl", "ratio", "max_ratio_deviation")
        every = self.peers.gather(torch.tensor([totals[name] for name in names], dtype=torch.float64))
        return {
            name: float(values.max() if name.startswith("max_") else values.sum())
            for name, values in zip(names, every.T, strict=True)
        }

    def _log_policy(self, sums: dict[str, float]) -> None:
        updates = self.args.num_iterations * self.args.steps_per_generation
        for name in ("clip_fraction", "approx_kl", "ratio"):
            self.add_metric(f"policy/{name}", sums[name] / updates)
        self.add_metric("policy/ratio_deviation", sums["max_ratio_deviation"])
        if self.beta:
            self.add_metric("kl", sums["kl"] / updates)
