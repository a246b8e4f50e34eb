"""Switches of a pipeline that are thrown before it draws: its schedule, and how its pictures are decoded."""

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from ..names import hint


def set_up(
    pipe: Any, scheduler_config: Mapping[str, Any] | None = None, vae_slicing: bool = False, vae_tiling: bool = False
) -> None:
    """
    Throws them on `pipe`.

    Args:
        scheduler_config (`dict`, *optional*): What its scheduler has otherwise than its own; `_class_name` is another
            class of diffusers.
        vae_slicing (`bool`, *optional*): Decode one picture at a time.
        vae_tiling (`bool`, *optional*): Decode a picture in overlapping tiles.

    Raises:
        `ValueError`: for what this pipeline does not have.
    """
    if scheduler_config:
        pipe.scheduler = _scheduler(pipe, dict(scheduler_config))
    vae = getattr(pipe, "vae", None)
    for name in [name for name, wanted in (("slicing", vae_slicing), ("tiling", vae_tiling)) if wanted]:
        if not hasattr(vae, f"enable_{name}"):
            raise ValueError(
                f"vae_{name}=True: the autoencoder of {type(pipe).__name__} ({type(vae).__name__}) has no {name}; "
                "leave it out and lower the images that are drawn at once."
            )
        getattr(vae, f"enable_{name}")()


def _scheduler(pipe: Any, changes: dict[str, Any]) -> Any:
    own = getattr(pipe, "scheduler", None)
    if own is None:
        raise ValueError(f"scheduler_config: {type(pipe).__name__} has no scheduler.")
    name = changes.pop("_class_name", type(own).__name__)
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
        raise ValueError(f"scheduler_config: diffusers has no scheduler {name!r}. {hint(name, known)}".rstrip())
    scheduler: Any = kind
    expected = scheduler._get_init_keys(kind) - {"self"}
    for key in changes:
        if key not in expected:
            raise ValueError(f"scheduler_config: {name} takes no {key!r}. {hint(key, expected)}".rstrip())
    return scheduler.from_config(own.config, **changes)
