"""What a run or an evaluation found, as one page to look at: `report/index.html` and charts for READMEs."""

from .comparison import write_comparison
from .folder import read_folder
from .live import LivePage
from .page import write_report
from .text import evaluation as evaluation_text


__all__ = ["LivePage", "evaluation_text", "read_folder", "write_comparison", "write_report"]
