"""The steps of any scheduler as Gaussians: found by taking each of them with noise of known size, and without."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from .policy import Gaussian, flow_sde_transition
from .replaced import replaced


PASSED = ["model_output", "timestep", "sample"]  # by pipelines to a scheduler's step
LOUD = 2.0**20  # noise of this size drowns the rest of a step, so that its factor is read off to 1e-7


@dataclass
class Step:
    """One call of a scheduler's own `step`, the `function`, with what the pipeline passes to it."""

    scheduler: Any
    function: Callable[..., Any]
    model_output: torch.Tensor
    timestep: Any
    sample: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    def take(self, noise: float | None = None) -> Any:
        """The scheduler's own step and output; with `noise`, every number of its noise is that one."""
        with self._noise(noise):
            return self.function(self.model_output, self.timestep, self.sample, *self.args, **self.kwargs)

    def tried(self, noise: float, **kwargs: Any) -> torch.Tensor:
        """The next latents in fp32, for that noise; the scheduler stays where it is."""
        state = dict(vars(self.scheduler))
        try:
            with self._noise(noise):
                output = self.function(
                    self.model_output.float(), self.timestep, self.sample.float(), *self.args, **self.kwargs | kwargs
                )
        finally:
            vars(self.scheduler).clear()
            vars(self.scheduler).update(state)
        return output.prev_sample.float()

    def _noise(self, value: float | None) -> AbstractContextManager[None]:
        """Inside, what the scheduler's module draws is constant."""
        names = inspect.unwrap(self.function).__globals__
        if value is None or "randn_tensor" not in names:
            return nullcontext()

        def constant(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Any:
            return torch.full(tuple(shape), value, device=device, dtype=dtype)

        return replaced(names, randn_tensor=constant)


def gaussian_of(step: Step, noise_level: float = 0.0) -> Gaussian | None:
    """
    What `step` draws the next latents from; `None` where it draws nothing.

    Args:
        step (`Step`): A step with noise: the last one has none.
        noise_level (`float`): For samplers that draw noise on demand: `a` of the SDE of flow matching's Euler steps,
            `eta` of DDIM's (arXiv 2010.02502, Eq. 16). 0 leaves them as they are.
    """
    scheduler = step.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.stochastic_sampling:
        return _flow(step, noise_level) if noise_level else None
    takes_eta = "eta" in inspect.signature(step.function).parameters
    eta = {"eta": noise_level} if noise_level and takes_eta and not step.kwargs.get("eta") else {}
    mean = step.tried(0.0, **eta)
    with torch.no_grad():
        stds = (step.tried(LOUD, **eta) - mean) / LOUD
    std = stds.mean()
    if (stds - std).abs().max() > 1e-4 * std.abs():
        raise ValueError(
            f"{type(scheduler).__name__} draws noise of another size for every number of the latents, which the "
            "policy's densities do not follow. Use ESTrainer."
        )
    return None if std == 0 else Gaussian(mean, std)


def _flow(step: Step, noise_level: float) -> Gaussian:
    scheduler = step.scheduler
    if scheduler.step_index is None:
        scheduler._init_step_index(step.timestep)
    sigmas, i = scheduler.sigmas.to(step.sample.device), scheduler.step_index
    return flow_sde_transition(step.model_output, step.sample, sigmas[i], sigmas[i + 1], sigmas[1], noise_level)


# ---- which schedulers have such steps ----


def policy_scheduler(pipe: Any) -> Any:
    """
    The scheduler that rollouts of `pipe` draw with: its own if its steps can be Gaussian, else DDIM or flow matching's
    Euler for the same model and noise levels, whose noise can be chosen.

    Raises:
        `ValueError`: if there is none.
    """
    own = getattr(pipe, "scheduler", None)
    if own is None:
        name = getattr(pipe, "class_name", type(pipe).__name__)
        raise ValueError(f"{name} has no scheduler, whose steps have the likelihood that is trained: use ESTrainer.")
    reason = why_no_density(own)
    if not reason:
        return own
    for other in _others(own):
        if not why_no_density(other):
            return other
    raise ValueError(
        f"{type(pipe).__name__} samples with {type(own).__name__}, {reason}, and neither DDIM nor flow matching's "
        "Euler has its noise levels. Set pipe.scheduler to one whose steps are Gaussian, or use ESTrainer."
    )


def _others(own: Any) -> Iterator[Any]:
    config = getattr(own, "config", {})
    if "learned" in str(config.get("variance_type")):
        yield type(own).from_config(config, variance_type="fixed_small")
    elif is_flow(own):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        yield FlowMatchEulerDiscreteScheduler(config.get("num_train_timesteps", 1000), shift=shift)
    elif hasattr(own, "alphas_cumprod"):
        made = DDIMScheduler.from_config(config)
        kept, others = made.alphas_cumprod, own.alphas_cumprod.to(made.alphas_cumprod.dtype)
        if kept.shape == others.shape and torch.allclose(kept, others, atol=1e-6):
            yield made


def is_flow(scheduler: Any) -> bool:
    """Whether the model behind a scheduler predicts the velocity of a flow."""
    config = getattr(scheduler, "config", {})
    named = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(named) or isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)


def why_no_density(scheduler: Any) -> str:
    """Why a scheduler's steps cannot be Gaussian, from taking one; empty if they can."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return ""
    parameters = inspect.signature(getattr(scheduler, "step", lambda: None)).parameters.values()
    if [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD] != PASSED:
        return "whose step takes other things than the model's output, a time and a sample"
    if "randn_tensor" not in inspect.unwrap(scheduler.step).__globals__:
        return "whose steps have no density: they draw no noise"
    trial = copy.deepcopy(scheduler)
    if "learned" in str(trial.config.get("variance_type")):
        return "whose steps have a learned variance"
    given: dict[str, Any] = {"mu": 1.0} if trial.config.get("use_dynamic_shifting") else {}
    if "intermediate_timesteps" in inspect.signature(trial.set_timesteps).parameters:
        given["intermediate_timesteps"] = None
    trial.set_timesteps(4, **given)
    sample, time = torch.ones(1, 4, 4, 4), trial.timesteps[0]
    if hasattr(trial, "scale_model_input"):
        trial.scale_model_input(sample, time)
    step = Step(trial, trial.step, torch.zeros_like(sample), time, sample)
    if gaussian_of(step, noise_level=1.0) is None:
        return "whose steps have no density: they draw no noise"
    before = _held(trial)
    step.take(noise=0.0)
    return (
        "whose steps depend on those before, which a density of one step leaves out" if _held(trial) > before else ""
    )


def _held(scheduler: Any) -> int:
    """How many tensors a scheduler keeps."""
    values = [v for value in vars(scheduler).values() for v in (value if isinstance(value, list) else [value])]
    return sum(isinstance(value, torch.Tensor) for value in values)


# ---- inside a call of a pipeline ----


@contextmanager
def stepping(
    scheduler: Any,
    act: Callable[[int, Step], torch.Tensor | None],
    keep: Callable[[int, torch.Tensor], None],
    is_last: Callable[[int, Step], bool],
) -> Iterator[list[int]]:
    """
    Inside, `act(index, step)` may say what the next latents are; where it says None, the scheduler does, without noise
    in the last step. `keep(index, latents)` sees them all. Yields the indices of the steps so far.
    """
    original = scheduler.step
    taken: list[int] = []

    def wrapped(
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        index = len(taken)
        taken.append(index)
        step = Step(scheduler, original, model_output, timestep, sample, args, kwargs)
        drawn, last = act(index, step), is_last(index, step)
        output = step.take(noise=None if drawn is None and not last else 0.0)
        if drawn is not None:
            # Pipelines of consistency models decode the prediction beside the last latents.
            for name in list(output) if last else ["prev_sample"]:
                output[name] = drawn
        keep(index, output.prev_sample)
        return output if return_dict else output.to_tuple()

    # Pipelines look for `generator` and `eta` in the signature.
    vars(wrapped).update(__signature__=inspect.signature(original), draws_its_own_noise=True)
    with replaced(scheduler, step=wrapped):
        yield taken


class SkippedSteps:
    """Spares a pipeline the passes of its denoiser that nobody reads, once it is known what one looks like."""

    def __init__(self, denoiser: torch.nn.Module):
        self.denoiser = denoiser
        self._template: tuple[torch.Size, torch.dtype] | None = None

    @contextmanager
    def __call__(self, now: Callable[[], bool]) -> Iterator[None]:
        """Inside, the denoiser gives zeros whenever `now()` is true."""
        if self.denoiser._compiled_call_impl is not None:
            yield
            return
        original = self.denoiser.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            rows: Any = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor | list)), ())
            if self._template is not None and now() and len(rows):
                shape, dtype = self._template
                return (torch.zeros(len(rows), *shape, dtype=dtype, device=rows[0].device),)
            output = original(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else None
            if isinstance(first, torch.Tensor):
                self._template = first.shape[1:], first.dtype
            return output

        with replaced(self.denoiser, forward=forward):
            yield
