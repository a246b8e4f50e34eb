"""What a run ran on, for `env.json` and model cards: versions and hardware, no names of people, hosts or folders."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors", "trl",
    "numpy",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """
    Software and hardware. `git_commit` is that of the checkout es_trl is used from (`None` when installed from a
    package; ends in `+changes` when files differ from the commit), `threads` torch's, `memory_gb` the machine's,
    `gpu_memory_gb` that of each GPU, and `cuda` what torch was built for.
    """
    import psutil
    import torch

    from ..version import __version__

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "es_trl": __version__,
        "git_commit": _git_commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [gpu.name for gpu in gpus],
        "gpu_memory_gb": [round(gpu.total_memory / 1e9, 1) for gpu in gpus],
        "cuda": torch.version.cuda,
    }


@functools.cache  # each is a file to read and parse
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit(root: Path) -> str | None:
    # Only a checkout of es_trl itself counts: an environment may lie inside somebody's own repository.
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, encoding="utf-8", timeout=10, check=True)
    return done.stdout.strip()
