"""Rollouts of a pipeline as trajectories of a Gaussian policy, and their replay with gradients.

Both are the pipeline's own `__call__`: a wrapper around its scheduler's `step` sees every model output with guidance
and rescaling already applied, so nothing of a pipeline is written down a second time here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import SCMScheduler
from PIL import Image

from .adapter import PipelineAdapter
from .differentiable import DifferentiableForward
from .policy import Gaussian
from .replaced import replaced
from .scheduler_steps import SkippedSteps, Step, gaussian_of, policy_scheduler, stepping, why_no_density


logger = logging.getLogger(__name__)

START = 1.57080  # Sana Sprint's first time, as in its pipeline
Visit = Callable[[int, Gaussian, torch.Tensor], None]


@dataclass
class PolicySettings:
    """
    How rollouts are drawn.

    Args:
        num_inference_steps (`int`): Steps of a rollout.
        intermediate_times (`list[float]`, *optional*): Consistency models: the times between the first and the last
            step, falling, in (0, pi/2); `None` is the scheduler's own schedule.
        noise_level (`float`): Flow models: `a` of the SDE. DDIM: `eta`, unless the pipeline is called with one. Other
            schedulers draw noise of their own size.
        output_noise (`float`): Standard deviation of noise on the final latents, for consistency models in units of
            sigma_data. Above 0 the last step has a density too, and one step is enough.
    """

    num_inference_steps: int
    intermediate_times: list[float] | None = None
    noise_level: float = 0.7
    output_noise: float = 0.0


@dataclass
class Trajectory:
    """
    What is needed to replay the rollouts of `B` images.

    Attributes:
        prompts (`list[str]`): `B` prompts.
        columns (`dict[str, list]`): Their columns, `B` values each.
        states (`dict[int, torch.Tensor]`): `(B, ...)` latents after step i, for the steps that a replay needs.
        log_probs (`dict[int, torch.Tensor]`): `(B,)` fp32 by trained step, of the policy that drew.
        means (`dict[int, torch.Tensor]`): `(B, ...)` mean of that policy, by trained step.
    """

    prompts: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict[str, Any])
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    log_probs: dict[int, torch.Tensor] = field(default_factory=dict)
    means: dict[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def steps(self) -> list[int]:
        """The steps that are trained."""
        return sorted(self.log_probs)

    def rows(self, rows: slice) -> "Trajectory":
        """The trajectory of some of its images."""
        parts = ({i: x[rows] for i, x in values.items()} for values in (self.states, self.log_probs, self.means))
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Trajectory(self.prompts[rows], columns, *parts)


class _Done(Exception):
    """The last step that a replay needs is behind it."""


class PolicySampler:
    """
    Draws trajectories and replays them.

    Args:
        adapter (`PipelineAdapter`): The model. Rollouts draw with its own scheduler where that draws Gaussian noise or
            can (DDIM, flow-matching Euler), else with one of those two for the same noise levels.
        settings (`PolicySettings`): How rollouts are drawn.

    Raises:
        `ValueError`: for another scheduler, or settings it cannot follow.
    """

    def __init__(self, adapter: PipelineAdapter, settings: PolicySettings):
        self.adapter, self.settings, self.pipe = adapter, settings, adapter.pipe
        self.differentiable = DifferentiableForward(adapter)
        self.scheduler = check_policy(self.pipe, settings)
        if self.scheduler is not self.pipe.scheduler:
            logger.warning(
                "Rollouts draw with %s, made from the pipeline's %s, %s. Evaluations and samples keep to the "
                "pipeline's own.",
                type(self.scheduler).__name__,
                type(self.pipe.scheduler).__name__,
                why_no_density(self.pipe.scheduler),
            )
        self._skipped = SkippedSteps(adapter.denoiser)

    @property
    def stochastic_steps(self) -> list[int]:
        """The steps that can have a density: all but the last, and the last with `output_noise`."""
        number = self.settings.num_inference_steps
        return list(range(number if self.settings.output_noise else number - 1))

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        noise_generators: Sequence[torch.Generator],
        steps: Sequence[int] | None = None,
        output_type: str = "pil",
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[list[Image.Image] | torch.Tensor, Trajectory]:
        """
        Draws one image per prompt and records its path.

        Args:
            prompts (`Sequence[str]`): `B` prompts.
            generators (`Sequence[torch.Generator]`): One CPU generator per image for its initial latents.
            noise_generators (`Sequence[torch.Generator]`): One CPU generator per image for the noise of its steps.
            steps (`Sequence[int]`, *optional*): Trained steps; all stochastic ones by default. Everywhere else flow
                models and DDIM step without noise; schedulers with noise of their own draw it at every step.
            output_type (`str`): As in diffusers.
            columns (`Mapping`, *optional*): The prompts' columns; those that are keywords of the call go into it.

        Returns:
            The images and their `Trajectory`.
        """
        steps = self.stochastic_steps if steps is None else sorted(steps)
        trajectory = Trajectory(list(prompts), {name: list(values) for name, values in (columns or {}).items()})
        kept = range(steps[0] - 1, steps[-1] + 1) if steps else range(0)

        def act(index: int, step: Step) -> torch.Tensor | None:
            gaussian = self._gaussian(index, step, trained=index in steps)
            if gaussian is None:
                return None
            drawn = gaussian.sample(_noise(noise_generators, gaussian.mean)).to(step.model_output.dtype)
            if index in steps:
                trajectory.log_probs[index] = gaussian.log_prob(drawn)
                trajectory.means[index] = gaussian.mean
            return drawn

        def keep(index: int, state: torch.Tensor) -> None:
            if index in kept:
                trajectory.states[index] = state

        with self._stepping(act, keep):
            images = self._call(trajectory, generators, output_type)
        return images, trajectory

    def replay(
        self,
        trajectory: Trajectory,
        generators: Sequence[torch.Generator],
        visit: Visit,
        grad: bool = True,
        steps: Sequence[int] | None = None,
        shared: int = 1,
    ) -> None:
        """
        Goes along a trajectory again and shows `visit` every trained step's Gaussian under the current theta.

        Args:
            trajectory (`Trajectory`): `B` images.
            generators (`Sequence[torch.Generator]`): `B` generators as they were when the rollout began.
            visit (`Callable`): Called with the step, its `Gaussian`, and the latents that were drawn from it. With
                `grad`, the Gaussian's mean has a graph back to theta; call `.backward()` in `visit`.
            grad (`bool`, *optional*, defaults to `True`): Whether to build graphs; without, the pipeline draws with
                what its LoRA modules hold (nothing inside `adapter.adapter_disabled()`).
            steps (`Sequence[int]`, *optional*): Steps to visit; all trained ones by default.
            shared (`int`, *optional*, defaults to 1): That many consecutive images share prompt and initial latents.
                Their first step is then the same, and done once.
        """
        steps = trajectory.steps if steps is None else sorted(steps)
        if shared > 1 and steps and steps[0] == 0:

            def visit_all(index: int, one: Gaussian, _state: torch.Tensor) -> None:
                every = Gaussian(one.mean.repeat_interleave(shared, dim=0), one.std)
                visit(index, every, trajectory.states[index])

            self._replay(trajectory.rows(slice(None, None, shared)), generators[::shared], visit_all, grad, [0])
            steps = steps[1:]
        if steps:
            self._replay(trajectory, generators, visit, grad, steps)

    def _replay(
        self,
        trajectory: Trajectory,
        generators: Sequence[torch.Generator],
        visit: Visit,
        grad: bool,
        steps: Sequence[int],
    ) -> None:
        def act(index: int, step: Step) -> torch.Tensor:
            if index in steps:
                gaussian = self._gaussian(index, step, trained=True)
                assert gaussian is not None, "a trained step has a density"
                visit(index, gaussian, trajectory.states[index])
            if index >= steps[-1]:
                raise _Done
            return trajectory.states.get(index, step.sample)

        with self._stepping(act, skip_before=steps[0]), suppress(_Done):
            if grad:
                with self.differentiable.enabled(), torch.enable_grad():
                    self._call(trajectory, generators, "latent", with_graph=True)
            else:
                self._call(trajectory, generators, "latent")

    # ---- one call of the pipeline ----

    def _call(
        self,
        trajectory: Trajectory,
        generators: Sequence[torch.Generator],
        output_type: str,
        with_graph: bool = False,
    ) -> Any:
        adapter, number = self.adapter, self.settings.num_inference_steps
        adapter.write_back()
        kwargs = adapter.call_kwargs(trajectory.prompts, number, columns=trajectory.columns)
        try:
            with replaced(self.pipe, scheduler=self.scheduler), self._schedule():
                drawn = adapter.drawer.call(kwargs, generators, trajectory.prompts, output_type, with_graph=with_graph)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            smaller = "Try images_per_forward and images_per_backward of 1, or use" if len(trajectory) > 1 else "Use"
            raise ValueError(
                f"{type(self.pipe).__name__} with {type(self.scheduler).__name__} cannot draw {len(trajectory)} "
                f"picture(s) in one call for a policy ({error}). {smaller} ESTrainer, which draws them in any way."
            ) from error
        if adapter.drawer.last_watch.used_global_noise:
            raise ValueError(
                f"{type(self.pipe).__name__} with {type(self.scheduler).__name__} takes noise from torch's global "
                "generator, so a rollout could not be repeated for its gradient: use a scheduler that takes a "
                "generator, or ESTrainer."
            )
        return drawn

    def _schedule(self) -> AbstractContextManager[None]:
        """The scheduler follows `intermediate_times`, which the pipeline itself has no working argument for."""
        times = self.settings.intermediate_times
        if times is None:
            return nullcontext()
        wanted = [START, *times, 0.0]
        own = partial(self.scheduler.set_timesteps, len(wanted) - 1, timesteps=wanted, max_timesteps=None)

        def set_timesteps(*_args: Any, device: Any = None, **_kwargs: Any) -> None:
            own(device=device, intermediate_timesteps=None)

        return replaced(self.scheduler, set_timesteps=set_timesteps)

    @contextmanager
    def _stepping(
        self,
        act: Callable[[int, Step], torch.Tensor | None],
        keep: Callable[[int, torch.Tensor], None] = lambda _index, _state: None,
        skip_before: int = 0,
    ) -> Iterator[None]:
        steps = stepping(self.scheduler, act, keep, self._is_last)
        with steps as taken, self._skipped(lambda: len(taken) < skip_before):
            yield

    def _is_last(self, index: int, step: Step) -> bool:
        time = torch.as_tensor(step.timestep).flatten()[0]  # some pipelines pass it once per row
        return index >= self.settings.num_inference_steps - 1 or bool(time == self.scheduler.timesteps[-1])

    def _gaussian(self, index: int, step: Step, trained: bool) -> Gaussian | None:
        if not self._is_last(index, step):
            return gaussian_of(step, self.settings.noise_level if trained else 0.0)
        if not self.settings.output_noise:
            return None
        std = self.settings.output_noise * self.scheduler.config.get("sigma_data", 1.0)
        return Gaussian(step.tried(0.0), torch.as_tensor(std, device=step.sample.device))


def check_policy(pipe: Any, settings: PolicySettings) -> Any:
    """The scheduler of rollouts; raises `ValueError` if `pipe` has no Gaussian steps, or cannot follow `settings`."""
    scheduler, number = policy_scheduler(pipe), settings.num_inference_steps
    if settings.intermediate_times is not None and not isinstance(scheduler, SCMScheduler):
        raise ValueError(
            f"intermediate_times is for consistency models (SCMScheduler), not for {type(scheduler).__name__}."
        )
    if number == 1 and not settings.output_noise:
        raise ValueError(
            "sample_num_steps=1 has no likelihood: one step is a function of its initial noise. Use 2 or more (the "
            "adapter may still be evaluated with one step), or output_noise above 0."
        )
    times = settings.intermediate_times
    if times is None:
        return scheduler
    if len(times) != number - 1:
        count = len(times)
        raise ValueError(f"intermediate_times has {count} times for sample_num_steps={number}: give {number - 1}.")
    if any(not 0 < time < START for time in times) or any(a <= b for a, b in zip(times, times[1:], strict=False)):
        raise ValueError(f"intermediate_times must fall and lie between 0 and {START}, got {times}.")
    return scheduler


def _noise(generators: Sequence[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise like `(B, ...)`, row b from generator b, on a CPU so that it is the same everywhere."""
    rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(like.device)
