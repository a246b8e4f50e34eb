"""The callback that writes a run's journal; the only tie between a trainer and the replay of its run."""

from typing import Any

from transformers import TrainerCallback

from ..pipelines import tensor_digest
from .journal import JOURNAL, Journal


class JournalCallback(TrainerCallback):
    """
    Writes a line per prompt batch before its update is made, and has all lines on the disk before a checkpoint stands.

    Args:
        trainer ([`ESTrainer`]): Whose `last_step` it writes down.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.journal = Journal(trainer.args.output_dir, trainer.is_world_process_zero(), trainer.may_fail)
        self.own_optimizer = trainer.optimizer is not None

    def on_train_begin(self, args, state, control, **kwargs):
        self.journal.start(state.global_step, self.record())

    def on_substep_end(self, args, state, control, **kwargs):
        self.write()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.write()

    def on_train_end(self, args, state, control, **kwargs):
        with self.trainer.may_fail(f"The last lines of {JOURNAL}"):
            self.journal.sync()

    def write(self) -> None:
        """The line of the last prompt batch; theta is still what its population was drawn around."""
        done = self.trainer.last_step
        theta = tensor_digest(self.trainer.adapter.theta)
        self.journal.write(done.step, done.micro, done.batch.prompts, theta, done.scores)

    def record(self) -> dict[str, Any]:
        """What the journal opens with: all that a replay needs beside the scores."""
        adapter = self.trainer.adapter
        lora = adapter.lora_config.to_dict()
        return self.trainer.run_config() | {
            "lora": {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()},
            "adapter": tensor_digest(adapter.state_dict()),
            "own_optimizer": self.own_optimizer,
        }
