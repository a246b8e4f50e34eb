"""Too little memory while drawing."""

import logging
from collections.abc import Sequence

import torch


logger = logging.getLogger(__name__)


class MembersInMemory:
    """
    How many members fit into one forward pass. Starts without a limit and halves it whenever memory runs out; the
    population, the prompts and who draws what stay as they are, so that processes need not agree on it.
    """

    def __init__(self):
        self.limit: int | None = None

    def pieces(self, members: Sequence[int]) -> list[list[int]]:
        """`members` in order, in runs that fit."""
        size = self.limit or len(members)
        return [list(members[i : i + size]) for i in range(0, len(members), size)]

    def halve(self, members: int, images: int) -> None:
        """
        Takes note that `members` with `images` pictures each did not fit.

        Raises:
            `RuntimeError`: if it was a single one.
        """
        if members == 1:
            raise RuntimeError(
                f"Out of memory with a single member of {images} images per forward. Lower prompts_per_step or "
                'images_per_prompt, set dtype="bfloat16" or release_text_encoder=True, or draw smaller pictures '
                "(height, width)."
            )
        self.limit = members // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "Out of memory with %d members per forward: %d from here on. Images are the same up to rounding; set "
            "members_per_forward=%d for runs that are the same bit by bit.",
            members,
            self.limit,
            self.limit,
        )
