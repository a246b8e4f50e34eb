"""How much memory this process needed at most."""

import sys
from pathlib import Path


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
