"""`es-trl env`: versions and hardware."""

import argparse
import json
import sys
from collections.abc import Sequence

from ..hub import environment


def main(argv: Sequence[str]) -> int:
    """Writes JSON to standard output."""
    argparse.ArgumentParser("es-trl env", description=__doc__).parse_args(argv)
    sys.stdout.write(json.dumps(environment(), indent=2) + "\n")
    return 0
