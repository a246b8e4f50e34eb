"""A quantisation as plain data (a config's YAML) or as diffusers' object."""

from collections.abc import Mapping
from typing import Any

from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as DIFFUSERS


FIELDS = ("quant_backend", "quant_kwargs", "components_to_quantize")
DENOISERS = ("transformer", "unet")


def read_quantization(
    value: PipelineQuantizationConfig | Mapping[str, Any] | None,
) -> PipelineQuantizationConfig | None:
    """
    diffusers' `PipelineQuantizationConfig`.

    Args:
        value (`PipelineQuantizationConfig` or `dict`, *optional*): An object, taken as it is; or its `quant_backend`,
            `quant_kwargs` and `components_to_quantize`, the last by default only the denoiser. torchao's `quant_type`
            is the name of a config class of `torchao.quantization`.

    Raises:
        `ValueError`: for keys, a backend or arguments that do not exist.
        `ImportError`: if the backend's library is not installed.
    """
    if value is None or isinstance(value, PipelineQuantizationConfig):
        return value
    if not isinstance(value, Mapping) or not set(value) <= set(FIELDS):
        raise ValueError(f"quantization_config must be a mapping of {', '.join(FIELDS)}; got {value!r}.")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as TRANSFORMERS

    backend, arguments = value.get("quant_backend"), dict(value.get("quant_kwargs") or {})
    if backend not in DIFFUSERS or backend == "gguf":  # a GGUF file is loaded with from_single_file
        known = ", ".join(sorted(set(DIFFUSERS) - {"gguf"}))
        raise ValueError(f"quantization_config.quant_backend must be one of {known}; got {backend!r}.")
    if backend == "torchao" and isinstance(arguments.get("quant_type"), str):
        arguments["quant_type"] = _torchao(arguments["quant_type"])
    components = value.get("components_to_quantize") or DENOISERS
    components = [components] if isinstance(components, str) else components
    try:
        kinds = {name: TRANSFORMERS if name.startswith("text_encoder") else DIFFUSERS for name in components}
        mapping = {name: kind[backend](**arguments) for name, kind in kinds.items()}
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"quantization_config.quant_kwargs {arguments!r} do not fit {backend}: {error}") from error
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _torchao(name: str) -> Any:
    from torchao import quantization

    if not name.endswith("Config") or not hasattr(quantization, name):
        known = sorted(found for found in vars(quantization) if found.endswith("Config"))
        raise ValueError(
            f"quantization_config.quant_kwargs.quant_type must be one of {', '.join(known)}; got {name!r}."
        )
    return getattr(quantization, name)()
