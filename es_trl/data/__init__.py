"""Prompts: from lists, files, data sets and the Hub to one `datasets.Dataset` with a column "prompt"."""

from .prompts import check_max_prompts, check_prompts, load_prompts
from .storable import unstorable


__all__ = ["check_max_prompts", "check_prompts", "load_prompts", "unstorable"]
