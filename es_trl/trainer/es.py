"""ESTrainer: evolution strategies as the backward pass."""

import inspect
import logging
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from ..data import load_prompts
from ..es import (
    Factors,
    Fitness,
    MeanUpdate,
    NoiseBank,
    StepNoise,
    compute_fitness,
    estimate,
    first_step,
    gradient,
    pair_snr,
    travel_left,
)
from ..hub.methods import Method, Paper
from ..names import checked
from ..pipelines import calibrate_sigma
from ..run.metrics import log_cost, log_pictures, log_rewards
from ..run.processes import warn_if_idle
from ..run.results import columns_of
from .base import DiffusionTrainer
from .es_config import ESConfig
from .rollout import PopulationRollout, PopulationStep, PromptBatch
from .watch import Scored, Watch, energy_by_kind


logger = logging.getLogger(__name__)


class ESTrainer(DiffusionTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline from black-box rewards by EGGROLL (arXiv 2511.16652).

    1. Every member `i` of a population draws with `theta + sigma E_i`, with the prompts and latents of its group.
    2. The rewards of its images, compared within the group, become its fitness `F_i`, of unit deviation.
    3. `theta += sigma eta_t S / sqrt(n)`: `S` is the sum of `F_i E_i` over all `n` members of the run so far. While
       `S` is no longer than noise would make it, the step is shortened to nothing.
    4. `sigma` is set once, so that a member changes the denoiser's output by `output_change`; the `eta_t` fall
       linearly to zero and add up to `travel`.
    5. The same members tell how everything that is scored changes along the last step. When the margin of the reward
       surely falls, theta goes back to where it was highest, the estimates are forgotten, and reward + margin is
       trained; when it falls again, the run is over.

    Nothing is backpropagated, so the reward may be any Python function. To the [`~transformers.Trainer`] this is the
    backward pass: `training_step` leaves minus the sum of `F_i E_i` in `.grad` and returns minus the mean reward.

    Args: as in [`DiffusionTrainer`], with `args` an [`ESConfig`].

    Example:
        ```python
        from es_trl import ESConfig, ESTrainer

        trainer = ESTrainer(
            model="tiny-sana-sprint",
            reward_funcs="tiny-pickscore",
            args=ESConfig(output_dir="outputs/first", max_steps=8, guidance_scale=2.0, max_sequence_length=16),
            train_dataset="tiny-train",
        )
        trainer.train()
        trainer.save_model()
        ```
    """

    config_class = ESConfig
    method_name = "es"
    about = Method(
        "ES",
        "evolution strategies (EGGROLL)",
        ("evolution-strategies", "eggroll"),
        (Paper("2511.16652", "Evolution Strategies at the Hyperscale", "sarkar2025eggroll", 2025,
               "Sarkar, Bidipta and Fellows, Mattie and Duque, Juan Agustin and others"),),
    )  # fmt: skip
    keeps_journal = True
    last_step: PopulationStep | None = None

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        given = inspect.signature(DiffusionTrainer.__init__).bind(self, *args, **kwargs).arguments
        if getattr(given.get("args"), "update", None) == "mean" and any(given.get("optimizers") or ()):
            raise ValueError('optimizers does not act with update="mean": leave it out, or set update="optimizer".')
        super().__init__(*args, **kwargs)
        config: ESConfig = self.args
        self.population, self.sigma = config.population(), config.sigma
        shapes = {site.name: tuple(site.theta.shape) for site in self.adapter.space.sites}
        self.noise = NoiseBank(config.seed, shapes, config.noise_rank, config.noise_reuse)
        self.scored = self._scored()
        self.watch: Watch | None = None
        size, place = config.members_per_forward, (config.process_index, config.world_size, self.stopping.check_own)
        self.rollout = PopulationRollout(
            self.adapter, self.scored.rewards, self.population, config.sigma, size, config.seed, *place
        )
        shares = len(self.population.chunks(size))
        warn_if_idle(config.world_size, shares, "population_size", "members_per_forward")
        self.add_callback(StepCallback(self))

    def _check_datasets(self, train_dataset, eval_dataset, args: ESConfig):
        if train_dataset is not None and args.prompts_by_rule:
            train_dataset = load_prompts(train_dataset)
            if args.prompts_per_step is not None and len(train_dataset) < args.prompts_per_step:
                args.fit_prompts(len(train_dataset))
                logger.info("prompts_per_step is %d: there are %d prompts.", args.prompts_per_step, len(train_dataset))
        return super()._check_datasets(train_dataset, eval_dataset, args)

    def _scored(self) -> Scored:
        """What scores the images of a step: the rewards, their margins, guards, and what is only watched."""
        config = self.args
        guards, others = config.guard_reward_funcs or [], config.slope_reward_funcs or []
        return Scored.of(self.rewards, guards, others, **config.scorer_place, **config.reward_calls)

    def train(self, *args, **kwargs):
        if self.sigma is None:
            self.sigma = self._calibrate()
        self.rollout.sigma = self.sigma
        return super().train(*args, **kwargs)

    def _calibrate(self) -> float:
        """Sigma by `output_change`; the first process measures it, the others take its number."""
        found = torch.zeros(1, dtype=torch.float64)
        with self.peers.together("the calibration of sigma"):
            if self.is_world_process_zero():
                columns = columns_of(self.train_dataset)
                self.prepare_prompts(self.train_dataset["prompt"], columns)
                prompts = self.train_dataset["prompt"][:8]
                self.prompt_blocks.encode(prompts)
                columns = {name: values[:8] for name, values in columns.items()}
                found[0] = calibrate_sigma(
                    self.adapter, prompts, self.noise, self.args.seed, self.args.output_change, columns
                )
        return float(self.peers.gather(found)[0])

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        if self.args.update == "optimizer":
            return super().create_optimizer(*args, **kwargs)
        assert self.sigma is not None
        update = MeanUpdate(self.adapter.theta.values(), self.args.travel, self.sigma)
        scaling = {"scale_rewards": self.args.scale_rewards, "aggregation": self.args.multi_objective_aggregation}
        names, when_turned = list(self.adapter.theta), self.args.when_margin_turns
        self.watch = Watch(self.scored, self.population, update, names, when_turned, scaling)
        self.optimizer = update
        return update

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        if self.args.update == "mean":  # the steps fall linearly to zero and add up to travel
            self.optimizer.param_groups[0]["lr"] = first_step(self.args.travel, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """As in [`DiffusionTrainer`], plus how often the watched margin has turned, and the travel that is left."""
        if self.watch is not None and "loss" in logs:
            left = travel_left(self.args.travel, self.state.global_step, self.state.max_steps)
            logs |= {"es/turns": self.watch.turns, "es/travel_left": left}
        super().log(logs, start_time)

    def run_record(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "scored": self.scored.record()}

    @property
    def images_per_batch(self) -> int:
        return self.population.size * self.args.images_per_member

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One population on one batch of prompts: adds its estimate to `.grad`, returns minus the mean reward."""
        started = time.perf_counter()
        step, micro = self.state.global_step, self.next_micro()
        batch = PromptBatch.from_rows(inputs, self.args.images_per_prompt)
        noise_started = time.perf_counter()
        # On the CPU, where they are drawn: a GPU holds those of the members it draws now, or those of one matrix.
        factors = self.noise.of_step(step, self.population.num_directions, micro)
        noise_seconds = time.perf_counter() - noise_started
        bytes_before = self.peers.bytes_sent
        with self.peers.together(f"step {step}"):
            context = {"trainer_state": self.state, "log_metric": self.add_metric}
            extras = self.image_table.extras(step, micro)
            scores, times = self.rollout.scores(batch, factors, step, micro, log_extra_of=extras, **context)
        update_started = time.perf_counter()
        scores = self._collect(scores)
        accumulation = self.current_gradient_accumulation_steps
        self._watch(scores, factors, last=micro == accumulation - 1)
        fitness = self._fitness(scores, batch)
        for part, block in factors.blocks():
            for site in self.adapter.space.sites:
                grad = self._gradient(block[site.name].to(site.theta.device), fitness, accumulation, part)
                site.theta.grad = grad if site.theta.grad is None else site.theta.grad.add_(grad)
        update_seconds = time.perf_counter() - update_started
        self._log_step(scores, fitness)
        prompts = [[batch.prompts[j] for j in self.population.columns(i, len(batch))] for i in range(len(scores))]
        members = np.arange(len(scores))[:, None]
        self.image_table.add(micro, scores, prompt=prompts, member=members, fitness=fitness.values[:, None])
        seconds = log_cost(self, started)
        self.add_metric("es/generate_time", times.generate)
        self.add_metric("es/reward_time", times.reward)
        self.add_metric("es/overhead", (noise_seconds + update_seconds) / seconds)
        self.add_metric("es/comm_bytes", self.peers.bytes_sent - bytes_before)
        log_pictures(self)
        self.last_step = PopulationStep(step, micro, batch, factors, scores, fitness)
        reward = self._rewards(scores)
        reward = reward[torch.isfinite(reward)].mean()
        return -(reward / accumulation).to(self.args.device, torch.float32)

    def _collect(self, scores: torch.Tensor) -> torch.Tensor:
        """Takes every member's scores from the process that drew it: only these few numbers travel."""
        parts = self.peers.gather(scores)
        owners = torch.tensor([self.rollout.owner(member) for member in range(self.population.size)])
        return parts[owners, torch.arange(self.population.size)]

    def _watch(self, scores: torch.Tensor, factors: StepNoise, last: bool) -> None:
        """Slopes of all that was scored; after the step's last prompt batch, whether the watched margin has turned."""
        if self.watch is None:
            return
        for name, slope in self.watch.slopes(scores, factors.blocks()).items():
            self.add_metric(f"es/slope/{name}", slope.value)
            self.add_metric(f"es/slope_error/{name}", slope.error)
        if last and self.watch.turned():
            what = "the run ends there" if self.watch.stopped else "from there reward + margin is trained"
            fallen = f"Step {self.state.global_step}: the {self.watch.watched} has surely fallen since its maximum"
            logger.warning("%s: theta goes back to it, and %s.", fallen, what)

    def _gradient(self, factors: Factors, fitness: Fitness, accumulation: int, part: slice) -> torch.Tensor:
        if self.args.update == "mean":
            return -self.population.size * estimate(factors, fitness.values, self.population, part)
        assert self.sigma is not None
        own = gradient(factors, fitness.values, self.population, self.sigma, fitness.num_valid, part)
        return own / accumulation

    def _rewards(self, scores: torch.Tensor) -> torch.Tensor:
        """`(N, C)`: the weighted rewards, whatever else is scored or trained by now."""
        weights = torch.from_numpy(self.rewards.weights)
        return compute_fitness(scores[:, :, : len(self.rewards)], self.population, weights).rewards

    def _fitness(self, scores: torch.Tensor, batch: PromptBatch) -> Fitness:
        columns, weights = list(range(len(self.rewards))), torch.from_numpy(self.rewards.weights)
        if self.watch is not None:
            columns, weights = self.watch.objective()
        scores = scores[:, :, columns]
        shaping = self.args.scale_rewards, self.args.fitness_shaping, self.args.multi_objective_aggregation
        fitness = compute_fitness(scores, self.population, weights, *shaping)
        if self.watch is not None:
            self.watch.optimizer.add_members(fitness.num_valid if fitness.values.any() else 0)
        names = [self.scored.rewards.names[k] for k in columns]
        self.refuse_missing(1 - fitness.num_valid / len(scores), "members", scores, names, batch.prompts[0])
        if fitness.zero_spread.all():
            self.warn_once(
                "every member got the same reward on every prompt, so this step changes nothing. The reward may be "
                f"constant, or sigma={self.sigma:g} too small to show in it."
            )
        return fitness

    def _log_step(self, scores: torch.Tensor, fitness: Fitness) -> None:
        rewards = self._rewards(scores)
        trained = scores[:, :, : len(self.rewards)]  # what is only watched shows in its slopes
        log_rewards(self, rewards, trained, fitness.zero_spread)
        assert self.sigma is not None
        self.add_metric("es/sigma", self.sigma)
        self.add_metric("es/valid_pairs", fitness.num_valid / self.population.size)
        if self.population.antithetic:
            self.add_metric("es/pair_snr", pair_snr(fitness.values, self.population))


class StepCallback(TrainerCallback):
    """Logs how far theta went and what the estimates found, and ends the run when its margin has turned for good."""

    def __init__(self, trainer: ESTrainer):
        self.trainer = trainer
        self.theta = list(trainer.adapter.theta.values())
        self.start = [parameter.detach().clone() for parameter in self.theta]
        self.before: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = [parameter.detach().clone() for parameter in self.theta]

    @torch.no_grad()
    def on_optimizer_step(self, args: ESConfig, state, control, **kwargs):
        trainer = self.trainer
        trainer.add_metric("es/update_norm", _distance(self.theta, self.before))
        trainer.add_metric("es/adapter_norm", _distance(self.theta, self.start))
        if trainer.watch is None:
            return
        for name, value in energy_by_kind(trainer.watch.optimizer, list(trainer.adapter.theta)).items():
            trainer.add_metric(f"es/{name}", value)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.watch is not None and self.trainer.watch.stopped:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        watch = self.trainer.watch
        if watch is None:
            return
        found = energy_by_kind(watch.optimizer, watch.names)
        if not found or found["signal"] >= 2 * found["signal_error"]:
            return
        shared, error = 100 * found["signal"], 100 * found["signal_error"]
        told = f"the members' fitness shares {shared:.1f} % (plus or minus {error:.1f}) of its variance."
        if error > 100:
            members, numbers = watch.optimizer.param_groups[0]["members"], sum(theta.numel() for theta in self.theta)
            told = f"{members} members in all cannot show one among {numbers:,} numbers."
        advice = "More images, a larger output_change or a less noisy reward may show one."
        logger.warning("No signal found: %s %s", told, advice)


def _distance(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return float(sum((this.detach() - that).square().sum() for this, that in zip(these, those, strict=True)) ** 0.5)
