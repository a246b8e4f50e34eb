"""The version of this package."""

from importlib import metadata
from pathlib import Path


def _version() -> str:
    try:
        return metadata.version("es-trl")
    except metadata.PackageNotFoundError:  # used from a checkout that was never installed
        return (Path(__file__).parent.parent / "VERSION").read_text(encoding="utf-8").strip()


__version__ = _version()
