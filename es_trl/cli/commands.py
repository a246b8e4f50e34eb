"""`es-trl <command>`: train, env."""

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """
    Entry point of `es-trl`. Returns the exit code: 0, 1 for a failed run, 2 for arguments that cannot work.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "es-trl", description="Post-train text-to-image diffusion models with evolution strategies."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("train", add_help=False, help="train from a config: es-trl train --config my_config.yaml")
    commands.add_parser("env", help="versions and hardware, ready to paste into a bug report")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "env":
        return _env()
    return _train(rest)


def _train(argv: Sequence[str]) -> int:
    from ..trainer import ESConfig, ESTrainer
    from .arguments import parse
    from .training import prepare, run

    try:
        arguments, config = parse(ESConfig, argv)
        trainer = prepare(ESTrainer, arguments, config)
    except (ValueError, TypeError) as error:
        sys.stderr.write(f"es-trl: {error}\n")
        return 2
    run(trainer, arguments)
    return 0


def _env() -> int:
    from ..hub import environment

    sys.stdout.write(json.dumps(environment(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
