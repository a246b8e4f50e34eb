"""`es-trl`: the command line, and what the recipe scripts share with it."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from .arguments import RunArguments, load_config, parse
    from .commands import main
    from .memory_plan import MemoryPlan, plan_memory
    from .training import prepare, run

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
