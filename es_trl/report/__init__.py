"""What a run or an evaluation found, as one page to look at: `report/index.html` and charts for READMEs."""

from .comparison import write_comparison
from .page import write_report


__all__ = ["write_comparison", "write_report"]
