"""Is it better, by how much, and is that certain? One protocol for training, the command line and the demo."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from .adapters import AdapterSource, find_adapters
    from .api import evaluate
    from .files import write_files
    from .grids import before_after, contact_sheet, member_strip
    from .inputs import run_value
    from .judge import ClipJudge, DiversityJudge, diversity_judge, load_judge
    from .looks import LOOKS, looks_of
    from .noise import Noise
    from .options import EvaluationOptions
    from .pictures import first_look, save_pictures
    from .protocol import draw_images
    from .result import Evaluation
    from .rows import EvaluationRow, build_rows, default_rows
    from .runs import RunsDifference, runs_difference
    from .statistics import (
        MIN_PROMPTS,
        gap_closure,
        holm,
        mean_estimate,
        paired_difference,
        verdict,
        wilcoxon_p,
        wilson_interval,
    )  # fmt: skip

__all__, __getattr__, __dir__, _ = attach(__name__, __file__)
