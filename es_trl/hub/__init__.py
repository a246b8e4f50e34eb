"""What is published with an adapter, and how: model card, environment, upload; and adapters by name."""

from .adapters import find_adapter
from .base_model import base_license
from .card import model_card
from .environment import environment
from .escaping import md_escape
from .judged import adapter_digest, drawn_with, judged, stamp


__all__ = [
    "adapter_digest", "base_license", "drawn_with", "environment", "find_adapter", "judged", "md_escape", "model_card",
    "stamp",
]  # fmt: skip
