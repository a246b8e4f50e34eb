"""How a pipeline is called: steps, guidance, size, text length, and what each pipeline class needs beside them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from .generators import GeneratorPipeline


# What the package itself passes to every call.
OWN_KEYWORDS = ("prompt", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt")


@dataclass
class CallSettings:
    """
    Settings of the pipeline call; `None` keeps the pipeline's default.

    Args:
        num_inference_steps (`int`, *optional*): Denoising steps, at least 1.
        guidance_scale (`float`, *optional*): Guidance, distilled or classifier-free as the pipeline has it.
        height, width (`int`, *optional*): Pixels; by default the size the denoiser was trained for.
        max_sequence_length (`int`, *optional*): Text tokens per prompt.
        complex_human_instruction (`list[str]`, *optional*): Sana's prompt prefix; an empty list switches it off.
        extra (`dict`): Any other keyword of the pipeline's `__call__`.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    complex_human_instruction: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Any, **more: Any) -> "CallSettings":
        """Those of its settings that `arguments` has as attributes of the same names, and `more`."""
        names = [name for name in cls.__dataclass_fields__ if hasattr(arguments, name)]
        return cls(**{name: getattr(arguments, name) for name in names}, **more)

    def check(self, pipe: Any) -> None:
        """Raises `ValueError` for a setting that `pipe` does not take, rather than dropping it."""
        for key in self.extra:
            if key in OWN_KEYWORDS or key in type(self).__dataclass_fields__:
                raise ValueError(f"pipeline_kwargs must not set {key}: it has a field or a value of its own.")
        accepted = self.parameters(pipe)
        named = {key: value for key, value in asdict(self).items() if key != "extra" and value is not None}
        for key in [*named, *self.extra]:
            if key not in accepted:
                raise ValueError(f"{type(pipe).__name__} takes no {key}; remove it from the config.")

    def call_kwargs(
        self,
        pipe: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        rows: int | None = None,
    ) -> dict[str, Any]:
        """
        The keywords of one call of `pipe`, without prompts and generators; with `rows`, pictures and texts stand once
        per row, as a batch of prompts takes them.
        """
        accepted = self.parameters(pipe)
        steps = num_inference_steps or self.num_inference_steps
        height, width = self.size(pipe)
        kwargs: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance_scale if guidance_scale is None else guidance_scale,
            "height": height,
            "width": width,
        }
        kwargs = {key: value for key, value in kwargs.items() if value is not None and key in accepted}
        if "use_resolution_binning" in accepted and height and width:
            # Binning snaps to a table of 1024 px shapes and refuses other models.
            kwargs["use_resolution_binning"] = height * width >= 1024 * 1024
        kwargs |= self.extra
        if "intermediate_timesteps" in accepted and steps is not None and steps != 2:
            # Sana Sprint: a time between belongs to the two-step schedule, the default 1.3 like one's own, and raises
            # with any other, of which evaluations have some.
            kwargs["intermediate_timesteps"] = None
        if rows is None:
            return kwargs
        return {
            name: [value] * rows if _is_per_row(name, value) and not isinstance(value, list | tuple) else value
            for name, value in kwargs.items()
        }

    @staticmethod
    def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
        """The keywords that `pipe` takes: those of its class, and of the classes that its `**kwargs` go to."""
        if isinstance(pipe, GeneratorPipeline):
            return pipe.call_parameters()
        found: dict[str, inspect.Parameter] = {}
        for cls in type(pipe).__mro__:
            if "__call__" not in vars(cls):
                continue
            own = inspect.signature(cls.__call__).parameters
            found = dict(own) | found
            if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                break
        return {n: p for n, p in found.items() if n != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def row_columns(self, pipe: Any, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Those of a data set's columns that go into the call: its keywords, unless they are settings."""
        if isinstance(pipe, GeneratorPipeline):
            return pipe.call_columns(columns)
        accepted = self.parameters(pipe)
        taken = (*OWN_KEYWORDS, *type(self).__dataclass_fields__, *self.extra)
        return {
            name: list(values)
            for name, values in columns.items()
            if name in accepted and name not in taken and len(values) and _is_per_row(name, values[0])
        }

    def text_kwargs(self, pipe: Any) -> dict[str, Any]:
        """The keywords of `pipe.encode_prompt` (or of the call, when prompts go in as text)."""
        values = {
            "max_sequence_length": self.max_sequence_length,
            "complex_human_instruction": self.complex_human_instruction,
        }
        return {key: value for key, value in values.items() if value is not None}

    def size(self, pipe: Any) -> tuple[int | None, int | None]:
        """Height and width in pixels; by default what the denoiser was trained for."""
        denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        sample = getattr(denoiser.config, "sample_size", None) if denoiser is not None else None
        factor = getattr(pipe, "vae_scale_factor", None)
        native = sample * factor if isinstance(sample, int) and factor else None
        return self.height or native, self.width or native


def _is_per_row(name: str, value: Any) -> bool:
    """Whether a keyword's value belongs to one row: a text, a picture, or pictures."""
    if isinstance(value, str):
        return "prompt" in name
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Image.Image)
