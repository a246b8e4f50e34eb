"""What is known of the base model without asking the network: whether it has a Hub id, and its licence."""

import os
import re
from pathlib import Path

from .. import assets


# The Hub's own rule for `owner/name`.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str | None) -> bool:
    """Whether `name` reads as `owner/name` and is not a folder here."""
    return bool(name) and bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)


def shown_name(name: str) -> str:
    """The name to publish: a folder of this machine loses everything but its last part."""
    return name if name in assets.SHIPPED or is_hub_id(name) else os.path.basename(os.path.normpath(name))


def base_license(base_model: str | None) -> dict[str, str]:
    """
    The licence that the base model's card names.

    Args:
        base_model (`str`, *optional*): Shipped name, folder, or Hub id; of a Hub id only what the local cache holds is
            read.

    Returns:
        `dict[str, str]`: `license`, and `license_name`, `license_link` where given; empty when there is no card or it
            names none.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if not base_model:
        return {}
    if is_hub_id(base_model):
        found = try_to_load_from_cache(base_model, "README.md")
        path = Path(found) if isinstance(found, str) else None
    else:
        path = Path(assets.resolve(base_model), "README.md")
    if path is None or not os.path.isfile(path):  # Path.is_file raises for a name no file can have
        return {}
    data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    keys = ("license", "license_name", "license_link")
    return {key: str(data.get(key)) for key in keys if data.get(key)} if data.get("license") else {}
