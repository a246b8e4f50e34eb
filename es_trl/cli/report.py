"""`es-trl report`: the page of a run or an evaluation, written again."""

import argparse
import sys
from collections.abc import Sequence

from ..report import write_report


def main(argv: Sequence[str]) -> int:
    """Writes `report/index.html` into each folder; a path that is no folder is one line and exit code 2."""
    parser = argparse.ArgumentParser("es-trl report", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or output folders of es-trl eval")
    arguments = parser.parse_args(argv)
    failed = False
    for folder in arguments.folders:
        try:
            page = write_report(folder)
        except ValueError as error:
            sys.stderr.write(f"es-trl report: {error}\n")
            return 2
        failed = failed or page is None
        if page is not None:
            sys.stdout.write(f"{page}\n")
    return 1 if failed else 0
