"""The denoising error of a pipeline on given latents: what it was pretrained on, in its own parameterisation."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, SCMScheduler
from PIL import Image

from ..pictures import rgb
from .adapter import PipelineAdapter
from .base_layers import rounding_dtype
from .parameterisation import Diffusion, Flow, Parameterisation, TrigFlow
from .replaced import replaced
from .scheduler_steps import SkippedSteps, is_flow
from .self_check import rounding_limit


# Guidance that calls the model a second time; pretraining has none.
WITHOUT = {"true_cfg_scale": 1.0, "pag_scale": 0.0}


Columns = Mapping[str, Sequence[Any]] | None


class _Done(Exception):
    """What was wanted of the call is known."""


class DenoisingModel:
    """
    Prediction and error of the model at any noise level, by the pipeline's own call: its scheduler is made to hand out
    given latents at a given time, so that packing, prompts and what else the model gets are the pipeline's.

    Latents `z` are those that the pipeline's loop works on, of unit variance: packed where it packs them.

    Args:
        adapter (`PipelineAdapter`): A model of a flow, a consistency model in TrigFlow's angles, or a diffusion model
            that predicts the noise, v or the sample. Its settings apply, but classifier-free guidance is off.

    Raises:
        `ValueError`: for another kind of model.
    """

    def __init__(self, adapter: PipelineAdapter):
        self.adapter, self.pipe = adapter, adapter.pipe
        own: Any = getattr(self.pipe, "scheduler", None)
        self.kind: Parameterisation
        if isinstance(own, SCMScheduler):
            self.kind, self.scheduler = TrigFlow(own.config.sigma_data), copy.copy(own)
        elif is_flow(own):
            self.kind, self.scheduler = Flow(own.config.num_train_timesteps), copy.copy(own)
        elif getattr(own, "alphas_cumprod", None) is not None:
            self.kind = Diffusion(own.alphas_cumprod, own.config.prediction_type)
            # Schedulers of sigmas scale what the model gets; this one does not.
            self.scheduler = DDIMScheduler.from_config(own.config) if hasattr(own, "sigmas") else copy.copy(own)
        else:
            name = getattr(self.pipe, "class_name", type(self.pipe).__name__)
            with_what = f"samples with {type(own).__name__}, which is neither" if own else "has no scheduler"
            raise ValueError(
                f"The denoising loss knows models of flows and of diffusion; {name} {with_what}. Use ESTrainer, which "
                "needs no loss."
            )
        self._skipped = SkippedSteps(adapter.denoiser)
        self._takes_rows: bool | None = None
        self._shape: tuple[int, ...] = ()
        self._decoding: tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]] | None = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, such as `(C, H, W)`."""
        return self._find_shape(None)

    def predict(
        self, noisy: torch.Tensor, levels: torch.Tensor, prompts: Sequence[str], columns: Columns = None
    ) -> torch.Tensor:
        """
        What the scheduler gets of the model, in the units of `z`.

        Args:
            noisy (`torch.Tensor`): `(B, ...)` fp32 latents at noise `levels`, as [`noised`] makes them.
            levels (`torch.Tensor`): `(B,)` noise levels in [0, 1]; 1 is pure noise.
            prompts (`Sequence[str]`): B prompts.
            columns (`Mapping`, *optional*): Their columns; those that are keywords of the call go into it.

        Returns:
            `(B, ...)` fp32.
        """
        unique, rows = levels.unique(return_inverse=True)
        if len(unique) == 1 or self._can_take_rows(noisy, levels, prompts, columns):
            return self._call(noisy, levels if len(unique) > 1 else unique, prompts, columns)
        found: dict[int, torch.Tensor] = {}
        for i, level in enumerate(unique):
            own = (rows == i).nonzero().flatten().tolist()
            predicted = self._call(noisy[own], level[None], [prompts[j] for j in own], rows_of(columns, own))
            found |= zip(own, predicted, strict=True)
        return torch.stack([found[j] for j in range(len(noisy))])

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """`(B, ...)` latents at noise `levels (B,)`, of `z` and `eps`, both `(B, ...)`."""
        return self.kind.noised(latents, noise, _like(levels, latents))

    def error(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        levels: torch.Tensor,
        prompts: Sequence[str],
        columns: Columns = None,
    ) -> torch.Tensor:
        """
        `(B,)` fp32: squared error of the model's own prediction, mean over a latent's entries, at latents `z`, noise
        `eps` (both `(B, ...)` fp32) and noise levels `(B,)`.
        """
        predicted = self.predict(self.noised(latents, noise, levels), levels, prompts, columns)
        miss = predicted - self.kind.target(latents, noise, _like(levels, latents))
        return miss.square().flatten(1).mean(dim=1)

    # ---- the pipeline's call ----

    def _can_take_rows(
        self, noisy: torch.Tensor, levels: torch.Tensor, prompts: Sequence[str], columns: Columns
    ) -> bool:
        """Whether rows of one call may have times of their own; found out once, the last row being called alone."""
        if self._takes_rows is None:
            with torch.no_grad():
                alone = self._call(noisy[-1:], levels[-1:], prompts[-1:], rows_of(columns, [-1]))
                try:
                    together = self._call(noisy, levels, prompts, columns)[-1:]
                except (TypeError, ValueError, RuntimeError, IndexError):
                    self._takes_rows = False
                else:
                    near = rounding_limit(rounding_dtype(self.adapter.denoiser)) * alone.abs().max()
                    self._takes_rows = bool((together - alone).abs().max() <= near)
        return self._takes_rows

    def _call(
        self, noisy: torch.Tensor | None, levels: torch.Tensor, prompts: Sequence[str], columns: Columns = None
    ) -> torch.Tensor:
        """The model's output for all rows; with no `noisy` the first step's, of latents that the pipeline draws."""
        found: list[torch.Tensor] = []

        def step(
            model_output: torch.Tensor,
            timestep: Any,
            sample: torch.Tensor,
            *_: Any,
            return_dict: bool = True,
            **__: Any,
        ) -> Any:
            self._shape = tuple(sample.shape[1:])
            if noisy is None or done:
                found.append(model_output)
                raise _Done
            if noisy.shape != sample.shape:
                raise ValueError(f"latents {tuple(noisy.shape)} are not the pipeline's {tuple(sample.shape)}")
            done.append(True)
            latents = (noisy * self.kind.unit).to(sample.dtype)
            return SimpleNamespace(prev_sample=latents) if return_dict else (latents, latents)

        done: list[bool] = []
        with self._scheduler(step, self.kind.times(levels)), self._skipped(lambda: noisy is not None and not done):
            self._run(prompts, columns)
        output = found[0].float() / self.kind.unit
        learned_variance = output.shape[1] == 2 * self._shape[0]
        return output.chunk(2, dim=1)[0] if learned_variance else output

    def _find_shape(self, columns: Columns) -> tuple[int, ...]:
        """The shape of one latent; `columns` are those of one row, without which some pipelines cannot be called."""
        if not self._shape:
            with torch.no_grad():
                self._call(None, torch.full((1,), 0.5), ["a cat"], columns)
        return self._shape

    def _run(self, prompts: Sequence[str], columns: Columns, output_type: str = "latent") -> None:
        """Calls the pipeline; ends where its stand-ins raise `_Done`."""
        adapter = self.adapter
        accepted, config = adapter.settings.parameters(self.pipe), adapter.denoiser.config
        embedded = config.get("guidance_embeds") or config.get("time_cond_proj_dim")
        without = WITHOUT if embedded else WITHOUT | {"guidance_scale": 1.0}
        kwargs = adapter.call_kwargs(prompts, num_inference_steps=2, columns=columns)
        kwargs |= {name: value for name, value in without.items() if name in accepted}
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        with suppress(_Done):
            adapter.drawer.call(kwargs, generators, prompts, output_type, with_graph=True)

    @contextmanager
    def _scheduler(self, step: Any, times: torch.Tensor) -> Iterator[None]:
        """Inside, the pipeline's scheduler has two steps, both at `times`, and `step` takes them."""

        # Pipelines look for `sigmas` and `timesteps` in the signature.
        def set_timesteps(
            num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, timesteps: Any = None, **_: Any
        ) -> None:
            self.scheduler.num_inference_steps, self.scheduler._step_index = 2, None
            rows = times if len(times) > 1 else times[0]
            self.scheduler.timesteps = torch.stack([rows, rows, *self.kind.ends(rows)]).to(device)

        step.draws_its_own_noise = True
        own = replaced(self.scheduler, step=step, set_timesteps=set_timesteps)
        with replaced(self.pipe, scheduler=self.scheduler), own:
            yield

    # ---- latents of pictures ----

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], columns: Columns = None) -> torch.Tensor:
        """
        `(B, ...)` fp32 latents of pictures, which are cut and resized to the adapter's image size; `columns` as in
        [`predict`].

        Raises:
            `ValueError`: where the pipeline does more between its loop and its decoder than to sort and scale.
        """
        order, scale, shift, shape = self._decoding or self._look_at_decoding(rows_of(columns, [0]))
        height, width = self.adapter.settings.size(self.pipe)
        if height is None or width is None:
            raise ValueError(
                f"{type(self.pipe).__name__} does not say how large its pictures are: set height and width."
            )
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess([fit(image, height, width) for image in images])
        pixels = pixels.to(vae.device, vae.dtype)
        encoded = vae.encode(pixels if len(shape) == 4 else pixels.unsqueeze(2))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        if latents.shape[1:] != shape[1:]:
            raise ValueError(f"the autoencoder gives latents {tuple(latents.shape)}, its decoder takes {shape}")
        sorted_ = torch.empty(len(latents), scale.numel(), device=scale.device)
        sorted_[:, order] = ((latents.float() - shift) / scale).flatten(1)
        return sorted_.view(-1, *self.latent_shape)

    def _look_at_decoding(self, columns: Columns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """What a pipeline does to its latents before it decodes them: where each goes, its scale and its shift."""
        shape = self._find_shape(columns)
        size = torch.Size(shape).numel()
        places, base = torch.arange(size, dtype=torch.float32), 512
        zeros, ones, low, high = (
            self._decoder_input(value.view(1, *shape), columns)
            for value in (torch.zeros(size), torch.ones(size), places % base / base, (places // base) / base)
        )
        scale, shift = ones - zeros, zeros
        digits = [((value - shift) / scale).mul(base).round() for value in (low, high)]
        order = (digits[0] + base * digits[1]).long().flatten()
        if not torch.equal(order.sort().values.cpu(), torch.arange(size)):
            raise ValueError(
                f"{type(self.pipe).__name__} does more to its latents than to sort and scale them before they are "
                "decoded, so pictures cannot be brought to its latents. Draw the pairs: online=True."
            )
        self._decoding = order, scale, shift, tuple(zeros.shape)
        return self._decoding

    def _decoder_input(self, latents: torch.Tensor, columns: Columns = None) -> torch.Tensor:
        """`(1, ...)` fp32: what the decoder is given for final latents."""
        found: list[torch.Tensor] = []

        def decode(given: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            found.append(given.float())
            raise _Done

        def step(
            _output: Any, _timestep: Any, sample: torch.Tensor, *_args: Any, return_dict: bool = True, **_kwargs: Any
        ) -> Any:
            final = (latents.to(sample.device) * self.kind.unit).to(sample.dtype)
            return SimpleNamespace(prev_sample=final) if return_dict else (final, final)

        times = self.kind.times(torch.full((1,), 0.5))
        with replaced(self.pipe.vae, decode=decode), self._scheduler(step, times), self._skipped(lambda: True):
            self._run(["a cat"], columns, "pil")
        return found[0]

    @contextmanager
    def recording_latents(self) -> Iterator[list[torch.Tensor]]:
        """Inside, the final latents of every drawn batch `(B, ...)` fp32 are added to the list that is yielded."""
        drawer, scheduler, drawn = self.adapter.drawer, self.pipe.scheduler, []
        call, step = drawer.call, scheduler.step

        def recording_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            last[:] = [output[0]]
            return output

        def recording_call(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            drawn.append(last[0].detach().float() / self.kind.unit)
            return output

        last: list[torch.Tensor] = []
        vars(recording_step)["__signature__"] = inspect.signature(step)
        with replaced(drawer, call=recording_call), replaced(scheduler, step=recording_step):
            yield drawn


def rows_of(columns: Columns, rows: Sequence[int]) -> dict[str, list[Any]]:
    """Some rows of the columns of prompts."""
    return {name: [values[j] for j in rows] for name, values in (columns or {}).items()}


def _like(levels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """`levels (B,)` with the dimensions of `latents`."""
    return levels.view(-1, *[1] * (latents.ndim - 1))


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred cut of the wanted shape, resized."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = rgb(image)
    image = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    return image.crop((left, top, left + width, top + height))
