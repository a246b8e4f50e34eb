"""What is said of a method: its name, tags and papers. Each method's stand on its trainer class, and in its runs."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv, to link to and to cite."""

    id: str
    title: str
    key: str
    year: int
    authors: str

    @property
    def citation(self) -> str:
        """A BibTeX entry."""
        return (
            f"@article{{{self.key},\n  title   = {{{self.title}}},\n  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.id}}},\n  year    = {{{self.year}}}\n}}"
        )


@dataclass(frozen=True)
class Method:
    """
    Facts about a method.

    Args:
        label (`str`): As charts and tables write it: "ES".
        title (`str`, *optional*): As a sentence writes it: "evolution strategies (EGGROLL)"; by default the label.
        tags (`tuple[str, ...]`, *optional*): Of its model cards.
        papers (`tuple[Paper, ...]`, *optional*): What to cite, the method's own first.
        settings (`tuple[str, ...]`, *optional*): What its cards show beside the settings of every method.
    """

    label: str
    title: str = ""
    tags: tuple[str, ...] = ()
    papers: tuple[Paper, ...] = ()
    settings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As `es_config.json` holds it."""
        return asdict(self)

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Method":
        """
        The facts that a run's `es_config.json` holds; of what cannot be read there is left the method's name.
        """
        name, found = str(config.get("method") or "es"), config.get("about")
        if not isinstance(found, dict) or not isinstance(found.get("label"), str):
            return cls(name, name)
        names = {field.name for field in fields(Paper)}
        papers = [paper for paper in found.get("papers") or () if isinstance(paper, dict) and paper.keys() == names]
        texts = {key: tuple(str(text) for text in found.get(key) or ()) for key in ("tags", "settings")}
        title = str(found.get("title") or found["label"])
        return cls(found["label"], title, papers=tuple(Paper(**paper) for paper in papers), **texts)


# The settings of every method, in the order of the card. Everything else is in `es_config.json`.
SETTINGS = (
    "max_steps", "prompts_per_step", "images_per_prompt", "scale_rewards", "multi_objective_aggregation", "optim",
    "optim_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "gradient_accumulation_steps", "max_grad_norm",
    "dtype", "seed",
)  # fmt: skip
