"""What is published with an adapter, and how: model card, environment, upload; and adapters by name."""

from .adapters import find_adapter
from .base_model import base_license
from .card import model_card
from .environment import environment
from .escaping import md_escape


__all__ = ["base_license", "environment", "find_adapter", "md_escape", "model_card"]
