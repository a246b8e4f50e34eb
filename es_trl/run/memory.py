"""The memory that a run takes."""

import sys
from pathlib import Path

import psutil
import torch


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
