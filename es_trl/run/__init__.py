"""How any run survives and shows itself: checkpoints, stopping, processes, samples, trackers, pushing, results."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from ..lock import FolderInUse
    from .checkpoint import CheckpointCorrupt
    from .live import running
    from .memory import peak_memory_gb
    from .stopping import TrainingStopped

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
