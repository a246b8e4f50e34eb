"""What models predict: how latents `z` and noise `eps` are mixed at a noise level `s` in [0, 1], and the target."""

from dataclasses import dataclass

import torch


@dataclass
class Flow:
    """The velocity `v = eps - z` at `x = (1 - s) z + s eps`."""

    num_train_timesteps: int
    unit: float = 1.0

    def noised(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The latents that the model is given."""
        return (1 - s) * z + s * eps

    def target(self, z: torch.Tensor, eps: torch.Tensor, _s: torch.Tensor) -> torch.Tensor:
        """What it is to predict."""
        return eps - z

    def times(self, s: torch.Tensor) -> torch.Tensor:
        """The scheduler's times."""
        return s * self.num_train_timesteps

    def ends(self, _times: torch.Tensor) -> list[torch.Tensor]:
        """What a list of times has after the last one."""
        return []


@dataclass
class TrigFlow:
    """`F = cos t eps - sin t z` at `x = cos t z + sin t eps` with `tan t = s / (1 - s)` (arXiv 2410.11081)."""

    unit: float  # the standard deviation that the scheduler's latents have

    def noised(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The latents that the model is given."""
        t = self.times(s)
        return t.cos() * z + t.sin() * eps

    def target(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """What it is to predict."""
        t = self.times(s)
        return t.cos() * eps - t.sin() * z

    def times(self, s: torch.Tensor) -> torch.Tensor:
        """The scheduler's times."""
        return torch.atan2(s, 1 - s)

    def ends(self, times: torch.Tensor) -> list[torch.Tensor]:
        """What a list of times has after the last one."""
        return [torch.zeros_like(times)]


@dataclass
class Diffusion:
    """
    The noise `eps`, `v = sqrt(a) eps - sqrt(1 - a) z` or `z` at `x = sqrt(a) z + sqrt(1 - a) eps`, with `a` the
    schedule's at the share `s` of its steps.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str
    unit: float = 1.0

    def noised(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The latents that the model is given."""
        kept, noise = self._shares(s)
        return kept * z + noise * eps

    def target(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """What it is to predict."""
        kept, noise = self._shares(s)
        return {"epsilon": eps, "v_prediction": kept * eps - noise * z, "sample": z}[self.prediction_type]

    def times(self, s: torch.Tensor) -> torch.Tensor:
        """The scheduler's times."""
        return (s * (len(self.alphas_cumprod) - 1)).round().long()

    def ends(self, _times: torch.Tensor) -> list[torch.Tensor]:
        """What a list of times has after the last one."""
        return []

    def _shares(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.alphas_cumprod.to(s.device, torch.float32)[self.times(s)]
        return a.sqrt(), (1 - a).sqrt()
