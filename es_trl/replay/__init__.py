"""A run proven and redrawn from its journal."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from .replay import Verification, redraw_member, verify_run
    from .sessions import ReplayError, read_journal

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
