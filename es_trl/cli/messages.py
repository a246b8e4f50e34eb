"""es_trl's own messages on the terminal, for programs that have not set up logging themselves."""

import logging


def show_messages(first_process: bool) -> None:
    """What the library logs, to standard error: all of it in the first process, warnings in the others."""
    package = logging.getLogger("es_trl")
    if not logging.getLogger().handlers and not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO if first_process else logging.WARNING)
        package.propagate = False
