"""All that knows diffusers and peft."""

from .adapter import DEFAULT_TARGETS, LORA_WEIGHTS_NAME, PipelineAdapter, check_lora_config
from .call_settings import CallSettings
from .loading import check_pipeline, load_pipeline
from .spaces import SPACES
from .verify import verify_population_forward


__all__ = [
    "DEFAULT_TARGETS",
    "LORA_WEIGHTS_NAME",
    "SPACES",
    "CallSettings",
    "PipelineAdapter",
    "check_lora_config",
    "check_pipeline",
    "load_pipeline",
    "verify_population_forward",
]
