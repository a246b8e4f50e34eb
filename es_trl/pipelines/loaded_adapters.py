"""LoadedAdapters: a pipeline with finished LoRAs, loaded by diffusers itself, for evaluations and comparisons."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import DiffusionPipeline

from .adapter import LORA_WEIGHTS_NAME
from .call_settings import CallSettings
from .frozen import FrozenPipeline


class LoadedAdapters(FrozenPipeline):
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
        super().__init__(pipe, settings)
        carried = getattr(self.denoiser, "peft_config", None)
        if carried:
            raise ValueError(
                f"The pipeline's {self.denoiser_name} already carries the adapters {list(carried)}: call "
                "pipe.unload_lora_weights() and give them as adapters, or load the pipeline afresh."
            )
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
