"""All that knows diffusers and peft."""

from .adapter import LORA_WEIGHTS_NAME, PipelineAdapter, check_lora_config
from .base_layers import is_cast
from .call_settings import CallSettings
from .denoising import DenoisingModel
from .differentiable import DifferentiableForward
from .digest import file_digest, tensor_digest
from .empty import build_pipeline, empty_pipeline, known_shapes, shorten, standing
from .frozen import FrozenPipeline
from .generators import Generator, GeneratorPipeline, as_pipeline
from .live_bytes import LiveBytes
from .loaded_adapters import LoadedAdapters
from .loading import check_pipeline, empty_denoiser, load_pipeline
from .lora_export import export_tensors
from .lora_files import read_lora
from .lora_loading import add_frozen, read_start
from .output_change import calibrate_sigma, output_change, tensors_of
from .policy import Gaussian
from .policy_sampling import PolicySampler, PolicySettings, Trajectory, check_policy
from .prompt_encoding import ENCODED_AT_ONCE
from .self_check import check_members, numbers_of, rounding_limit, watching_layers
from .set_up import set_up
from .spaces import SPACES
from .targets import DEFAULT_TARGETS
from .verify import verify_population_forward
from .watching import dtype_of


__all__ = [
    "DEFAULT_TARGETS",
    "ENCODED_AT_ONCE",
    "LORA_WEIGHTS_NAME",
    "SPACES",
    "CallSettings",
    "DenoisingModel",
    "DifferentiableForward",
    "FrozenPipeline",
    "Generator",
    "GeneratorPipeline",
    "Gaussian",
    "LoadedAdapters",
    "PipelineAdapter",
    "PolicySampler",
    "PolicySettings",
    "Trajectory",
    "add_frozen",
    "build_pipeline",
    "calibrate_sigma",
    "as_pipeline",
    "check_lora_config",
    "check_members",
    "check_pipeline",
    "check_policy",
    "dtype_of",
    "empty_denoiser",
    "empty_pipeline",
    "export_tensors",
    "file_digest",
    "is_cast",
    "known_shapes",
    "LiveBytes",
    "load_pipeline",
    "output_change",
    "numbers_of",
    "read_lora",
    "read_start",
    "rounding_limit",
    "set_up",
    "shorten",
    "standing",
    "tensor_digest",
    "tensors_of",
    "verify_population_forward",
    "watching_layers",
]
