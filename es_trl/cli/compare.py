"""`es-trl compare`: several runs on one page."""

import argparse
import sys
from collections.abc import Sequence

from .messages import refuse


def main(argv: Sequence[str]) -> int:
    """Writes `index.html`, `compare.md` and charts into `--output_dir`; wrong folders are one line and exit code 2."""
    parser = argparse.ArgumentParser("es-trl compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or output folders of es-trl eval")
    parser.add_argument("--labels", nargs="+", help="a name for each run; runs of one name are seeds of one method")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="folder of the page and its charts")
    arguments = parser.parse_args(argv)
    from ..report import write_comparison

    try:
        page = write_comparison(arguments.runs, arguments.output_dir, arguments.labels)
    except (ValueError, OSError) as error:
        return refuse("compare", error)
    table = page.with_name("compare.md")
    sys.stdout.write(f"{table.read_text(encoding='utf-8')}\n{table}\n{page}\n")
    return 0
