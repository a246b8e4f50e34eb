"""The memory that a run takes, and what becomes of a step that asks for more."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch


logger = logging.getLogger(__name__)


def peak_memory_gb(device: torch.device) -> float:
    """
    Largest memory so far, in GB (10^9 bytes): what torch allocated on `device` if that is a GPU, otherwise what this
    process had resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    if sys.platform == "linux":
        # Not `ru_maxrss`: a process starts with the peak of the one that started it.
        return int(Path("/proc/self/status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class MembersInMemory:
    """
    How many members fit into one forward pass. Starts without a limit and halves it whenever memory runs out; the
    population, the prompts and who draws what stay as they are, so that processes need not agree on it.
    """

    def __init__(self):
        self.limit: int | None = None

    def pieces(self, members: Sequence[int]) -> list[list[int]]:
        """`members` in order, in runs that fit."""
        size = self.limit or len(members)
        return [list(members[i : i + size]) for i in range(0, len(members), size)]

    def halve(self, members: int, images: int) -> None:
        """Notes that `members` with `images` pictures each did not fit; a `RuntimeError` if it was a single one."""
        if members == 1:
            raise RuntimeError(
                f"Out of memory with a single member of {images} images per forward. Lower prompts_per_step or "
                'images_per_prompt, set dtype="bfloat16" or release_text_encoder=True, or draw smaller pictures '
                "(height, width)."
            )
        self.limit = members // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            f"Out of memory with {members} members per forward: {self.limit} from here on. Images are the same up to "
            f"rounding; set members_per_forward={self.limit} for runs that are the same bit by bit."
        )
