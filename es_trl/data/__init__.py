"""Prompts: from lists, files, data sets and the Hub to one `datasets.Dataset` with a column "prompt"."""

from .prompts import load_prompts


__all__ = ["load_prompts"]
