"""The run folder: whether it can be written, what an earlier run left in it, and a disk that refuses."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import LORA_WEIGHTS_NAME
from ..lock import FolderLock


logger = logging.getLogger(__name__)


def check_writable(output_dir: str) -> None:
    """
    Raises `ValueError` if no folder can be made there. It tries: rights say nothing of a file system that is mounted
    read-only or full, and to root they say nothing at all.
    """
    folder = os.path.abspath(output_dir)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    except OSError as error:
        reason = f"{folder} is a file" if os.path.isfile(folder) else f"{folder}: {error.strerror}"
        raise ValueError(f"output_dir={output_dir!r} cannot be written: {reason}.") from error


# What a run leaves in its folder, but for the logs of trackers. Files of other names are not ours.
LEFT_BY_A_RUN = (
    "checkpoint-*", "superseded-*", "journal.jsonl", "samples", "images", "report", LORA_WEIGHTS_NAME,
    "README.md", "es_config.json", "env.json", "eval.json", "eval.md", "scores.parquet", "prompts.jsonl",
    "trainer_state.json", "running.json", "training_args.bin", "rerun.yaml", "to_push",
)  # fmt: skip


class RunFolder:
    """Where a run writes: its `output_dir` and its `save_failure`, as in [`DiffusionConfig`]."""

    def __init__(self, path: str, save_failure: str = "raise"):
        self.path, self.save_failure, self.lock = path, save_failure, FolderLock(path)
        self._refused: set[str] = set()

    def set_earlier_aside(self) -> None:
        """
        Moves everything that an earlier run left in the folder into `earlier-1/` (2, 3, ... if there is one), and says
        so: nothing of it may be resumed from, shown or published as this run's.
        """
        folder = Path(self.path)
        found = sorted({path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)})
        if all(path.name == "rerun.yaml" for path in found):
            return
        number = 1
        while os.path.lexists(aside := folder / f"earlier-{number}"):
            number += 1
        aside.mkdir()
        for path in found:
            os.replace(path, aside / path.name)
        some = ", ".join([path.name for path in found[:4]] + ["..."] * (len(found) > 4))
        logger.warning(
            f"{folder} held an earlier run. Its {len(found)} files and folders ({some}) are now in {aside}; this run "
            "starts afresh."
        )

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        """
        Around what a run writes on its way: with `save_failure="warn"` it goes on without what the disk refuses, and
        says so once until that works again.
        """
        try:
            yield
        except OSError as error:
            if self.save_failure != "warn":
                raise OSError(error.errno, f"{what} could not be written: {error.strerror or error}") from error
            if what not in self._refused:
                logger.warning('%s could not be written; the run goes on (save_failure="warn"). %s', what, error)
            self._refused.add(what)
        else:
            self._refused.discard(what)
