"""The Gaussian steps of samplers, as policies: means, standard deviations, log-probabilities and KL divergences.

Log-probabilities and divergences are means over the dimensions of a latent, not sums, as in DDPO (arXiv 2305.13301)
and Flow-GRPO (arXiv 2505.05470): clip ranges of about 1e-4 belong to that convention.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Gaussian:
    """
    `N(mean, std^2 I)`: what the next latents are drawn from.

    Attributes:
        mean (`torch.Tensor`): `(B, ...)` fp32.
        std (`torch.Tensor`): Scalar, above 0.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """`(B, ...)`: the draw that belongs to standard normal `noise (B, ...)`."""
        return self.mean + self.std * noise

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """`(B,)`: log density at `x (B, ...)`, averaged over dimensions."""
        squares = (x.float() - self.mean).square().flatten(1).mean(dim=1)
        return -squares / (2 * self.std**2) - torch.log(self.std) - 0.5 * math.log(2 * math.pi)

    def kl(self, mean: torch.Tensor) -> torch.Tensor:
        """`(B,)`: KL divergence from this to the Gaussian with `mean` and the same std, averaged over dimensions."""
        return (self.mean - mean).square().flatten(1).mean(dim=1) / (2 * self.std**2)


def flow_sde_transition(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    sigma_second: torch.Tensor,
    noise_level: float,
) -> Gaussian:
    """
    One step of the SDE with the marginals of the flow ODE (Flow-GRPO, arXiv 2505.05470, Eq. 9). With
    `dt = sigma_next - sigma < 0` and `g = a sqrt(sigma / (1 - sigma))`:

        mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt        std = g sqrt(-dt)

    For `noise_level` to 0 this is the Euler step `x + v dt`.

    Args:
        velocity, sample (`torch.Tensor`): `(B, ...)` v = eps - x0 and the latents x.
        sigma, sigma_next (`torch.Tensor`): Noise level now and next, scalars, 1 >= sigma > sigma_next >= 0.
        sigma_second (`torch.Tensor`): The schedule's second level, in place of 1 in `1 - sigma` at the first step.
        noise_level (`float`): `a` above 0; 0.7 in the paper.
    """
    x, v = sample.float(), velocity.float()
    dt = sigma_next - sigma
    below = torch.where(sigma < 1, sigma, sigma_second)
    g = noise_level * torch.sqrt(sigma / (1 - below))
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return Gaussian(mean, g * torch.sqrt(-dt))
