"""The loss of Diffusion-DPO (arXiv 2311.12908, Eq. 14) on noisy latents, and the noise it is taken at."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..es import make_generator
from ..pipelines import DenoisingModel
from .dpo_config import DiffusionDPOConfig


@dataclass
class PairErrors:
    """Denoising errors `(n,)` fp32 of the preferred and the other image, with the adapter and with the base."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_base: torch.Tensor
    rejected_base: torch.Tensor

    def rewards(self, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        DPO's implicit rewards `(n,)` of the two: `beta` times the gain in log-likelihood over the base, to which the
        error is the bound: `-beta / 2 (e - e_base)`.
        """
        return -beta / 2 * (self.chosen - self.chosen_base), -beta / 2 * (self.rejected - self.rejected_base)


def dpo_loss(errors: PairErrors, beta: float, loss_type: str) -> torch.Tensor:
    """
    `(n,)` losses. With the implicit rewards `r`: `-log sigmoid(r_chosen - r_rejected)` for `"sigmoid"`;
    `((r_chosen - r_rejected) / beta - 1 / (2 beta))^2` for `"ipo"` (arXiv 2310.12036, Eq. 17).
    """
    chosen, rejected = errors.rewards(beta)
    margin = chosen - rejected
    return -F.logsigmoid(margin) if loss_type == "sigmoid" else (margin / beta - 1 / (2 * beta)).square()


def pair_errors(
    model: DenoisingModel,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
    prompts: list[str],
    columns: dict[str, list] | None = None,
) -> PairErrors:
    """
    Errors of n pairs, `(n, ...)` latents each, at the same noise `(n, ...)` and noise levels `(n,)` for both
    images of a pair, which have one prompt and its columns. Differentiable in theta inside
    [`~es_trl.pipelines.DifferentiableForward`].
    """
    columns = {name: [*values, *values] for name, values in (columns or {}).items()}
    inputs = torch.cat([chosen, rejected]), torch.cat([noise] * 2), torch.cat([levels] * 2), prompts * 2, columns
    with torch.no_grad(), model.adapter.adapter_disabled():
        base = model.error(*inputs)
    return PairErrors(*model.error(*inputs).chunk(2), *base.chunk(2))


def draw_noise(
    config: DiffusionDPOConfig, shape: tuple[int, ...], key: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One draw for one pair, a pure function of the config's seed and `key`: (step, micro, iteration, prompt, draw).

    Returns:
        Noise of `shape`, that of a latent, and the level, a scalar in `[min_noise_level, max_noise_level]` that is
        distributed as the config says; fp32, on the CPU.
    """
    generator = make_generator(config.seed, "dpo_noise", *key)
    u = torch.rand((), generator=generator, dtype=torch.float64)
    low, high = (torch.tensor(v, dtype=torch.float64) for v in (config.min_noise_level, config.max_noise_level))
    if config.noise_level_sampling == "uniform":
        level = low + (high - low) * u
    else:
        # The inverse distribution function, restricted to the range.
        mean, std = config.logit_mean, config.logit_std
        low, high = (torch.special.ndtr((torch.logit(v) - mean) / std) for v in (low, high))
        level = torch.sigmoid(mean + std * torch.special.ndtri(low + (high - low) * u))
    return torch.randn(shape, generator=generator), level.float()
