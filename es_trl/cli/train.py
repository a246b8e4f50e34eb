"""`es-trl train`: what the recipes run, with the method of the config or of `--method`."""

import sys
from collections.abc import Sequence

from .arguments import RunArguments, method_of, parse
from .messages import refuse


def main(argv: Sequence[str]) -> int:
    """Trains from `--config` and the command line; what is missing or cannot work is one line and exit code 2."""
    if any(word in ("-h", "--help", "--help-all") for word in argv):
        sys.stdout.write(_help(argv, "--help-all" in argv))
        return 0
    try:
        arguments, config = parse(args=argv)
        from ..trainer import trainer_of
        from .training import prepare, run

        trainer = prepare(trainer_of(arguments.method or "es"), arguments, config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return refuse("train", error)
    run(trainer, arguments)
    return 0


def _help(argv: Sequence[str], everything: bool) -> str:
    from ..trainer import config_of
    from .options import help_text

    try:
        method = method_of([word for word in argv if not word.startswith("--help")])
        config_class = config_of(method)
    except ValueError:  # asked for help with what is wrong: that of the default method is still help
        method, config_class = "es", config_of("es")
    return help_text("es-trl train", [RunArguments, config_class], method, everything)
