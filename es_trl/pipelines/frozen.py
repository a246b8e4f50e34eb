"""FrozenPipeline: a diffusers pipeline that draws and is never trained; its settings, its prompts and its call."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from .base_layers import freeze, is_packed, is_placed
from .call_settings import CallSettings
from .drawing import Drawer
from .generators import GeneratorPipeline, as_pipeline
from .loading import check_pipeline, denoiser_of
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
        drawer (`Drawer`): Calls the pipeline; counts pictures that have no score.

    Raises:
        `ValueError`: if the pipeline has no LoRA loader, or does not take a setting.
    """

    def __init__(self, pipe: DiffusionPipeline, settings: CallSettings | None = None):
        pipe = as_pipeline(pipe)
        check_pipeline(pipe)
        self.pipe, self.settings = pipe, settings or CallSettings()
        if isinstance(pipe, GeneratorPipeline) and self.settings.num_inference_steps == 1:
            self.settings = replace(self.settings, num_inference_steps=pipe.steps_for(1))
        self.settings.check(pipe)
        self.denoiser_name = denoiser_of(pipe)
        self.denoiser: torch.nn.Module = getattr(pipe, self.denoiser_name)
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                freeze(module)
        self._waits_for: torch.device | None = None
        pipe.set_progress_bar_config(disable=True)
        self.prompts = PromptEncoder(pipe, self.denoiser, self.settings)
        self.drawer = Drawer(pipe, self.denoiser, self.settings, self.prompts)

    @property
    def base_name(self) -> str:
        """Where the pipeline came from, or else its class."""
        return self.pipe.name_or_path or type(self.pipe).__name__

    @property
    def steps(self) -> int | None:
        """Sampling steps of a call that says nothing else; `None` for a model that has no such number."""
        own = self.settings.parameters(self.pipe).get("num_inference_steps")
        return self.settings.num_inference_steps or (own.default if own and isinstance(own.default, int) else None)

    def write_back(self) -> None:
        """What has to be done before the pipeline is called; nothing, unless a subclass trains something."""

    def call_kwargs(
        self,
        prompts: Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, Any]:
        """All keywords of one call of the pipeline but the generators and the output type."""
        kwargs = self.settings.call_kwargs(self.pipe, num_inference_steps, guidance_scale, len(prompts))
        return kwargs | self.settings.row_columns(self.pipe, columns or {}) | self.prompts.rows(prompts)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        columns: Mapping[str, Sequence[Any]] | None = None,
        keep_numbers: bool = False,
    ) -> list[Any] | torch.Tensor:
        """
        Draws one picture (video, sound) per prompt with the pipeline's own `__call__`.

        Args:
            prompts (`Sequence[str]`): One per picture.
            generators (`Sequence[torch.Generator]`): One CPU generator per picture; it draws that picture's latents
                and every later noise, so a picture does not depend on what else is in the batch (up to 3e-7 in fp32).
            num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*): Override the settings.
            output_type (`str`): As in diffusers: `"pil"`, `"pt"`, `"latent"`, ...
            columns (`Mapping[str, Sequence]`, *optional*): Further columns of the prompts; those that are keywords of
                the pipeline's call (`image`, `negative_prompt`, ...) go into it, one value per picture.
            keep_numbers (`bool`): Keep the numbers of the pictures before they became 8-bit, in `drawer.last_watch`.

        Raises:
            `ValueError`: if there are not as many generators as prompts.

        Returns:
            The pictures, in the order of `prompts`; a video is a list of pictures. One that is not made of numbers, or
            that a safety checker blackened, is marked ([`es_trl.samples.why_unscored`]) and gets no score.
        """
        if len(prompts) != len(generators):
            raise ValueError(f"generate needs one generator per prompt, got {len(generators)} for {len(prompts)}.")
        self._bring_all()
        self.write_back()
        overrides: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return self.drawer.draw(prompts, generators, columns, output_type, keep_numbers, **overrides)

    def to(self, device: torch.device | str, encoders_first: torch.device | str | None = None) -> Self:
        """
        Moves the pipeline, unless its user has placed it (a device map, offloading); returns itself.

        Args:
            device (`torch.device` or `str`): Where it draws.
            encoders_first (`torch.device` or `str`, *optional*): Encode prompts on this device before the denoiser is
                moved, which follows when the encoders have been released, or when something is drawn before.
        """
        if is_placed(self.pipe):
            return self
        self._waits_for = None
        if encoders_first is None:
            self.pipe.to(device)
            return self
        self._waits_for = torch.device(device)
        everything = torch.device(encoders_first) == self._waits_for  # what else a call needs before the denoiser
        for name, part in self.pipe.components.items():
            early = not name.startswith(("transformer", "unet")) if everything else name.startswith("text_encoder")
            if early and part is not self.denoiser and isinstance(part, torch.nn.Module) and not is_packed(part):
                part.to(encoders_first)
        return self

    def release_text_encoders(self) -> None:
        """Frees them, as [`PromptEncoder.release`], and only then moves what waited for it."""
        self.prompts.release()
        self._bring_all()

    def _bring_all(self) -> None:
        if self._waits_for is not None:
            device, self._waits_for = self._waits_for, None
            self.pipe.to(device)

    def describe(self) -> dict[str, Any]:
        """How images are drawn, as plain data for cards and evaluation files."""
        call = self.settings.call_kwargs(self.pipe)
        return {
            "pipeline": getattr(self.pipe, "class_name", type(self.pipe).__name__),
            **{key: value for key, value in call.items() if value is not None},
            "max_sequence_length": self.settings.max_sequence_length,
            "complex_human_instruction": self.settings.complex_human_instruction,
        }
