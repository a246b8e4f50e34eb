"""The callback that writes a run's journal; the only tie between a trainer and the replay of its run."""

from typing import Any

from transformers import TrainerCallback

from ..pipelines import tensor_digest
from .journal import JOURNAL, Journal
from .settings import run_config


class JournalCallback(TrainerCallback):
    """Writes a line per prompt batch, that of the [`ESTrainer`]'s `last_step`, before its update is made."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.journal = Journal(trainer.args.output_dir, trainer.is_world_process_zero(), trainer.folder.may_fail)
        self.theta = ""
        self.own_optimizer = trainer.optimizer is not None

    def on_train_begin(self, args, state, control, **kwargs):
        self.journal.start(state.global_step, self.record())

    def on_step_begin(self, args, state, control, **kwargs):
        # Before the step: a margin that turns takes theta back within it.
        self.theta = tensor_digest(self.trainer.adapter.theta)

    def on_substep_end(self, args, state, control, **kwargs):
        done = self.trainer.last_step  # `theta` is what its population was drawn around
        self.journal.write(done.step, done.micro, done.batch.prompts, self.theta, done.scores)

    on_pre_optimizer_step = on_substep_end  # the step's last prompt batch

    def on_train_end(self, args, state, control, **kwargs):
        with self.trainer.folder.may_fail(f"The last lines of {JOURNAL}"):
            self.journal.sync()

    def record(self) -> dict[str, Any]:
        """What the journal opens with: all that a replay needs beside the scores."""
        adapter = self.trainer.adapter
        lora = adapter.lora_config.to_dict()
        return run_config(self.trainer) | {
            "lora": {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()},
            "adapter": tensor_digest(adapter.state_dict()),
            "own_optimizer": self.own_optimizer,
        }
