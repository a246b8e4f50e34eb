"""Files that ship with the package: the small pipeline, its two scorers, and its prompt lists, by name."""

from pathlib import Path


ROOT = Path(__file__).parent

SHIPPED = {
    "tiny-sana-sprint": "tiny-sana-sprint",
    "tiny-pickscore": "tiny-pickscore",
    "tiny-clip-heldout": "tiny-clip-heldout",
    "tiny-train": "prompts/train.txt",
    "tiny-validation": "prompts/validation.txt",
    "tiny-test": "prompts/test.txt",
}


def path(*parts: str) -> str:
    """Absolute path of a shipped file or folder, given its parts below `es_trl/assets`."""
    return str(ROOT.joinpath(*parts))


def resolve(name: str) -> str:
    """The absolute path behind a shipped name; any other string (a path, a Hub id) is returned unchanged."""
    return path(SHIPPED[name]) if name in SHIPPED else name
