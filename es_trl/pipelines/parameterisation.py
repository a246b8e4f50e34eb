"""What models predict: how latents `z` and noise `eps` are mixed at a noise level `s` in [0, 1], and the target."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class Parameterisation(ABC):
    """A mixture `x = a z + b eps` of shares that depend on `s`."""

    unit: float = 1.0  # the standard deviation that the scheduler's latents have

    @abstractmethod
    def shares(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`a` and `b`."""

    @abstractmethod
    def times(self, s: torch.Tensor) -> torch.Tensor:
        """The scheduler's times."""

    def target(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """What the model is to predict; of the two below `v = a eps - b z`."""
        a, b = self.shares(s)
        return a * eps - b * z

    def noised(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The latents that the model is given."""
        a, b = self.shares(s)
        return a * z + b * eps

    def ends(self, _times: torch.Tensor) -> list[torch.Tensor]:
        """What a list of times has after the last one."""
        return []


@dataclass
class Flow(Parameterisation):
    """The velocity `v = eps - z` at `x = (1 - s) z + s eps`."""

    num_train_timesteps: int

    def shares(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - s, s

    def target(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return eps - z

    def times(self, s: torch.Tensor) -> torch.Tensor:
        return s * self.num_train_timesteps


@dataclass
class TrigFlow(Parameterisation):
    """`F = cos t eps - sin t z` at `x = cos t z + sin t eps` with `tan t = s / (1 - s)` (arXiv 2410.11081)."""

    unit: float

    def shares(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.times(s).cos(), self.times(s).sin()

    def times(self, s: torch.Tensor) -> torch.Tensor:
        return torch.atan2(s, 1 - s)

    def ends(self, times: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros_like(times)]


@dataclass
class Diffusion(Parameterisation):
    """
    The noise `eps`, `v = sqrt(a) eps - sqrt(1 - a) z` or `z` at `x = sqrt(a) z + sqrt(1 - a) eps`, with `a` the
    schedule's at the share `s` of its steps.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    def shares(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.alphas_cumprod.to(s.device, torch.float32)[self.times(s)]
        return a.sqrt(), (1 - a).sqrt()

    def target(self, z: torch.Tensor, eps: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return {"epsilon": eps, "v_prediction": super().target(z, eps, s), "sample": z}[self.prediction_type]

    def times(self, s: torch.Tensor) -> torch.Tensor:
        return (s * (len(self.alphas_cumprod) - 1)).round().long()
