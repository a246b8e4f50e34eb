"""LoadedAdapters: a pipeline with finished LoRAs, loaded by diffusers itself, for evaluations and comparisons."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import DiffusionPipeline

from .adapter import LORA_WEIGHTS_NAME
from .call_settings import CallSettings
from .frozen import FrozenPipeline
from .lora_files import listed, lora_layers, read_lora


logger = logging.getLogger(__name__)


class LoadedAdapters(FrozenPipeline):
    """
    Draws with a frozen pipeline, or with one of several LoRAs on it: the way a user of the adapters draws.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a LoRA loader, carrying no adapter.
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
        carried = getattr(self.denoiser, "peft_config", None)
        if carried:
            raise ValueError(
                f"The pipeline's {self.denoiser_name} already carries the adapters {list(carried)}: call "
                "pipe.unload_lora_weights() and give them as adapters, or load the pipeline afresh."
            )
        # A label may hold dots, the name of a torch module may not.
        self._names = {label: f"adapter_{i}" for i, label in enumerate(files or {})}
        try:
            for label, path in (files or {}).items():
                self._load(label, path, allow_partial)
        except ValueError:
            self.unload()
            raise
        if self._names:
            pipe.disable_lora()

    def _load(self, label: str, path: str, allow_partial: bool) -> None:
        name, what, model = self._names[label], f"adapter {label!r} from {path!r}", type(self.pipe).__name__
        file = os.path.join(path, LORA_WEIGHTS_NAME) if os.path.isdir(path) else path
        try:
            lora = read_lora(file, self.denoiser)
        except ValueError as error:
            raise ValueError(f"adapter {label!r}: {error}") from error
        try:
            self.pipe.load_lora_weights(lora.state_dict(self.denoiser_name), adapter_name=name)
        except Exception as error:  # noqa: BLE001 - diffusers, peft, torch and safetensors each raise their own
            raise ValueError(
                f"{what} does not fit {model}: {' '.join(str(error).split())[:300]} Is `model` the one it was trained "
                "on?"
            ) from error
        applied = lora_layers(self.denoiser, name)
        if not applied:
            raise ValueError(f"{what} changes nothing of {model}: no layer of its {self.denoiser_name} has its names.")
        left_out = lora.not_in(applied, name) + lora.strange
        if left_out:
            text = f"{what}: {model} takes only a part of it, without {listed(left_out)}"
            if not allow_partial:
                raise ValueError(f"{text}. Is `model` the one it was trained on? To go on without, allow_partial.")
            logger.warning("%s, as allow_partial says.", text)
        if not any(layer.lora_B[name].weight.any() for layer in applied.values()):
            logger.warning("%s changes nothing: all its B are 0, so it draws the base.", what)

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
