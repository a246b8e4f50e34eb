"""`es-trl show RUN --step S --member M`: draws again what one member of a population drew."""

import argparse
import os
import sys
from collections.abc import Sequence

from .messages import refuse


def main(argv: Sequence[str]) -> int:
    """Writes a PNG with the member's images, their prompts and recorded scores."""
    parser = argparse.ArgumentParser(
        "es-trl show", description="Draws again what one member of one step's population drew, from RUN/journal.jsonl."
    )
    parser.add_argument("run", help="the output_dir of an ES run")
    parser.add_argument("--step", type=int, required=True, help="step, from 0")
    parser.add_argument("--member", type=int, required=True, help="member, from 0")
    parser.add_argument("--micro", type=int, default=0, help="prompt batch, under gradient accumulation")
    parser.add_argument("--output", help="by default RUN/samples/member-SSSSSS-MMMM.png")
    parser.add_argument("--model", help="the base model, if the recorded name does not load")
    arguments = parser.parse_args(argv)
    from ..replay import read_journal

    try:
        read_journal(arguments.run)  # a wrong folder is said before anything heavy is imported
        from ..evaluation import contact_sheet
        from ..replay import redraw_member

        images, prompts, scores = redraw_member(
            arguments.run, arguments.step, arguments.member, arguments.micro, arguments.model
        )
    except (ValueError, OSError) as error:
        return refuse("show", error)
    name = f"member-{arguments.step:06d}-{arguments.member:04d}.png"
    path = arguments.output or os.path.join(arguments.run, "samples", name)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    texts = [f"{' '.join(f'{s:.4g}' for s in row)}  {p}" for row, p in zip(scores.tolist(), prompts, strict=True)]
    contact_sheet([images], None, texts, f"step {arguments.step}, member {arguments.member}").save(path)
    sys.stdout.write(f"{path}\n")
    return 0
