"""`es-trl <command>`: the table of commands; each has a file of its own with `main(argv) -> exit code`."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from .arguments import check_names
from .messages import refuse


# command -> (module of this package, one line of help); a module is imported only when its command runs
COMMANDS = {
    "train": ("train", "train from a config: es-trl train --config my_config.yaml"),
    "dry-run": ("dry_run", "does a config work, does it fit, how long would it take: es-trl dry-run --config FILE"),
    "eval": ("eval", "base and adapters on the same prompts and noise: es-trl eval --adapter RUN --prompts FILE ..."),
    "report": ("report", "the page of a run or an evaluation, written again: es-trl report FOLDER"),
    "compare": ("compare", "several runs or training seeds on one page: es-trl compare RUN... --output_dir DIR"),
    "export": ("export", "an adapter for ComfyUI or kohya, or merged: es-trl export RUN --format comfyui"),
    "verify": ("verify", "prove from its journal that a run's adapter is what its steps give: es-trl verify RUN"),
    "show": ("show", "draw any member of any step again: es-trl show RUN --step 12 --member 3"),
    "reward": ("reward", "list the rewards, or try one: es-trl reward check NAME or file.py:function"),
    "recipes": ("recipes", "configs to start from, usable by name after --config: es-trl recipes list"),
    "env": ("env", "versions and hardware, ready to paste into a bug report"),
}
# these take the settings of a run, and the options given here; names are looked at before the command is imported
OF_A_RUN = {"train": (), "dry-run": ("gpu",)}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Entry point of `es-trl`.

    Returns:
        `int`: The exit code: 0, 1 for a failed run, 2 for arguments that cannot work.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1) if argv else []
        text = f"es-trl: unknown command {argv[0]!r}." if argv else _usage()
        text += f" Did you mean 'es-trl {near[0]}'?" if near else " es-trl --help lists them." if argv else ""
        sys.stderr.write(text.rstrip("\n") + "\n")
        return 2
    if argv[0] in OF_A_RUN and argv[1:] and not any(word in ("-h", "--help", "--help-all") for word in argv):
        try:
            check_names(argv[1:], beside=OF_A_RUN[argv[0]])
        except ValueError as error:
            return refuse(argv[0], error)
    try:
        code = importlib.import_module(f".{COMMANDS[argv[0]][0]}", __package__).main(argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `es-trl recipes list | head`: who read it has seen enough
        if argv[0] in OF_A_RUN:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        code = 0
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = ["usage: es-trl <command> [options]", "",
            "Post-train text-to-image diffusion models with evolution strategies.", ""]  # fmt: skip
    return "\n".join([*head, *lines, "", "es-trl <command> --help explains a command's options.", ""])


if __name__ == "__main__":
    sys.exit(main())
