"""LoadedAdapters: a pipeline with finished LoRAs, loaded by diffusers itself, for evaluations and comparisons."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import DiffusionPipeline

from ..files import LORA_WEIGHTS_NAME
from .call_settings import CallSettings
from .frozen import FrozenPipeline
from .lora_loading import activate, apply_lora, carried_adapters, set_scale, take_off


class LoadedAdapters(FrozenPipeline):
    """
    Draws with a frozen pipeline, or with one of several LoRAs on it: the way a user of the adapters draws.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a LoRA loader. Adapters that it carries belong to the base.
        files (`Mapping[str, str]`, *optional*): By label, LoRA files in the names of diffusers, peft, kohya or
            ComfyUI, or folders with `pytorch_lora_weights.safetensors`. Rank and alpha are what the file says.
        settings (`CallSettings`, *optional*): How the pipeline is called.
        allow_partial (`bool`, *optional*, defaults to `False`): Go on, with a warning, when the model takes only a
            part of a LoRA.

    Raises:
        `ValueError`: for a LoRA that does not fit the pipeline or is not finite; for one of which the pipeline's
            denoiser takes only a part, unless `allow_partial`: the text encoder's matrices are never applied.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        files: Mapping[str, str] | None = None,
        settings: CallSettings | None = None,
        allow_partial: bool = False,
    ):
        super().__init__(pipe, settings)
        self._carried = carried_adapters(self.denoiser)
        # A label may hold dots, the name of a torch module may not.
        self._names = {label: f"adapter_{i}" for i, label in enumerate(files or {})}
        try:
            for label, path in (files or {}).items():
                file = os.path.join(path, LORA_WEIGHTS_NAME) if os.path.isdir(path) else path
                apply_lora(pipe, file, self._names[label], f"adapter {label!r}", allow_partial)
        except ValueError:
            self.unload()
            raise
        self._settle()

    @property
    def labels(self) -> list[str]:
        """The adapters, in the order given."""
        return list(self._names)

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, the frozen base model draws; outside it does too."""
        yield

    @contextmanager
    def chosen(self, label: str, scale: float = 1.0) -> Iterator[None]:
        """Inside, the adapter `label` draws, its effect multiplied by `scale` (1 is as trained, 0 is the base)."""
        name = self._names[label]
        set_scale(self.denoiser, name, scale)
        activate(self.denoiser, [*self._carried, name])
        try:
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        if self._names:
            activate(self.denoiser, self._carried)

    def unload(self) -> None:
        """Leaves the pipeline as it was."""
        take_off(self.pipe, self.denoiser, list(self._names.values()), self._carried)
        self._names = {}
