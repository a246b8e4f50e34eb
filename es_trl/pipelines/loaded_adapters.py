"""LoadedAdapters: a pipeline with finished LoRAs, loaded by diffusers itself, for evaluations and comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .adapter import LORA_WEIGHTS_NAME
from .call_settings import CallSettings
from .loading import check_pipeline
from .prompt_encoding import PromptEncoder


class LoadedAdapters:
    """
    Draws with a frozen pipeline, or with one of several LoRAs on it: the way a user of the adapters draws.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a LoRA loader, carrying no adapter.
        folders (`Mapping[str, str]`, *optional*): By label, folders with `pytorch_lora_weights.safetensors`. Rank and
            alpha are what the file says.
        settings (`CallSettings`, *optional*): How the pipeline is called.

    Raises:
        `ValueError`: for a LoRA that does not fit the pipeline, or that also changes its text encoder.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        folders: Mapping[str, str] | None = None,
        settings: CallSettings | None = None,
    ):
        check_pipeline(pipe)
        self.pipe, self.settings = pipe, settings or CallSettings()
        self.settings.check(pipe)
        self.denoiser_name = pipe._lora_loadable_modules[0]
        carried = getattr(getattr(pipe, self.denoiser_name), "peft_config", None)
        if carried:
            raise ValueError(
                f"The pipeline's {self.denoiser_name} already carries the adapters {list(carried)}: call "
                "pipe.unload_lora_weights() and give them as adapters, or load the pipeline afresh."
            )
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        # A label may hold dots, the name of a torch module may not.
        self._names = {label: f"adapter_{i}" for i, label in enumerate(folders or {})}
        try:
            for label, folder in (folders or {}).items():
                self._load(label, folder)
        except ValueError:
            self.unload()
            raise
        if self._names:
            pipe.disable_lora()
        self.prompts = PromptEncoder(pipe, self.settings)

    def _load(self, label: str, folder: str) -> None:
        name = self._names[label]
        try:
            self.pipe.load_lora_weights(
                folder, weight_name=LORA_WEIGHTS_NAME, adapter_name=name, use_safetensors=True, local_files_only=True
            )
        except Exception as error:  # noqa: BLE001 - diffusers, peft, torch and safetensors each raise their own
            raise ValueError(
                f"adapter {label!r} from {folder!r} does not fit {type(self.pipe).__name__}: "
                f"{' '.join(str(error).split())[:300]} Is `model` the one it was trained on?"
            ) from error
        changed = [part for part, names in self.pipe.get_list_adapters().items() if name in names]
        if changed != [self.denoiser_name]:
            what = f"changes {', '.join(changed)}" if changed else "changes nothing"
            raise ValueError(
                f"adapter {label!r} from {folder!r} {what} of {type(self.pipe).__name__}, where it should change the "
                f"{self.denoiser_name} alone: prompts are encoded once for all rows."
            )

    @property
    def labels(self) -> list[str]:
        """The adapters, in the order given."""
        return list(self._names)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | torch.Tensor:
        """One image per prompt and generator, as [`PipelineAdapter.generate`] draws them."""
        if len(prompts) != len(generators):
            raise ValueError(f"generate needs one generator per prompt, got {len(generators)} for {len(prompts)}.")
        kwargs = self.settings.call_kwargs(self.pipe, num_inference_steps, guidance_scale)
        kwargs |= self.prompts.rows(prompts)
        return self.pipe(**kwargs, generator=list(generators), output_type=output_type).images

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, the frozen base model draws; outside it does too."""
        yield

    @contextmanager
    def chosen(self, label: str, scale: float = 1.0) -> Iterator[None]:
        """Inside, the adapter `label` draws, its effect multiplied by `scale` (1 is as trained, 0 is the base)."""
        self.pipe.enable_lora()
        self.pipe.set_adapters([self._names[label]], [scale])
        try:
            yield
        finally:
            self.pipe.disable_lora()

    def unload(self) -> None:
        """Leaves the pipeline as it was, without adapters."""
        if self._names:
            self.pipe.unload_lora_weights()
            self._names = {}

    def to(self, device: torch.device | str) -> "LoadedAdapters":
        self.pipe.to(device)
        return self

    def describe(self) -> dict:
        """How images are drawn, as plain data for evaluation files."""
        call = self.settings.call_kwargs(self.pipe)
        return {
            "pipeline": type(self.pipe).__name__,
            **{key: value for key, value in call.items() if value is not None},
            "max_sequence_length": self.settings.max_sequence_length,
            "complex_human_instruction": self.settings.complex_human_instruction,
        }
