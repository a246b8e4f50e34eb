"""`es-trl verify RUN`: proves that the adapter of a run follows from its journal."""

import argparse
import sys
from collections.abc import Sequence

from .messages import refuse


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if every saved adapter is replayed bit by bit, 1 if one is not, 2 if nothing can be replayed."""
    parser = argparse.ArgumentParser(
        "es-trl verify",
        description="Replays every estimate and optimizer step from RUN/journal.jsonl, without drawing a picture, and "
        "compares the result with the saved adapter and checkpoints, bit by bit.",
    )
    parser.add_argument("run", help="the output_dir of an ES run")
    parser.add_argument("--model", help="the base model, if the recorded name does not load")
    arguments = parser.parse_args(argv)
    from ..replay import read_journal

    try:
        read_journal(arguments.run)  # a wrong folder is said before anything heavy is imported
        from ..replay import verify_run

        result = verify_run(arguments.run, arguments.model)
    except (ValueError, OSError) as error:
        return refuse("verify", error)
    for name, same in result.matches.items():
        sys.stdout.write(f"{name}: {'the same bits' if same else 'DIFFERENT'}\n")
    if not result.matches:
        sys.stdout.write(f"{arguments.run} holds no adapter to compare with.\n")
    sys.stdout.write(f"{result.steps} steps replayed, LoRA sha256 {result.digest}\n")
    return 0 if result.proven else 1
