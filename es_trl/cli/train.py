"""`es-trl train`: what the recipes run, with the method of the config or of `--method`."""

import sys
from collections.abc import Sequence

from ..trainer import method_classes
from .arguments import parse
from .training import prepare, run


def main(argv: Sequence[str]) -> int:
    """Trains from `--config` and the command line; what is missing or cannot work is one line and exit code 2."""
    try:
        arguments, config = parse(args=argv)
        trainer = prepare(method_classes(arguments.method)[1], arguments, config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"es-trl train: {' '.join(str(error).split())}\n")
        return 2
    run(trainer, arguments)
    return 0
