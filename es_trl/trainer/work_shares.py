"""Whether every process of a run has something to do."""

import logging


logger = logging.getLogger(__name__)


def warn_if_idle(num_processes: int, shares: int, raise_field: str, lower_field: str) -> None:
    """
    Says it if a step has fewer pieces of work than there are processes: the result would be the same, the wait too.

    Args:
        num_processes (`int`): How many there are.
        shares (`int`): Pieces that a step is dealt out in.
        raise_field, lower_field (`str`): Settings that make more pieces when raised or lowered.
    """
    if shares < num_processes:
        logger.warning(
            "Only %d of %d processes have work in a step: raise %s or lower %s, so that there are at least as many "
            "pieces of work as processes.",
            shares,
            num_processes,
            raise_field,
            lower_field,
        )
