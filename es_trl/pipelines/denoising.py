"""The denoising error of a pipeline on given images: what it was pretrained on, in its own parameterisation.

Sana predicts the flow velocity `v = eps - z` at `x_s = (1 - s) z + s eps`, for noise level `s` in [0, 1]. Sana Sprint
is the same network read as TrigFlow (arXiv 2503.09641): with `tan t = s / (1 - s)`, `x_t = cos t z + sin t eps` is
`x_s` up to scale, and its prediction F errs from `cos t eps - sin t z` by `sqrt(s^2 + (1 - s)^2)` times the error of
`v`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline
from PIL import Image

from ..pictures import rgb
from .adapter import PipelineAdapter


class DenoisingModel:
    """
    Prediction and target of the denoiser at any noise level, for latents `z` of unit variance.

    Args:
        adapter (`PipelineAdapter`): Sana Sprint, or Sana; its guidance and prompt settings apply. Classifier-free
            guidance is off, as in pretraining.

    Raises:
        `ValueError`: for another pipeline class, or a scheduler that is not of flow matching.
    """

    def __init__(self, adapter: PipelineAdapter):
        self.adapter, self.pipe = adapter, adapter.pipe
        self.trigflow = isinstance(self.pipe, SanaSprintPipeline)
        if not isinstance(self.pipe, SanaSprintPipeline | SanaPipeline):
            raise ValueError(
                f"The denoising loss knows Sana Sprint and Sana, not {type(self.pipe).__name__}: their pretraining "
                "targets differ. Use ESTrainer, which works with any pipeline."
            )
        config = self.pipe.scheduler.config
        flow = isinstance(self.pipe.scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas")
        if not (self.trigflow or flow):
            raise ValueError(
                f"{type(self.pipe).__name__} has a {type(self.pipe.scheduler).__name__} that is not of flow matching; "
                "load the pipeline with its own scheduler."
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one latent at the adapter's image size."""
        height, width = self.adapter.settings.size(self.pipe)
        factor = self.pipe.vae_scale_factor
        return self.adapter.denoiser.config.in_channels, height // factor, width // factor

    def velocity(self, noisy: torch.Tensor, levels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """
        The predicted flow velocity.

        Args:
            noisy (`torch.Tensor`): `(B, C, H, W)` fp32, `(1 - s) z + s eps`.
            levels (`torch.Tensor`): `(B,)` noise levels `s` in [0, 1]; 1 is pure noise.
            prompts (`Sequence[str]`): B prompts.

        Returns:
            `(B, C, H, W)` fp32.
        """
        denoiser, dtype = self.adapter.denoiser, self.adapter.denoiser.dtype
        embeds, mask, *_ = self.adapter.prompts.encoded(prompts)
        inputs = {"encoder_hidden_states": embeds.to(dtype), "encoder_attention_mask": mask}
        if self.trigflow:
            scale = self._guidance() * denoiser.config.guidance_embeds_scale
            inputs |= {"timestep": levels, "guidance": levels.new_full((len(levels),), scale).to(dtype)}
        else:
            steps = self.pipe.scheduler.config.num_train_timesteps
            inputs["timestep"] = levels * steps * denoiser.config.timestep_scale
        predicted = denoiser(noisy.to(dtype), **inputs, return_dict=False)[0].float()
        return predicted.chunk(2, dim=1)[0] if predicted.shape[1] == 2 * noisy.shape[1] else predicted

    def error(
        self, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """
        `(B,)` fp32: squared error of the denoiser, mean over a latent's entries, at latents `z`, noise `eps` (both
        `(B, C, H, W)` fp32) and noise levels `(B,)`.
        """
        s = levels[:, None, None, None]
        miss = self.velocity((1 - s) * latents + s * noise, levels, prompts) - (noise - latents)
        return miss.square().mean(dim=(1, 2, 3)) * self.weight(levels)

    def weight(self, levels: torch.Tensor) -> torch.Tensor:
        """Factor between the squared error of `v` and that of the pipeline's own prediction."""
        return levels**2 + (1 - levels) ** 2 if self.trigflow else torch.ones_like(levels)

    def _guidance(self) -> float:
        default = inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default
        return default if self.adapter.settings.guidance_scale is None else self.adapter.settings.guidance_scale

    # ---- latents ----

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """`(B, C, H, W)` fp32 latents of pictures, which are cut and resized to the adapter's image size."""
        height, width = self.adapter.settings.size(self.pipe)
        fitted = [fit(image, height, width) for image in images]
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(fitted).to(vae.device, vae.dtype)
        return vae.encode(pixels, return_dict=False)[0].float() * vae.config.scaling_factor

    @contextmanager
    def recording_latents(self) -> Iterator[list[torch.Tensor]]:
        """Inside, the final latents of every drawn batch `(B, C, H, W)` fp32 are added to the list that is yielded."""
        vae, drawn = self.pipe.vae, []
        decode = vae.decode

        def recorder(latents: torch.Tensor, *args, **kwargs):
            drawn.append(latents.detach().float() * vae.config.scaling_factor)
            return decode(latents, *args, **kwargs)

        vae.decode = recorder
        try:
            yield drawn
        finally:
            del vae.decode


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred cut of the wanted shape, resized."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = rgb(image)
    image = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    return image.crop((left, top, left + width, top + height))
