"""`es-trl env`: versions and hardware."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from ..hub import environment


# Packages that matter only when they are there.
OPTIONAL = ("wandb", "trackio", "tensorboard", "open_clip_torch", "rapidocr", "onnxruntime", "gradio", "bitsandbytes")
# Variables that change what a run does; the values of others, tokens above all, are nobody's business.
VARIABLES = (
    "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE",
    "ACCELERATE_USE_CPU", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_COMPILE_DISABLE",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Writes a Markdown list, or JSON, to standard output."""
    parser = argparse.ArgumentParser("es-trl env", description=f"{__doc__} Paste it into a bug report as it is.")
    parser.add_argument("--json", action="store_true", help="JSON, as in a run's env.json, instead of Markdown.")
    arguments = parser.parse_args(argv)
    found = environment()
    listed = "\n".join(f"- {name}: {value}" for name, value in _lines(found))
    sys.stdout.write((json.dumps(found, indent=2) if arguments.json else listed) + "\n")
    return 0


def _lines(found: dict) -> list[tuple[str, str]]:
    cuda = f"CUDA {found['cuda']}" if found["cuda"] else "no CUDA"
    gpus = [f"{name} ({size} GB)" for name, size in zip(found["gpus"], found["gpu_memory_gb"], strict=True)]
    packages = {name: version or "missing" for name, version in found["packages"].items()}
    packages["torch"] += f" ({cuda})"
    packages |= {name: version for name in OPTIONAL if (version := _version(name))}
    cores = f"{found['cpu_cores']} cores, threads used: {found['threads']}, {found['memory_gb']} GB"
    set_here = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    return [
        ("es_trl", found["es_trl"] + (f", commit {found['git_commit']}" if found["git_commit"] else "")),
        ("Python", f"{found['python']} on {found['platform']}"),
        *packages.items(),
        ("CPU", f"{found['cpu']}, {cores}"),
        ("GPU", ", ".join(gpus) or "none"),
        *([("Variables", set_here)] if set_here else []),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
