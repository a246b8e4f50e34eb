"""All that knows diffusers and peft. Neither is imported until a name below is used."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from ..files import LORA_WEIGHTS_NAME
    from .adapter import PipelineAdapter, check_lora_config
    from .base_layers import is_cast, rounding_dtype
    from .call_settings import CallSettings
    from .denoising import DenoisingModel, rows_of
    from .differentiable import DifferentiableForward
    from .digest import file_digest, tensor_digest
    from .empty import build_pipeline, empty_pipeline, known_shapes, no_starting_values, shorten, standing
    from .equal_blocks import equal_blocks_once
    from .frozen import FrozenPipeline
    from .generators import Generator, GeneratorPipeline, as_pipeline
    from .live_bytes import LiveBytes
    from .loaded_adapters import LoadedAdapters
    from .loading import check_pipeline, empty_denoiser, load_pipeline
    from .lora_export import export_tensors
    from .lora_files import read_lora
    from .lora_loading import add_frozen, read_start
    from .output_change import calibrate_sigma, tensors_of
    from .policy import Gaussian
    from .policy_sampling import PolicySampler, PolicySettings, Trajectory, check_policy
    from .prompt_encoding import ENCODED_AT_ONCE
    from .self_check import check_members, numbers_of, rounding_limit, watching_layers
    from .spaces import SPACES
    from .switches import set_up
    from .targets import DEFAULT_TARGETS
    from .verify import verify_population_forward
    from .watching import dtype_of

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
