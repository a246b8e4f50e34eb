"""Is it better, by how much, and is that certain? One protocol for training, the command line and the demo."""

from .adapters import AdapterSource, find_adapters
from .api import evaluate
from .files import write_files
from .grids import before_after, contact_sheet, member_strip
from .inputs import run_value
from .judge import ClipJudge, DiversityJudge, diversity_judge, load_judge
from .looks import LOOKS, looks_of
from .noise import Noise
from .pictures import choose_pairs, first_look, save_pairs, save_strengths
from .protocol import draw_images
from .result import Evaluation
from .rows import EvaluationRow, build_rows, default_rows
from .runs import RunsDifference, runs_difference
from .significance import holm, verdict, wilcoxon_p
from .statistics import MIN_PROMPTS, gap_closure, mean_estimate, paired_difference, wilson_interval


__all__ = [
    "LOOKS",
    "MIN_PROMPTS",
    "AdapterSource",
    "ClipJudge",
    "DiversityJudge",
    "Evaluation",
    "EvaluationRow",
    "Noise",
    "RunsDifference",
    "before_after",
    "build_rows",
    "choose_pairs",
    "contact_sheet",
    "default_rows",
    "diversity_judge",
    "draw_images",
    "evaluate",
    "find_adapters",
    "first_look",
    "gap_closure",
    "holm",
    "load_judge",
    "looks_of",
    "mean_estimate",
    "member_strip",
    "paired_difference",
    "run_value",
    "runs_difference",
    "save_pairs",
    "save_strengths",
    "verdict",
    "wilcoxon_p",
    "wilson_interval",
    "write_files",
]
