"""How much memory this process needed at most."""

import sys
from pathlib import Path


def training_megabytes(train) -> float:
    """
    Runs `train()` and returns by how many MB (10^6 bytes) this process grew at most meanwhile, above what it had
    resident: models, libraries and Python itself do not count. Linux only (the peak is reset); 0 elsewhere.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except OSError:
        train()
        return 0.0
    before = peak_megabytes()
    train()
    return peak_megabytes() - before


def current_megabytes() -> float:
    """What this process has resident now, in MB (10^6 bytes); Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def peak_megabytes(device: str = "cpu") -> float:
    """
    Peak memory of this process in MB (10^6 bytes): allocated by torch on `"cuda"`, resident otherwise.

    On Linux `ru_maxrss` will not do: a child starts with the peak of its parent, so a small process that a large one
    started reports the large one.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
