"""Is it better, by how much, and is that certain? One protocol for training, the command line and the demo."""

from .grids import before_after, contact_sheet, member_strip
from .judge import ClipJudge, load_judge
from .protocol import EvaluationRow, default_rows, draw_images, evaluate
from .result import Evaluation
from .statistics import gap_closure, mean_estimate, paired_difference, wilson_interval


__all__ = [
    "ClipJudge",
    "Evaluation",
    "EvaluationRow",
    "before_after",
    "contact_sheet",
    "default_rows",
    "draw_images",
    "evaluate",
    "gap_closure",
    "load_judge",
    "mean_estimate",
    "member_strip",
    "paired_difference",
    "wilson_interval",
]
