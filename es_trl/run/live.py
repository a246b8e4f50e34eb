"""What a run leaves on disk while it trains, so that its page can be looked at and it can be stopped from there."""

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..files import writing
from ..lock import lives, this_process
from .settings import run_config


RUNNING = "running.json"  # there while the run trains


class LiveCallback(TrainerCallback):
    """Writes the log (`trainer_state.json`) at every log, and `running.json` from the first step to the last."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            entry = {**this_process(), "started": time.time(), "first_step": state.global_step,
                     "max_steps": state.max_steps, "run": run_config(self.trainer)}  # fmt: skip
            self._write(RUNNING, lambda path: Path(path).write_text(json.dumps(entry), encoding="utf-8"))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and Path(args.output_dir, RUNNING).exists():
            self._write(TRAINER_STATE_NAME, state.save_to_json)

    def _write(self, name: str, write) -> None:
        """Whole or not at all."""
        with self.trainer.folder.may_fail(f"The file {name}"):
            with writing(Path(self.trainer.args.output_dir, name)) as temporary:
                write(str(temporary))


def ended(folder: str | os.PathLike) -> None:
    """Takes `running.json` away; to be called however the run has ended."""
    Path(folder, RUNNING).unlink(missing_ok=True)


def running(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What `running.json` says of a run that trains at this moment on this machine; `None` where none does."""
    try:
        entry = json.loads(Path(folder, RUNNING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and lives(entry) else None
