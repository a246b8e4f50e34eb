"""Post-train text-to-image diffusion models with evolution strategies, in the manner of TRL.

`import es_trl` is free: a public name is imported from its room when it is first used, so that `es-trl --help` and the
checks of a config file do not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from es_trl.data import load_prompts
    from es_trl.evaluation import evaluate
    from es_trl.pipelines import PipelineAdapter, verify_population_forward
    from es_trl.rewards import RewardSet, from_ddpo
    from es_trl.trainer import (
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

_ROOM_OF = {
    "DDPOConfig": "es_trl.trainer",
    "DDPOTrainer": "es_trl.trainer",
    "DiffusionConfig": "es_trl.trainer",
    "DiffusionDPOConfig": "es_trl.trainer",
    "DiffusionDPOTrainer": "es_trl.trainer",
    "DiffusionTrainer": "es_trl.trainer",
    "ESConfig": "es_trl.trainer",
    "ESTrainer": "es_trl.trainer",
    "GRPOConfig": "es_trl.trainer",
    "GRPOTrainer": "es_trl.trainer",
    "PipelineAdapter": "es_trl.pipelines",
    "PolicyGradientConfig": "es_trl.trainer",
    "PolicyGradientTrainer": "es_trl.trainer",
    "PrefGRPOConfig": "es_trl.trainer",
    "PrefGRPOTrainer": "es_trl.trainer",
    "RewardSet": "es_trl.rewards",
    "evaluate": "es_trl.evaluation",
    "from_ddpo": "es_trl.rewards",
    "load_prompts": "es_trl.data",
    "verify_population_forward": "es_trl.pipelines",
}

__all__ = [
    "DDPOConfig",
    "DDPOTrainer",
    "DiffusionConfig",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionTrainer",
    "ESConfig",
    "ESTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "PipelineAdapter",
    "PolicyGradientConfig",
    "PolicyGradientTrainer",
    "PrefGRPOConfig",
    "PrefGRPOTrainer",
    "RewardSet",
    "evaluate",
    "from_ddpo",
    "load_prompts",
    "verify_population_forward",
]


def _version() -> str:
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("es-trl")
    except metadata.PackageNotFoundError:  # used from a checkout that was never installed
        return (Path(__file__).parent.parent / "VERSION").read_text(encoding="utf-8").strip()


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        from importlib import import_module

        value = getattr(import_module(_ROOM_OF[name]), name)
    elif name == "__version__":
        value = _version()
    else:
        from difflib import get_close_matches

        close = get_close_matches(name, __all__, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else f" Public names: {', '.join(__all__)}."
        raise AttributeError(f"module `es_trl` has no name `{name}`.{hint}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
