"""When a run writes a checkpoint, and from which one it begins."""

import logging
import os
import signal
from collections import defaultdict

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from . import checkpoint as disk
from .settings import report_changes, run_config, write_run_files
from .stopping import TrainingStopped


logger = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """
    The checkpoints of a run: where it begins, when one is written, which is the best, and what stays after an error.
    Everything in them is safetensors or JSON. `resumed_from` is the checkpoint that this `train()` continues.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.resumed_from: str | None = None
        self._best_before: tuple[float | None, int | None] = (None, None)

    @property
    def wanted(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.trainer.args.should_save and self.trainer.args.save_strategy != SaveStrategy.NO

    @property
    def folder(self) -> str:
        """That of the current step."""
        return self._folder_of(self.trainer.state.global_step)

    def _folder_of(self, step: int) -> str:
        return os.path.join(self.trainer.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")

    # ---- beginning ----

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        The checkpoint to continue from. Later ones, which are of another run than this, step aside; so does everything
        of an earlier run where this one starts afresh.

        Raises:
            `ValueError`, `CheckpointCorrupt`: for one that is missing, damaged, or of another base model.
        """
        args, step = self.trainer.args, 0
        if args.should_save:
            disk.remove_torn_saves(args.output_dir)
        self.resumed_from = None
        if resume_from_checkpoint:
            self.resumed_from = disk.find_checkpoint(resume_from_checkpoint, args.output_dir, self.trainer.method_name)
            step = disk.check_trainer_state(self.resumed_from)
            report_changes(self.resumed_from, run_config(self.trainer))
        if args.should_save and self.resumed_from is None:
            self.trainer.folder.set_earlier_aside()
        elif self.wanted:
            disk.set_aside_later(args.output_dir, step)
        return self.resumed_from

    def on_train_begin(self, args, state, control, **kwargs):
        """Goes on with what was collected since the last log, once the training loop has reset its sums."""
        self.trainer.resume_logs(disk.load_logs(self.resumed_from) if self.resumed_from else None)

    def load_adapter(self, folder: str) -> None:
        """Takes the adapter of a checkpoint."""
        self.trainer.adapter.load_state_dict(disk.load_adapter_state(folder))

    def load_best(self) -> None:
        """Takes the best adapter; by its name alone: the state that names it may have been moved, or made up."""
        state = self.trainer.state
        best = os.path.join(self.trainer.args.output_dir, os.path.basename(state.best_model_checkpoint))
        logger.info("Loading the best adapter, %s (%.4g).", best, state.best_metric)
        disk.verify_checkpoint(best)
        self.load_adapter(best)

    def load_optimizer(self, folder: str | None) -> None:
        """Takes optimizer and schedule of a checkpoint."""
        if folder is not None:
            disk.load_optimizer_state(folder, self.trainer.optimizer, self.trainer.lr_scheduler)

    # ---- writing ----

    def save(self) -> bool:
        """
        Writes the checkpoint of this step, in all processes together, and removes the oldest. Whether it stands; if
        not, that is an error unless `save_failure="warn"`.
        """
        state, best_so_far = self.trainer.state, self.trainer.state.best_model_checkpoint
        if state.best_global_step:
            best = self._folder_of(state.best_global_step)
            if best == self.folder or os.path.isdir(best):
                state.best_model_checkpoint = best
        saved = self._save_together()
        if not saved and state.best_global_step == state.global_step:  # the best adapter is one that can be loaded
            state.best_metric, state.best_global_step = self._best_before
            state.best_model_checkpoint = best_so_far
        return saved

    def remember_best(self) -> None:
        """Called before the Trainer decides whether this step is the best."""
        self._best_before = self.trainer.state.best_metric, self.trainer.state.best_global_step

    def _save_together(self) -> bool:
        trainer, args = self.trainer, self.trainer.args
        saved = not args.should_save
        with trainer.peers.together(f"saving {self.folder}"):
            if args.should_save:
                with trainer.folder.may_fail(f"The checkpoint of step {trainer.state.global_step}"):
                    self.write()
                    saved = True
                disk.remove_oldest(args.output_dir, args.save_total_limit, trainer.state.best_model_checkpoint)
        return bool(trainer.peers.gather(torch.tensor([saved], dtype=torch.uint8)).all())

    def write(self) -> None:
        """Writes the checkpoint of this step, whole or not at all."""
        trainer = self.trainer
        if trainer.journal is not None:
            trainer.journal.journal.sync()  # a checkpoint never stands without the lines that led to it
        with disk.writing_checkpoint(self.folder) as directory:
            write_run_files(trainer, directory)
            logs = {"loss": float(trainer._tr_loss), "logged_at": trainer._globalstep_last_logged}
            logs |= {"sums": trainer.metrics.sums}
            theta = trainer.adapter.state_dict()
            disk.save_training_state(directory, theta, trainer.optimizer, trainer.lr_scheduler, logs)
            self._update_callback_states()
            trainer.state.save_to_json(str(directory / disk.STATE_JSON))

    def _update_callback_states(self) -> None:
        states = defaultdict(list)
        for callback in [*self.trainer.callback_handler.callbacks, self.trainer.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__].append(callback.state())
        found = {name: all_ if len(all_) > 1 else all_[0] for name, all_ in states.items()}
        self.trainer.state.stateful_callbacks |= found

    # ---- ending early ----

    def after_stop(self) -> TrainingStopped:
        """Saves, and makes the exception that ends the program with the exit code of the signal."""
        trainer = self.trainer
        if trainer.stopping.theta_is_whole and not _is_whole(self.folder):
            self._save_together()
        signum = trainer.stopping.signals.received or signal.SIGTERM
        output_dir, method = trainer.args.output_dir, trainer.method_name
        newest = self.folder if _is_whole(self.folder) else disk.last_checkpoint(output_dir, method)
        what_now = f"Continue from {newest} with resume_from_checkpoint=latest, or see how far it came: es-trl eval "
        what_now += f"--adapter {newest} --prompts FILE --rewards {','.join(trainer.eval_rewards.names)}"
        stopped = f"Stopped by {signal.Signals(signum).name} at step {trainer.state.global_step}."
        logger.warning("%s %s", stopped, what_now if newest else "There is no checkpoint.")
        return TrainingStopped(128 + signum)

    def after_error(self) -> None:
        """Saves the last finished step, where checkpoints are wanted and there is none of it yet."""
        wanted = self.wanted and self.trainer.state.global_step > 0
        if not (wanted and self.trainer.stopping.theta_is_whole) or _is_whole(self.folder):
            return
        try:
            self.write()
            logger.warning("The run failed; its last finished step is saved in %s.", self.folder)
        except Exception as error:  # the error that ended the run is the one to show
            logger.warning("The run failed, and its last finished step could not be saved: %s", error)


def _is_whole(folder: str) -> bool:
    try:
        disk.verify_checkpoint(folder)
    except disk.CheckpointCorrupt:
        return False
    return True
