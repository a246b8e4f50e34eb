"""Which adapter a result belongs to: `eval.json` and pictures carry the digest of what they judged."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import LORA_WEIGHTS_NAME


logger = logging.getLogger(__name__)


def adapter_digest(place: str | os.PathLike[str]) -> str | None:
    """`lora_digest` of the adapter that a folder, or a file, holds; `None` without one."""
    from safetensors import SafetensorError

    from ..pipelines import file_digest  # brings diffusers along

    path = Path(place) if Path(place).is_file() else Path(place, LORA_WEIGHTS_NAME)
    try:
        return file_digest(path) if path.is_file() else None
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None


def judged(evaluation: Mapping[str, Any] | None, digest: str | None) -> bool:
    """Whether an `eval.json` judged the adapter with this digest; one that names no adapter judged none."""
    protocol = (evaluation or {}).get("protocol")
    named = protocol.get("judged") if isinstance(protocol, dict) else None
    return isinstance(named, dict) and digest is not None and digest in named.values()


def stamp(digest: str) -> bytes:
    """The comment of a JPEG that was drawn with an adapter."""
    return f"adapter sha256 {digest}".encode("ascii")


def drawn_with(path: str | os.PathLike[str], digest: str | None) -> bool:
    """Whether the picture in a file carries the stamp of this adapter."""
    if digest is None:
        return False
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get("comment") == stamp(digest)
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
