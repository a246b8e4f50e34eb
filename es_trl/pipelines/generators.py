"""Generators that are no diffusers pipelines: any object with a `module` and `generate`, seen as a pipeline."""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import save_file

from ..files import LORA_WEIGHTS_NAME
from ..samples import pictures_of


@runtime_checkable
class Generator(Protocol):
    """
    What trains beside diffusers pipelines: autoregressive models, community pipelines, classes without a LoRA loader.

    `module` is where LoRA goes. `generate(prompts, generators, **columns)` draws one sample per prompt, whose every
    random number comes from that prompt's CPU generator; a sample is a PIL picture, or a list of them for a video.
    Arrays and tensors of pictures, uint8 or floats in [0, 1], become PIL ones; sounds stay what they are.
    `**columns` are the data set's columns that it names, all of them if it takes `**`. Rows of a batch have to stay in
    order in `module`, several members of a population being drawn at once; a run checks that at its first step.

    An optional `save(directory)` is called with the trained weights in `module`, beside the LoRA file that is written
    in any case.
    """

    module: torch.nn.Module

    def generate(self, prompts: list[str], generators: list[torch.Generator], **columns: list[Any]) -> Sequence[Any]:
        """One sample per prompt."""


class GeneratorPipeline:
    """A [`Generator`] with the few doors of a diffusers pipeline that the package uses."""

    _lora_loadable_modules = ("module",)

    def __init__(self, generator: Generator):
        if not isinstance(generator.module, torch.nn.Module):
            raise TypeError(f"{type(generator).__name__}.module must be an nn.Module, for LoRA to be put on.")
        self.generator, self.module = generator, generator.module
        self.components = {"module": generator.module}
        self.name_or_path = str(getattr(generator, "name_or_path", None) or type(generator).__name__)

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **columns: list[Any]) -> SimpleNamespace:
        drawn = self.generator.generate(prompt, generator, **columns)
        try:
            found = pictures_of(drawn)
        except ValueError:
            got = type(drawn).__name__
            raise TypeError(f"{self.class_name}.generate must return one sample per prompt, got {got}.") from None
        if not isinstance(drawn, tuple) or len(found) == len(prompt):  # else it holds the samples, not an output
            drawn = found
        return SimpleNamespace(images=[self.postprocess(value) if _is_array(value) else value for value in drawn])

    def postprocess(self, sample: Any) -> Any:
        """
        A picture `(height, width, channels)` or `(channels, height, width)`, or pictures of a video one axis more, as
        PIL has them; sounds as they are. By diffusers' name, under which numbers that are none are looked for.
        """
        numbers = torch.as_tensor(sample).detach().cpu()
        if numbers.ndim not in (3, 4):
            return sample
        if numbers.ndim == 4:
            return [self.postprocess(frame) for frame in numbers]
        if numbers.shape[-1] not in (1, 3, 4):
            numbers = numbers.permute(1, 2, 0)
        if numbers.is_floating_point():
            low, high = (float(end) for end in torch.nan_to_num(numbers).aminmax())
            if low < -0.01 or high > 1.01:
                raise ValueError(
                    f"{self.class_name}.generate gave a picture of floats from {low:.3g} to {high:.3g}: they have to "
                    "be in [0, 1], uint8, or PIL pictures."
                )
            numbers = torch.nan_to_num(numbers).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(numbers.numpy().squeeze())

    @property
    def class_name(self) -> str:
        """The name of the object's class."""
        return type(self.generator).__name__

    @property
    def dtype(self) -> torch.dtype:
        """Of the first weight."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def call_parameters(self) -> dict[str, inspect.Parameter]:
        """What `generate` takes beside prompts and generators."""
        own = list(inspect.signature(self.generator.generate).parameters.values())[2:]
        return {p.name: p for p in own if p.kind is not p.VAR_KEYWORD}

    def steps_for(self, number: int) -> int | None:
        """`number`, or `None` where `generate` has no `num_inference_steps`: 1 is then the only number there is."""
        return number if "num_inference_steps" in self.call_parameters() else None

    def call_columns(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """
        Those of a data set's columns that `generate` takes.

        Raises:
            `ValueError`: if it needs another one.
        """
        own = inspect.signature(self.generator.generate).parameters.values()
        everything = any(p.kind is p.VAR_KEYWORD for p in own)
        named = self.call_parameters()
        missing = [name for name, p in named.items() if p.default is p.empty and name not in columns]
        if missing:
            raise ValueError(
                f"{self.class_name}.generate needs {', '.join(missing)}, which the prompts do not come with; they "
                f"have {', '.join(columns) or 'no other columns'}. Add it to the data set, or give it a default."
            )
        return {name: list(values) for name, values in columns.items() if everything or name in named}

    def to(self, device: torch.device | str) -> "GeneratorPipeline":
        """Moves the module, or all of the object where it has a `to` of its own."""
        (self.generator if hasattr(self.generator, "to") else self.module).to(device)
        return self

    def set_progress_bar_config(self, **_kwargs: Any) -> None:
        """There is none."""

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike[str],
        module_lora_layers: Mapping[str, torch.Tensor],
        module_lora_adapter_metadata: dict[str, Any],
        safe_serialization: bool = True,
    ) -> None:
        """`pytorch_lora_weights.safetensors` with the module's own names, and what the object's `save` writes."""
        os.makedirs(save_directory, exist_ok=True)
        metadata = {f"module.{name}": value for name, value in module_lora_adapter_metadata.items()}
        text = json.dumps(metadata, default=_plain, sort_keys=True)
        tensors = {f"module.{name}": tensor for name, tensor in module_lora_layers.items()}
        path = os.path.join(save_directory, LORA_WEIGHTS_NAME)
        save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": text})
        if hasattr(self.generator, "save"):
            self.generator.save(save_directory)

    # ---- finished LoRAs, for evaluations ----

    def load_lora_weights(self, state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> None:
        """Puts a finished LoRA on the module, its strength being that of its matrices."""
        tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
        ranks = {name.rpartition(".lora_A.")[0]: len(A) for name, A in tensors.items() if ".lora_A." in name}
        first = next(iter(ranks.values()), 1)
        same = {"rank_pattern": ranks, "alpha_pattern": ranks}
        config = LoraConfig(r=first, lora_alpha=first, target_modules=list(ranks), **same)
        inject_adapter_in_model(config, self.module, adapter_name)
        set_peft_model_state_dict(self.module, tensors, adapter_name=adapter_name)
        self.module.requires_grad_(False)

    def unload_lora_weights(self) -> None:
        """Leaves the module as it was."""
        for name, layer in list(self.module.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                self.module.set_submodule(name, layer.get_base_layer())
        del self.module.peft_config


def as_pipeline(model: Any) -> Any:
    """
    `model` itself if it is a diffusers pipeline or a name, a path as a string, a generator as a pipeline.

    Raises:
        `TypeError`: for anything else.
    """
    if isinstance(model, str | DiffusionPipeline | GeneratorPipeline):
        return model
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if isinstance(model, Generator) and callable(model.generate):
        return GeneratorPipeline(model)
    raise TypeError(
        f"model must be a string, a DiffusionPipeline, or an object with `module` (an nn.Module) and "
        f"`generate(prompts, generators, **columns)` that returns one sample per prompt; got {type(model).__name__}."
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Image.Image)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
