"""FrozenPipeline: a diffusers pipeline that draws and is never trained; its settings, its prompts and its call."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .call_settings import CallSettings
from .loading import check_pipeline
from .prompt_encoding import PromptEncoder


class FrozenPipeline:
    """
    Freezes `pipe` and draws with it. What sits on its denoiser is a subclass's business.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a LoRA loader.
        settings (`CallSettings`, *optional*): How the pipeline is called.

    Attributes:
        denoiser (`nn.Module`): Transformer or UNet; `denoiser_name` is its name in the pipeline.
        prompts (`PromptEncoder`): Prompts to call keywords.

    Raises:
        `ValueError`: if the pipeline has no LoRA loader, or does not take a setting.
    """

    def __init__(self, pipe: DiffusionPipeline, settings: CallSettings | None = None):
        check_pipeline(pipe)
        self.pipe, self.settings = pipe, settings or CallSettings()
        self.settings.check(pipe)
        self.denoiser_name: str = pipe._lora_loadable_modules[0]
        self.denoiser: torch.nn.Module = getattr(pipe, self.denoiser_name)
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        self.prompts = PromptEncoder(pipe, self.settings)

    def write_back(self) -> None:
        """What has to be done before the pipeline is called; nothing, unless a subclass trains something."""

    def call_kwargs(
        self, prompts: Sequence[str], num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> dict:
        """All keywords of one call of the pipeline but the generators and the output type."""
        kwargs = self.settings.call_kwargs(self.pipe, num_inference_steps, guidance_scale)
        return kwargs | self.prompts.rows(prompts)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | torch.Tensor:
        """
        Draws one image per prompt with the pipeline's own `__call__`.

        Args:
            prompts (`Sequence[str]`): One per image.
            generators (`Sequence[torch.Generator]`): One CPU generator per image; it draws that image's latents and
                every later noise, so an image does not depend on what else is in the batch (up to 3e-7 in fp32).
            num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*): Override the settings.
            output_type (`str`): As in diffusers: `"pil"`, `"pt"`, `"latent"`, ...

        Raises:
            `ValueError`: if there are not as many generators as prompts.

        Returns:
            The images, in the order of `prompts`.
        """
        if len(prompts) != len(generators):
            raise ValueError(f"generate needs one generator per prompt, got {len(generators)} for {len(prompts)}.")
        self.write_back()
        kwargs = self.call_kwargs(prompts, num_inference_steps, guidance_scale)
        return self.pipe(**kwargs, generator=list(generators), output_type=output_type).images

    def to(self, device: torch.device | str):
        """Moves the pipeline; returns itself."""
        self.pipe.to(device)
        return self

    def describe(self) -> dict:
        """How images are drawn, as plain data for cards and evaluation files."""
        call = self.settings.call_kwargs(self.pipe)
        return {
            "pipeline": type(self.pipe).__name__,
            **{key: value for key, value in call.items() if value is not None},
            "max_sequence_length": self.settings.max_sequence_length,
            "complex_human_instruction": self.settings.complex_human_instruction,
        }
