"""`es-trl report`: the page of a run or an evaluation, written again, or served while the run trains."""

import argparse
import sys
import time
from collections.abc import Sequence

from .messages import refuse


def main(argv: Sequence[str]) -> int:
    """Writes `report/index.html` into each folder; a path that is no folder is one line and exit code 2."""
    parser = argparse.ArgumentParser("es-trl report", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or output folders of es-trl eval")
    what = "serve the page of one run while it trains, on this machine only"
    parser.add_argument("--follow", action="store_true", help=what)
    parser.add_argument("--port", type=int, default=0, help="port of --follow; a free one by default")
    arguments = parser.parse_args(argv)
    if arguments.follow:
        return _follow(arguments.folders, arguments.port)
    from ..report import write_report

    failed = False
    for folder in arguments.folders:
        try:
            page = write_report(folder)
        except ValueError as error:
            return refuse("report", error)
        failed = failed or page is None
        if page is not None:
            sys.stdout.write(f"{page}\n")
    return 1 if failed else 0


def _follow(folders: Sequence[str], port: int) -> int:
    """Serves until Ctrl-C."""
    if len(folders) != 1:
        return refuse("report", f"--follow takes one folder, got {len(folders)}.")
    from ..report import LivePage
    from ..run import running

    try:
        page = LivePage(folders[0], port, running).start()
    except (OSError, OverflowError) as error:
        return refuse("report", f"port {port} cannot be used: {error}")
    sys.stdout.write(f"{page.url}\n")
    sys.stdout.flush()
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close()
    return 0
