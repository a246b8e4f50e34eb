"""What is published with an adapter: its model card and the environment it was trained in."""

from .base_model import base_license
from .card import model_card
from .environment import environment
from .escaping import md_escape


__all__ = ["base_license", "environment", "md_escape", "model_card"]
