"""es_trl's own messages on the terminal, for programs that have not set up logging themselves."""

import logging
import sys


def refuse(command: str, error: object, code: int = 2) -> int:
    """Says in one line why a command has failed or cannot work; returns its exit code."""
    sys.stderr.write(f"es-trl {command}: {' '.join(str(error).split())}\n")
    return code


class AboveTheBar(logging.Handler):
    """Writes to standard error, above any progress bar that stands there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_messages(first_process: bool) -> None:
    """What the library logs, to standard error: all of it in the first process, warnings in the others."""
    package = logging.getLogger("es_trl")
    if not _set_up() and not package.handlers:
        package.addHandler(AboveTheBar())
        package.setLevel(logging.INFO if first_process else logging.WARNING)
        package.propagate = False
        silence_loading()


def _set_up() -> bool:
    """Whether the program has set up logging: not where a library's `logging.warning(...)`, at its import, has."""
    root = logging.getLogger()
    by_default = all(getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT for handler in root.handlers)
    return bool(root.handlers) and not (by_default and root.level == logging.WARNING)


def silence_loading() -> None:
    """No bar for every part of a model that is loaded: what is loaded is one line of ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
