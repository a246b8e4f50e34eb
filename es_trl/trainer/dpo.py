"""DiffusionDPOTrainer: direct preference optimisation, on drawn pairs or on a data set of them."""

import math
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..es import make_generator
from ..hub.methods import Method, Paper
from ..names import checked
from ..pipelines import DenoisingModel, DifferentiableForward, rows_of, watching_layers
from ..run.metrics import log_cost
from .base import DiffusionTrainer
from .dpo_config import DiffusionDPOConfig
from .dpo_loss import dpo_loss, draw_noise, pair_errors
from .dpo_pairs import PICK_A_PIC, Pairs, best_and_worst, check_pairs, pictures_of, slices, totals
from .gradient_trainer import GradientTrainer
from .prompt_batches import columns_of


class DiffusionDPOTrainer(GradientTrainer):
    """
    Post-trains a LoRA on a frozen diffusers pipeline by Diffusion-DPO (arXiv 2311.12908): a model of a flow, a
    consistency model in TrigFlow's angles, or one that predicts the noise, v or the sample.

    Online, each step draws `num_generations` images of each prompt and makes a pair of the best and the worst one by
    the reward functions; offline the training data has the pairs. The adapter learns to denoise the chosen image
    better, and the rejected one worse, than the frozen base does, at noise that the two share.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DiffusionDPOConfig`]. Offline, `train_dataset` has the
    columns "prompt", "chosen" and "rejected" (PIL images, paths or bytes) or those of Pick-a-Pic, and `reward_funcs`
    are only measured, in evaluations.

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
    method_name = metric_prefix = "dpo"
    about = Method(
        "DPO",
        "Diffusion-DPO",
        ("diffusion-dpo", "dpo"),
        (Paper("2311.12908", "Diffusion Model Alignment Using Direct Preference Optimization",
               "wallace2023diffusiondpo", 2023, "Wallace, Bram and others"),),
    )  # fmt: skip

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.denoising = DenoisingModel(self.adapter)
        self.forward = DifferentiableForward(self.adapter)
        self._layers_checked = False

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
        return super().images_per_batch if self.args.online else 0

    # ---- one step ----

    @property
    def prompts_per_block(self) -> int:
        """As drawn online; offline as many pairs as one backward pass holds."""
        if self.args.online:
            return super().prompts_per_block
        return max(1, self.args.images_per_backward // (2 * self.args.noise_draws))

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Makes the pairs of a batch of prompts and adds the gradient of the mean DPO loss to `.grad`."""
        started = time.perf_counter()
        step, micro = self.state.global_step, self.next_micro()
        blocks = list(slices(len(inputs), self.prompts_per_block))
        pairs, total = (self._draw_pairs if self.args.online else self._read_pairs)(inputs, blocks, step, micro)
        if not total:
            self.warn_once("the images of every prompt have the same reward, so there is nothing to learn.")
        gradient_started = time.perf_counter()
        sums = np.zeros(5)
        for iteration in range(self.args.num_iterations):
            if iteration:
                self._update_now()
            idle = nullcontext() if self._layers_checked else watching_layers(self.adapter, "they get no gradient")
            with idle:
                sums += self._gradient(pairs, len(blocks), total, (step, micro, iteration))
            self._layers_checked = True
        loss, *implicit = sums / self.args.num_iterations
        for name, value in zip(("chosen", "rejected", "margins", "accuracies"), implicit, strict=True):
            self.add_metric(f"rewards/{name}", value if total else math.nan)
        self.add_metric("dpo/gradient_time", time.perf_counter() - gradient_started)
        log_cost(self, started)
        return torch.tensor(loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def _gradient(self, pairs: dict[int, Pairs], blocks: int, total: int, key: tuple[int, int, int]) -> np.ndarray:
        """Adds the gradient of the mean loss over all pairs to `.grad`; means of loss, rewards, margin, accuracy."""
        scale = 1 / (max(total, 1) * self.args.noise_draws)
        gradients = self.block_gradients(range(blocks))
        sums = torch.zeros(5, dtype=torch.float64)
        with self.share_of(f"step {key[0]}, gradient", "images_per_backward"):
            for block in gradients.mine:
                gradients.begin_block()
                sums += self._backward(pairs[block], scale, key)
                gradients.end_block()
        self.write_gradient(gradients)
        return (self.peers.gather(sums).sum(dim=0) * scale).numpy()

    def _backward(self, pairs: Pairs, scale: float, key: tuple[int, int, int]) -> torch.Tensor:
        """Backpropagates the losses of a block of pairs, at `noise_draws` draws each, times `scale`."""
        config = self.args
        items = [(i, draw) for i in range(len(pairs)) for draw in range(config.noise_draws)]
        sums = torch.zeros(5, dtype=torch.float64)
        for part in slices(len(items), config.images_per_backward // 2):
            self.stopping.check_own()
            places = [i for i, _ in items[part]]
            draws = [draw_noise(config, pairs.chosen.shape[1:], (*key, pairs.indices[i], d)) for i, d in items[part]]
            noise, levels = (torch.stack(values).to(config.device) for values in zip(*draws, strict=True))
            latents = pairs.chosen[places], pairs.rejected[places]
            prompts, columns = [pairs.prompts[i] for i in places], rows_of(pairs.columns, places)
            with self.forward.enabled():
                errors = pair_errors(self.denoising, *latents, noise, levels, prompts, columns)
                loss = dpo_loss(errors, config.beta, config.loss_type)
                (loss.sum() * scale).backward()
            chosen, rejected = (values.detach() for values in errors.rewards(config.beta))
            found = [loss.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float()]
            sums += torch.stack(found).cpu().double().sum(dim=1)  # MPS has no double
        return sums

    # ---- pairs ----

    def _read_pairs(
        self, rows: list[dict[str, Any]], blocks: list[slice], _step: int, _micro: int
    ) -> tuple[dict[int, Pairs], int]:
        """The pictures of the data set as latents: this process's blocks, and the number of all pairs."""
        pairs = {}
        with self.share_of("reading pairs", "images_per_forward"):
            for block, part in enumerate(blocks):
                if self.owner(block) == self.args.process_index:
                    chosen, rejected = self.args.chosen_column, self.args.rejected_column
                    pictures = [picture for row in rows[part] for picture in pictures_of(row, chosen, rejected)]
                    columns = columns_of(rows[part], (chosen, rejected, *PICK_A_PIC))
                    parts = slices(len(pictures), self.args.images_per_forward)
                    latents = torch.cat([self.denoising.encode(pictures[images], columns) for images in parts])
                    prompts = [row["prompt"] for row in rows[part]]
                    indices = list(range(part.start, part.stop))
                    pairs[block] = Pairs(prompts, columns, indices, *latents.unflatten(0, (-1, 2)).unbind(1))
        return pairs, len(rows)

    def _draw_pairs(
        self, rows: list[dict[str, Any]], blocks: list[slice], step: int, micro: int
    ) -> tuple[dict[int, Pairs], int]:
        """Draws and scores images, best against worst: this process's blocks, and the number of all pairs."""
        group = self.args.num_generations
        scores = np.zeros((len(rows), group, len(self.rewards)))
        latents: dict[int, torch.Tensor] = {}
        times = np.zeros(2)
        with self.share_of(f"step {step}", "images_per_forward"):
            for block, part in enumerate(blocks):
                if self.owner(block) == self.args.process_index:
                    keys = [(j, g) for j in range(part.start, part.stop) for g in range(group)]
                    latents[block], scores[part], seconds = self._draw_and_score(rows, keys, step, micro)
                    times += seconds
        self.add_metric("dpo/generate_time", float(times[0]))
        self.add_metric("dpo/reward_time", float(times[1]))
        scores = self.collect(scores)
        self.check_and_log_rewards(self.rewards.total(scores), scores, [row["prompt"] for row in rows])
        labels = np.array([row["prompt"] for row in rows], dtype=object)[:, None]
        self.image_table.add(micro, scores, prompt=labels, image=np.arange(group))
        values = totals(scores, self.rewards.weights, self.args.multi_objective_aggregation)
        found = best_and_worst(values)
        gaps = [values[j, best] - values[j, worst] for j, best, worst in found]
        self.add_metric("dpo/reward_gap", float(np.mean(gaps)) if gaps else math.nan)
        pairs = {}
        for block, drawn in latents.items():
            mine = [row for row in found if row[0] in range(len(rows))[blocks[block]]]
            indices, best, worst = np.array(mine, dtype=int).reshape(-1, 3).T.tolist()
            own, places = [rows[j] for j in indices], [j - blocks[block].start for j in indices]
            drawn = drawn.unflatten(0, (-1, group))
            prompts = [row["prompt"] for row in own]
            pairs[block] = Pairs(prompts, columns_of(own), indices, drawn[places, best], drawn[places, worst])
        return pairs, len(found)

    def _draw_and_score(
        self, rows: list[dict[str, Any]], keys: list[tuple[int, int]], step: int, micro: int
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Latents `(B, ...)` and scores `(P, G, K)` of the images of `keys`, and the seconds the two took."""
        started = time.perf_counter()
        own = [rows[j] for j, _ in keys]
        prompts, latents, images = [row["prompt"] for row in own], [], []
        for part in slices(len(keys), self.args.images_per_forward):
            self.stopping.check_own()
            generators = [make_generator(self.args.seed, "latents", step, micro, j, g) for j, g in keys[part]]
            base_draws = self.adapter.adapter_disabled() if self.args.draw_with == "base" else nullcontext()
            with self.denoising.recording_latents() as drawn, base_draws:
                images += self.adapter.generate(prompts[part], generators, columns=columns_of(own[part]))
            latents.append(torch.cat(drawn)[-len(generators) :])
        between = time.perf_counter()
        scores = self.rewards(
            prompts,
            images,
            columns_of(own),
            trainer_state=self.state,
            log_metric=self.add_metric,
            log_extra=self.image_table.extras(step, micro)(keys),
            where=f"step {step}, prompts {keys[0][0]}-{keys[-1][0]}",
            groups=[j for j, _ in keys],
            step_prompts=[row["prompt"] for row in rows],
        )
        times = np.array([between - started, time.perf_counter() - between])
        return torch.cat(latents), scores.reshape(-1, self.args.num_generations, len(self.rewards)), times
