"""GradientTrainer: what the methods that backpropagate through the denoiser share."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import TrainerCallback

from ..names import checked
from ..pipelines import is_cast
from ..rewards.results import zero_spread
from ..run.block_gradients import BlockGradients
from ..run.metrics import log_pictures, log_rewards
from ..run.processes import warn_if_idle
from .base import DiffusionTrainer
from .gradient_config import GradientConfig


class GradientTrainer(DiffusionTrainer):
    """
    The ground of [`PolicyGradientTrainer`] and [`DiffusionDPOTrainer`]: gradients that are the same on any number of
    processes, updates inside a step, and what both log.

    The images of a step are dealt in blocks of whole groups; block `c` belongs to process `c % world_size`.

    Args: as in [`DiffusionTrainer`], with `args` a [`GradientConfig`].
    """

    config_class = GradientConfig
    metric_prefix = "gradient"

    @checked(like=DiffusionTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.checkpoint_activations:
            if is_cast(self.adapter.denoiser):
                raise ValueError(
                    "checkpoint_activations=True does not work with weights that are cast layer by layer "
                    "(enable_layerwise_casting): set it to False, or quantise the base instead (quantization_config)."
                )
            self.adapter.denoiser.enable_gradient_checkpointing()
        blocks = math.ceil(self.args.prompts_per_step / self.prompts_per_block)
        lower = "images_per_forward" if self.images_per_batch else "images_per_backward"
        warn_if_idle(self.args.world_size, blocks, "prompts_per_step", lower)
        self.add_callback(AdapterNormsCallback(self))

    @property
    def images_per_batch(self) -> int:
        return self.args.prompts_per_step * self.args.num_generations

    @property
    def prompts_per_block(self) -> int:
        """Prompts that one process works on at a time; fixed by the config, so that results do not depend on W."""
        return self.args.groups_per_block

    def owner(self, block: int) -> int:
        """The process that draws `block` and computes its gradient."""
        return block % self.args.world_size

    # ---- gradients and updates ----

    def block_gradients(self, blocks: Sequence[int]) -> BlockGradients:
        """Collects the gradients of `blocks`, this process's and the others'."""
        return BlockGradients(list(self.adapter.theta.values()), blocks, self.owner, self.peers)

    def write_gradient(self, gradients: BlockGradients) -> None:
        """
        Adds the collected gradients to `.grad`, each micro-batch of an accumulated step with its share.

        Raises:
            `RuntimeError`: on all processes, if they are not finite; nothing has been updated with them.
        """
        gradients.write(1 / self.current_gradient_accumulation_steps)
        if not gradients.is_finite:
            raise RuntimeError(
                f"Step {self.state.global_step}: the gradient is not finite, so the adapter was not updated with it. "
                f"Lower learning_rate ({self.args.learning_rate:g}) or max_grad_norm, or draw in another dtype than "
                f"{self.args.dtype!r}: float16 overflows in some models."
            )

    def _update_now(self) -> None:
        """An update inside the step; the Trainer makes the last one."""
        self.stopping.begin_update()  # a checkpoint has to wait for the end of the step
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.adapter.theta.values(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def share_of(self, what: str, field: str) -> Iterator[None]:
        """This process's share of `what`, whose memory the config's `field` sets; all end as the worst does."""
        with self.peers.together(what):
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise RuntimeError(
                    f"Out of memory at {what} with {field}={getattr(self.args, field)}. Lower it, set "
                    'checkpoint_activations=True, dtype="bfloat16" or release_text_encoder=True, or draw smaller '
                    "pictures (height, width)."
                ) from error

    # ---- scores and logs ----

    def collect(self, values: np.ndarray) -> np.ndarray:
        """Takes every group's numbers `(P, ...)` from the process that drew it: only these few travel."""
        owners = [self.owner(group // self.prompts_per_block) for group in range(len(values))]
        return self.peers.gather(torch.from_numpy(values)).numpy()[owners, np.arange(len(values))]

    def check_and_log_rewards(self, rewards: np.ndarray, scores: np.ndarray, prompts: Sequence[str]) -> None:
        """
        Logs weighted rewards `(P, G)` and the scores `(P, G, K)` they are made of.

        Raises:
            `RuntimeError`: if more than `max_invalid_fraction` of the images have no finite reward.
        """
        missing = float(1 - np.isfinite(rewards).mean())
        self.refuse_missing(missing, "images", scores, self.rewards.names, prompts[0])
        log_pictures(self)
        log_rewards(self, rewards, scores, zero_spread(rewards))


class AdapterNormsCallback(TrainerCallback):
    """Logs how far the last update of a step and the whole training have moved theta."""

    def __init__(self, trainer: GradientTrainer):
        self.trainer, self.theta = trainer, list(trainer.adapter.theta.values())
        self.start = [parameter.detach().clone() for parameter in self.theta]
        self.before: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = [parameter.detach().clone() for parameter in self.theta]

    def on_optimizer_step(self, args, state, control, **kwargs):
        prefix = self.trainer.metric_prefix
        self.trainer.add_metric(f"{prefix}/update_norm", self._distance(self.before))
        self.trainer.add_metric(f"{prefix}/adapter_norm", self._distance(self.start))

    @torch.no_grad()
    def _distance(self, other: Sequence[torch.Tensor]) -> float:
        squares = [(parameter - o).square().sum() for parameter, o in zip(self.theta, other, strict=True)]
        return float(torch.stack(squares).sum().sqrt())
