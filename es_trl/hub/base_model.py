"""What is known of the base model without asking the network: whether it has a Hub id, and its licence."""

import logging
import os
import re
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from .. import assets


logger = logging.getLogger(__name__)


# The Hub's own rule for `owner/name`.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def is_hub_id(name: str | None) -> TypeGuard[str]:
    """Whether `name` reads as `owner/name` and is not a folder here."""
    return name is not None and bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)


def shown_name(name: str) -> str:
    """The name to publish: a folder of this machine loses everything but its last part."""
    return name if name in assets.SHIPPED or is_hub_id(name) else os.path.basename(os.path.normpath(name))


def base_license(base_model: str | None) -> dict[str, str | list[str]]:
    """
    The licence that the card of the base model (a shipped name, a folder, or a Hub id, of which only the local cache
    is read) names: `license` (one name, or a list where the card lists several), and `license_name`, `license_link`
    where given; empty when there is no card, none that can be read, or it names none.
    """
    from huggingface_hub import try_to_load_from_cache

    if not base_model:
        return {}
    if is_hub_id(base_model):
        found = try_to_load_from_cache(base_model, "README.md")
        path = Path(found) if isinstance(found, str) else None
    else:
        path = Path(assets.resolve(base_model), "README.md")
    if path is None or not os.path.isfile(path):  # Path.is_file raises for a name no file can have
        return {}
    data = _front_matter(path)
    texts = {key: str(data[key]) for key in ("license", "license_name", "license_link") if _is_text(data.get(key))}
    names = data.get("license")
    licence = [str(name) for name in names if _is_text(name)] if isinstance(names, list) else texts.get("license")
    return {**texts, "license": licence} if licence else {}


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the top of a card; empty when it cannot be read, since other people's cards hold anything."""
    try:
        block = _FRONT_MATTER.match(path.read_text(encoding="utf-8-sig", errors="replace"))
        data = yaml.safe_load(block.group(1)) if block else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        logger.warning("The licence of the base model is not known: %s cannot be read (%s).", path, error)
        return {}
    return data if isinstance(data, dict) else {}


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and bool(str(value).strip())
