"""PartiPrompts (Yu et al. 2022, arXiv 2206.10789; Apache-2.0): 1632 prompts, each with a category and a challenge."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

PARTI_PROMPTS = 1632
_COLUMNS = {"Category": "category", "Challenge": "challenge", "Note": "note"}


def is_parti(dataset: datasets.Dataset) -> bool:
    """Whether these are the columns of `PartiPrompts.tsv` and of its copy on the Hub, beside the prompts."""
    return {"Category", "Challenge"} <= set(dataset.column_names)


def read_parti(dataset: datasets.Dataset) -> datasets.Dataset:
    """
    All rows of PartiPrompts, from its TSV or from the Hub, with columns "prompt", "category", "challenge" and "note".
    A count other than 1632 is said in a warning: reading the file with quotes swallows a prompt, and results on fewer
    prompts cannot be compared.
    """
    dataset = dataset.rename_columns({old: new for old, new in _COLUMNS.items() if old in dataset.column_names})
    if len(dataset) != PARTI_PROMPTS:
        logger.warning("PartiPrompts has %d prompts here, the original has %d.", len(dataset), PARTI_PROMPTS)
    return dataset
