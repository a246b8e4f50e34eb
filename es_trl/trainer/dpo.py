"""DiffusionDPOTrainer: direct preference optimisation, on drawn pairs or on a data set of them."""

import logging
import math
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..es import make_generator
from ..pipelines import DenoisingModel, DifferentiableForward
from .base import DiffusionTrainer
from .dpo_config import DiffusionDPOConfig
from .dpo_loss import PairErrors, dpo_loss, draw_noise, pair_errors
from .dpo_pairs import Pairs, best_and_worst, check_pairs, pictures_of, slices, totals


logger = logging.getLogger(__name__)


class DiffusionDPOTrainer(DiffusionTrainer):
    """
    Post-trains a LoRA on a frozen Sana Sprint or Sana pipeline by Diffusion-DPO (arXiv 2311.12908).

    Online, each step draws `num_generations` images of each prompt and makes a pair of the best and the worst one by
    the reward functions; offline the training data has the pairs. The adapter learns to denoise the chosen image
    better, and the rejected one worse, than the frozen base does, at noise that the two share.

    Args: as in [`DiffusionTrainer`], with `args` a [`DiffusionDPOConfig`]. Offline, `train_dataset` has the columns
        "prompt", "chosen" and "rejected" (PIL images, paths or bytes) or those of Pick-a-Pic, and `reward_funcs` are
        only measured, in evaluations.

    Example:
        ```python
        from es_trl import DiffusionDPOConfig, DiffusionDPOTrainer

        trainer = DiffusionDPOTrainer(
            model="tiny-sana-sprint",
            reward_funcs="tiny-pickscore",
            args=DiffusionDPOConfig(output_dir="outputs/dpo", max_steps=20, guidance_scale=2.0),
            train_dataset="tiny-train",
        )
        trainer.train()
        ```
    """

    config_class = DiffusionDPOConfig
    method_name = "dpo"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.denoising = DenoisingModel(self.adapter)
        self.forward = DifferentiableForward(self.adapter)
        if self.args.checkpoint_activations:
            self.adapter.denoiser.enable_gradient_checkpointing()
        self._warned_ties = False

    def _space(self, args: DiffusionDPOConfig) -> str:
        return args.es_space

    def _check_datasets(self, train_dataset, eval_dataset, args: DiffusionDPOConfig) -> tuple[Dataset, Dataset | None]:
        train_dataset, eval_dataset = super()._check_datasets(train_dataset, eval_dataset, args)
        if not args.online:
            train_dataset = check_pairs(train_dataset, args.chosen_column, args.rejected_column)
            if len(train_dataset) < args.prompts_per_step:
                raise ValueError(
                    f"{len(train_dataset)} pairs are fewer than prompts_per_step={args.prompts_per_step}."
                )
        return train_dataset, eval_dataset

    @property
    def images_per_batch(self) -> int:
        return self.args.prompts_per_step * self.args.num_generations if self.args.online else 0

    # ---- one step ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Makes the pairs of a batch of prompts and adds the gradient of the mean DPO loss to `.grad`."""
        started = time.perf_counter()
        step, micro = self.state.global_step, self.next_micro()
        mine = list(range(self.args.process_index, len(inputs), self.args.world_size))
        pairs = self._draw_pairs(inputs, mine, step, micro) if self.args.online else self._read_pairs(inputs, mine)
        total = int(self.gather(torch.tensor([len(pairs)])).sum())
        losses = []
        for iteration in range(self.args.num_iterations):
            if iteration:
                self._update()
            losses.append(self._gradient(pairs, total, (step, micro, iteration)))
        if not total and not self._warned_ties:
            self._warned_ties = True
            logger.warning("Step %d: no prompt has a best and a worst image, so there is nothing to learn.", step)
        seconds = time.perf_counter() - started
        self.add_metric("step_time", seconds)
        self.add_metric("images_per_second", self.images_per_batch / seconds)
        if torch.cuda.is_available():
            self.add_metric("memory/peak_gb", torch.cuda.max_memory_allocated() / 1e9)
        loss = sum(losses) / len(losses) / self.current_gradient_accumulation_steps
        return torch.tensor(loss, device=self.args.device)

    def _update(self) -> None:
        """An update between two passes over the same pairs; the Trainer makes the last one of a step."""
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradient(self, pairs: Pairs, total: int, key: tuple[int, int, int]) -> float:
        """Adds the gradient of the mean loss over all processes' pairs to `.grad`, and returns that loss."""
        config, device = self.args, self.args.device
        items = [(i, draw) for i in range(len(pairs)) for draw in range(config.noise_draws)]
        scale = 1 / (max(total, 1) * config.noise_draws)
        sums = torch.zeros(5, dtype=torch.float64)  # loss, chosen, rejected, margin, accuracy
        theta = list(self.adapter.theta.values())
        gradient = [torch.zeros_like(parameter) for parameter in theta]
        for part in slices(len(items), config.images_per_backward // 2):
            places = [i for i, _ in items[part]]
            draws = [draw_noise(config, pairs.chosen.shape[1:], (*key, pairs.indices[i], d)) for i, d in items[part]]
            noise, levels = (torch.stack(values).to(device) for values in zip(*draws, strict=True))
            with self.forward.enabled():
                prompts = [pairs.prompts[i] for i in places]
                errors = pair_errors(
                    self.denoising, pairs.chosen[places], pairs.rejected[places], noise, levels, prompts
                )
                loss = dpo_loss(errors, config.beta, config.loss_type)
                found = torch.autograd.grad(loss.sum() * scale, theta, allow_unused=True)
            for have, new in zip(gradient, found, strict=True):
                if new is not None:
                    have += new
            sums += self._sums(loss, errors)
        accumulation = self.current_gradient_accumulation_steps
        for parameter, value in zip(theta, gradient, strict=True):
            value = self.gather(value).sum(dim=0) / accumulation
            parameter.grad = value if parameter.grad is None else parameter.grad.add_(value)
        means = self.gather(sums).sum(dim=0) * (scale if total else math.nan)
        for name, value in zip(("chosen", "rejected", "margins", "accuracies"), means[1:].tolist(), strict=True):
            self.add_metric(f"rewards/{name}", value)
        return float(means[0]) if total else 0.0

    def _sums(self, loss: torch.Tensor, errors: PairErrors) -> torch.Tensor:
        chosen, rejected = (values.detach() for values in errors.rewards(self.args.beta))
        columns = [loss.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float()]
        return torch.stack(columns).double().sum(dim=1).cpu()

    # ---- pairs ----

    def _read_pairs(self, rows: list[dict[str, Any]], mine: list[int]) -> Pairs:
        pictures = [pictures_of(rows[j], self.args.chosen_column, self.args.rejected_column) for j in mine]
        pairs = Pairs([rows[j]["prompt"] for j in mine], mine)
        latents = []
        flat = [picture for pair in pictures for picture in pair]
        for part in slices(len(flat), self.args.images_per_forward):
            latents.append(self.denoising.encode(flat[part]))
        if latents:
            pairs.chosen, pairs.rejected = torch.cat(latents).unflatten(0, (-1, 2)).unbind(1)
        return pairs

    @torch.no_grad()
    def _draw_pairs(self, rows: list[dict[str, Any]], mine: list[int], step: int, micro: int) -> Pairs:
        """Draws and scores the images of this process's prompts; best against worst."""
        config, group = self.args, self.args.num_generations
        keys = [(j, g) for j in mine for g in range(group)]
        names = [name for name in rows[0] if name != "prompt"]
        scores = np.zeros((len(rows), group, len(self.rewards)))
        latents: list[torch.Tensor] = []
        times = [0.0, 0.0]
        for part in slices(len(keys), config.images_per_forward):
            prompts = [rows[j]["prompt"] for j, _ in keys[part]]
            generators = [make_generator(config.seed, "latents", step, micro, j, g) for j, g in keys[part]]
            started = time.perf_counter()
            with self.denoising.recording_latents() as drawn:
                images = self._draw(prompts, generators)
            latents += drawn
            times[0] += time.perf_counter() - started
            started = time.perf_counter()
            values = self.rewards(
                prompts,
                images,
                {name: [rows[j][name] for j, _ in keys[part]] for name in names},
                trainer_state=self.state,
                log_metric=self.add_metric,
                where=f"step {step}, prompts {keys[part][0][0]}-{keys[part][-1][0]}",
            )
            scores[tuple(zip(*keys[part], strict=True))] = values
            times[1] += time.perf_counter() - started
        self.add_metric("dpo/generate_time", times[0])
        self.add_metric("dpo/reward_time", times[1])
        scores = self.gather(torch.from_numpy(scores)).sum(dim=0).numpy()  # zero where another process has drawn
        values = totals(scores, self.rewards, config.multi_objective_aggregation)
        found = best_and_worst(values)
        self._log_rewards(scores, values, found)
        self._refuse_invalid(scores, rows)
        place = {key: i for i, key in enumerate(keys)}
        found = [row for row in found if row[0] in mine]
        pairs = Pairs([rows[j]["prompt"] for j, _, _ in found], [j for j, _, _ in found])
        if found:
            drawn = torch.cat(latents)
            pairs.chosen = drawn[[place[j, best] for j, best, _ in found]]
            pairs.rejected = drawn[[place[j, worst] for j, _, worst in found]]
        return pairs

    def _draw(self, prompts: list[str], generators: list[torch.Generator]) -> list:
        if self.args.draw_with == "adapter":
            return self.adapter.generate(prompts, generators)
        with self.adapter.adapter_disabled():
            return self.adapter.generate(prompts, generators)

    def _refuse_invalid(self, scores: np.ndarray, rows: list[dict[str, Any]]) -> None:
        missing = ~np.isfinite(scores)
        share = missing.any(axis=2).mean()
        if share > self.args.max_invalid_fraction:
            names = [name for name, bad in zip(self.rewards.names, missing.any(axis=(0, 1)), strict=True) if bad]
            raise RuntimeError(
                f"Step {self.state.global_step}: {share:.0%} of the images have no finite reward "
                f"({', '.join(names)}), more than max_invalid_fraction={self.args.max_invalid_fraction}. The adapter "
                "was not updated. Check the reward function on these prompts, the first being "
                f"{rows[0]['prompt'][:80]!r}, or raise max_invalid_fraction."
            )

    def _log_rewards(self, scores: np.ndarray, values: np.ndarray, found: list[tuple[int, int, int]]) -> None:
        weighted = self.rewards.total(scores)
        weighted = weighted[np.isfinite(weighted)]
        self.add_metric("reward", weighted.mean() if weighted.size else math.nan)
        self.add_metric("reward_std", weighted.std() if weighted.size else math.nan)
        self.add_metric("frac_reward_zero_std", 1 - len(found) / len(values))
        for k, name in enumerate(self.rewards.names):
            column = scores[..., k][np.isfinite(scores[..., k])]
            self.add_metric(f"rewards/{name}/mean", column.mean() if column.size else math.nan)
            self.add_metric(f"rewards/{name}/std", column.std() if column.size else math.nan)
        gaps = [values[j, best] - values[j, worst] for j, best, worst in found]
        self.add_metric("dpo/reward_gap", np.mean(gaps) if gaps else math.nan)
