"""Post-train text-to-image diffusion models with evolution strategies, in the manner of TRL.

`import es_trl` is free: a public name is imported from its room when it is first used, so that `es-trl --help` and the
checks of a config file do not wait for torch.
"""

from typing import TYPE_CHECKING

from .lazy import attach


if TYPE_CHECKING:
    from .data import load_prompts
    from .evaluation import evaluate
    from .pipelines import PipelineAdapter, verify_population_forward
    from .rewards import RewardSet, from_ddpo
    from .trainer import (
        DDPOConfig,
        DDPOTrainer,
        DiffusionConfig,
        DiffusionDPOConfig,
        DiffusionDPOTrainer,
        DiffusionTrainer,
        ESConfig,
        ESTrainer,
        GRPOConfig,
        GRPOTrainer,
        PolicyGradientConfig,
        PolicyGradientTrainer,
        PrefGRPOConfig,
        PrefGRPOTrainer,
    )
    from .version import __version__

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
__all__.remove("__version__")
