"""DiffusionNFT (arXiv 2509.16117), for the head to head only: its author does not recommend it for distilled models.

Forward-process reinforcement: the images of a step are noised again, and the velocity is pulled towards each of them
(`v+`) as far as it is good, away from it (`v-`) as far as it is bad:

    r = 1/2 + clip(A, -5, 5) / 10,   v+ = (1 - b) v_old + b v,   v- = (1 + b) v_old - b v
    L = mean[ r |x0(v+) - x0|^2 / w+ + (1 - r) |x0(v-) - x0|^2 / w- ] + 1e-4 |v - v_ref|^2,   w = sg(mean |x0(v) - x0|)

`v` is what Sana Sprint predicts, with `x0(v) = cos t x - sin t v`.
Deviation: `v_old` is the adapter that drew the images (one update per step), not a moving average of adapters.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from es_trl import DiffusionDPOConfig, DiffusionDPOTrainer
from es_trl.hub.methods import Method, Paper
from es_trl.names import checked
from es_trl.run.metrics import log_cost
from es_trl.trainer.dpo_loss import draw_noise


@checked
@dataclass
class NFTConfig(DiffusionDPOConfig):
    """
    Settings of [`NFTTrainer`], beside those of [`DiffusionDPOConfig`], of which the pairs' do not act.

    Args:
        guidance_strength (`float`, *optional*, defaults to `1.0`): `b` above, above 0.
    """

    guidance_strength: float = field(default=1.0, metadata={"help": "Strength b of v+ and v-, above 0."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate."})


class NFTTrainer(DiffusionDPOTrainer):
    """On one process, without accumulation: a benchmark's opponent, not a method of the library."""

    config_class = NFTConfig
    about = Method(
        "DiffusionNFT",
        "DiffusionNFT",
        ("diffusion-nft",),
        (Paper("2509.16117", "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", "zheng2025nft", 2025,
               "Zheng, Kaiwen and others"),),
    )  # fmt: skip

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        started, step = time.perf_counter(), self.state.global_step
        keys = [(j, g) for j in range(len(inputs)) for g in range(self.args.num_generations)]
        latents, scores, _ = self._draw_and_score(inputs, keys, step, 0)
        prompts = [inputs[j]["prompt"] for j, _ in keys]
        rewards = self.rewards.total(scores)
        self.check_and_log_rewards(rewards, scores, [row["prompt"] for row in inputs])
        good = torch.from_numpy(optimality(rewards).reshape(-1)).float()
        gradients, loss = self.block_gradients([0]), 0.0
        gradients.begin_block()
        for first in range(0, len(keys), self.args.images_per_backward):
            part = slice(first, first + self.args.images_per_backward)
            for draw in range(self.args.noise_draws):
                drawn = [draw_noise(self.args, latents.shape[1:], (step, 0, 0, *key, draw)) for key in keys[part]]
                noise, levels = (torch.stack(values) for values in zip(*drawn, strict=True))
                value = self._loss(latents[part], noise, levels, prompts[part], good[part])
                (value.sum() / (len(keys) * self.args.noise_draws)).backward()
                loss += float(value.sum()) / (len(keys) * self.args.noise_draws)
        gradients.end_block()
        self.write_gradient(gradients)
        log_cost(self, started)
        return torch.tensor(loss)

    def _loss(self, x0, noise, levels, prompts, good) -> torch.Tensor:
        """`(n,)` losses, differentiable in theta."""
        t, b = self.denoising.kind.times(levels)[:, None, None, None], self.args.guidance_strength
        noisy = self.denoising.noised(x0, noise, levels)
        with torch.no_grad(), self.adapter.adapter_disabled():
            reference = self.denoising.predict(noisy, levels, prompts)
        with self.forward.enabled():
            v = self.denoising.predict(noisy, levels, prompts)
            old = v.detach()
            towards = _miss(t.cos() * noisy - t.sin() * ((1 - b) * old + b * v), x0)
            away = _miss(t.cos() * noisy - t.sin() * ((1 + b) * old - b * v), x0)
            return good * towards + (1 - good) * away + 1e-4 * (v - reference).square().mean(dim=(1, 2, 3))


def _miss(predicted: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """`(n,)`: mean squared error over the mean absolute one, which is not differentiated."""
    miss = predicted - x0
    size = miss.detach().abs().mean(dim=(1, 2, 3)).clamp(min=1e-5)
    return miss.square().mean(dim=(1, 2, 3)) / size


def optimality(rewards: np.ndarray) -> np.ndarray:
    """`(P, G)` in [0, 1]: rewards of a prompt's images, standardised and cut at five deviations."""
    spread = rewards.std(axis=1, keepdims=True)
    advantages = np.divide(
        rewards - rewards.mean(axis=1, keepdims=True), spread, where=spread > 0, out=np.zeros_like(rewards)
    )
    return 0.5 + np.clip(np.nan_to_num(advantages), -5, 5) / 10
