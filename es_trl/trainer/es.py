"""ESTrainer: evolution strategies as the backward pass."""

import logging
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..es import Fitness, NoiseBank, compute_fitness, gradient, pair_snr
from ..names import checked
from ..run.memory import peak_memory_gb
from .base import DiffusionTrainer
from .es_config import ESConfig
from .reward_checks import log_rewards, refuse_missing
from .rollout import PopulationRollout, PopulationStep, PromptBatch
from .work_shares import warn_if_idle


logger = logging.getLogger(__name__)


class ESTrainer(DiffusionTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline from black-box rewards by EGGROLL (arXiv 2511.16652).

    Each step draws the same prompts and latents with every member `theta + sigma E_i` of a population (of a group of
    members, with `prompts_per_member`), scores the images, and writes the ES estimate into `.grad`; `training_step`
    returns minus the mean reward. Nothing is backpropagated, so the reward may be any Python function.

    Args: as in [`DiffusionTrainer`], with `args` an [`ESConfig`].

    Example:
        ```python
        from es_trl import ESConfig, ESTrainer

        trainer = ESTrainer(
            model="tiny-sana-sprint",
            reward_funcs="tiny-pickscore",
            args=ESConfig(output_dir="outputs/first", max_steps=20, guidance_scale=2.0, max_sequence_length=16),
            train_dataset="tiny-train",
        )
        trainer.train()
        trainer.save_model()
        ```
    """

    config_class = ESConfig
    method_name = "es"
    keeps_journal = True

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config: ESConfig = self.args
        self.population = config.population()
        shapes = {site.name: tuple(site.theta.shape) for site in self.adapter.space.sites}
        self.noise = NoiseBank(config.seed, shapes, config.noise_rank, config.noise_reuse)
        self.rollout = PopulationRollout(
            self.adapter,
            self.rewards,
            self.population,
            config.sigma,
            config.members_per_forward,
            config.seed,
            config.process_index,
            config.world_size,
            self.check_own_stop,
        )
        self.last_step: PopulationStep | None = None
        shares = len(self.population.chunks(config.members_per_forward))
        warn_if_idle(config.world_size, shares, "population_size", "members_per_forward")
        self.add_callback(AdapterBoundsCallback(self))
        self._warned_constant = False

    def _space(self, args: ESConfig) -> str:
        return args.es_space

    @property
    def images_per_batch(self) -> int:
        return self.population.size * self.args.images_per_member

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One population on one batch of prompts: adds the ES gradient to `.grad`, returns minus the mean reward."""
        started = time.perf_counter()
        step, micro = self.state.global_step, self.next_micro()
        batch = PromptBatch.from_rows(inputs, self.args.images_per_prompt)
        noise_started = time.perf_counter()
        factors = self.noise.draw(step, range(self.population.num_directions), micro, self.args.device)
        noise_seconds = time.perf_counter() - noise_started
        bytes_before = self.peers.bytes_sent
        with self.peers.together(f"step {step}"):
            scores, times = self.rollout.scores(
                batch, factors, step, micro, trainer_state=self.state, log_metric=self.add_metric
            )
        update_started = time.perf_counter()
        scores = self._collect(scores)
        fitness = self._fitness(scores, batch)
        accumulation = self.current_gradient_accumulation_steps
        for site in self.adapter.space.sites:
            grad = gradient(factors[site.name], fitness.values, self.population, self.args.sigma, fitness.num_valid)
            grad = grad / accumulation
            site.theta.grad = grad if site.theta.grad is None else site.theta.grad.add_(grad)
        update_seconds = time.perf_counter() - update_started
        self._log_step(scores, fitness)
        seconds = time.perf_counter() - started
        self.add_metric("step_time", seconds)
        self.add_metric("images_per_second", self.images_per_batch / seconds)
        self.add_metric("es/generate_time", times.generate)
        self.add_metric("es/reward_time", times.reward)
        self.add_metric("es/overhead", (noise_seconds + update_seconds) / seconds)
        self.add_metric("es/comm_bytes", self.peers.bytes_sent - bytes_before)
        self.last_step = PopulationStep(step, micro, batch, factors, scores, fitness)
        reward = fitness.rewards[torch.isfinite(fitness.rewards)].mean()
        return -(reward / accumulation).to(self.args.device, torch.float32)

    def _collect(self, scores: torch.Tensor) -> torch.Tensor:
        """Takes every member's scores from the process that drew it: only these few numbers travel."""
        parts = self.peers.gather(scores)
        owners = torch.tensor([self.rollout.owner(member) for member in range(self.population.size)])
        return parts[owners, torch.arange(self.population.size)]

    def _fitness(self, scores: torch.Tensor, batch: PromptBatch) -> Fitness:
        fitness = compute_fitness(
            scores,
            self.population,
            torch.from_numpy(self.rewards.weights),
            self.args.scale_rewards,
            self.args.fitness_shaping,
            self.args.multi_objective_aggregation,
        )
        invalid = 1 - fitness.num_valid / self.population.size
        refuse_missing(
            invalid,
            "members",
            scores,
            self.rewards.names,
            self.state.global_step,
            batch.prompts[0],
            self.args.max_invalid_fraction,
        )
        if fitness.zero_spread.all() and not self._warned_constant:
            self._warned_constant = True
            logger.warning(
                "Step %d: every member got the same reward on every prompt, so this step changes nothing. The reward "
                "may be constant, or sigma=%g too small to show in it.",
                self.state.global_step,
                self.args.sigma,
            )
        return fitness

    def _log_step(self, scores: torch.Tensor, fitness: Fitness) -> None:
        log_rewards(self.add_metric, fitness.rewards, scores, self.rewards.names, fitness.zero_spread)
        self.add_metric("es/sigma", self.args.sigma)
        self.add_metric("es/valid_pairs", fitness.num_valid / self.population.size)
        if self.population.antithetic:
            self.add_metric("es/pair_snr", pair_snr(fitness.values, self.population))
        self.add_metric("memory/peak_gb", peak_memory_gb(self.args.device))


class AdapterBoundsCallback(TrainerCallback):
    """Keeps theta near its start: `max_update_norm`, `anchor_decay`, `max_adapter_norm`, in that order, each step."""

    def __init__(self, trainer: ESTrainer):
        self.trainer = trainer
        self.theta = list(trainer.adapter.theta.values())
        self.anchor = [parameter.detach().clone() for parameter in self.theta]
        self.before: list[torch.Tensor] = []

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = [parameter.detach().clone() for parameter in self.theta]

    @torch.no_grad()
    def on_optimizer_step(self, args: ESConfig, state, control, **kwargs):
        update = [parameter - before for parameter, before in zip(self.theta, self.before, strict=True)]
        norm = _norm(update)
        if args.max_update_norm is not None and norm > args.max_update_norm:
            for parameter, before, change in zip(self.theta, self.before, update, strict=True):
                parameter.copy_(before + change * (args.max_update_norm / norm))
            norm = args.max_update_norm
        if args.anchor_decay:
            for parameter, anchor in zip(self.theta, self.anchor, strict=True):
                parameter.lerp_(anchor, args.anchor_decay)
        distance = _norm([parameter - anchor for parameter, anchor in zip(self.theta, self.anchor, strict=True)])
        if args.max_adapter_norm is not None and distance > args.max_adapter_norm:
            for parameter, anchor in zip(self.theta, self.anchor, strict=True):
                parameter.copy_(anchor + (parameter - anchor) * (args.max_adapter_norm / distance))
            distance = args.max_adapter_norm
        self.trainer.add_metric("es/update_norm", norm)
        self.trainer.add_metric("es/adapter_norm", distance)


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())
