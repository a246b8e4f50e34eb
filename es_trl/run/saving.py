"""Saving and resuming, as overrides of the Trainer's: LoRA files in diffusers' format, checkpoints without pickle."""

import dataclasses
import json
import logging
import os
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from .checkpoint import (
    CONFIG_FILE,
    STATE_JSON,
    CheckpointCorrupt,
    check_trainer_state,
    find_checkpoint,
    last_checkpoint,
    load_adapter_state,
    load_logs,
    load_optimizer_state,
    read_json,
    remove_torn_saves,
    save_training_state,
    set_aside_later,
    verify_checkpoint,
    write_json,
    writing_checkpoint,
)
from .stopping import StopRequested, TrainingStopped


logger = logging.getLogger(__name__)

# Settings that may differ on resume without a word: where and how often things are written, not what is computed.
FREE_ON_RESUME = {
    "output_dir", "run_name", "report_to", "logging_dir", "resume_from_checkpoint", "disable_tqdm",
    "logging_steps", "save_steps", "eval_steps", "sample_steps", "save_total_limit", "local_rank", "log_level",
    "save_failure", "reward_timeout", "push_to_hub", "hub_model_id",
    "hub_strategy", "hub_private_repo", "hub_revision",
}  # fmt: skip
SET_THE_SCHEDULE = {"max_steps", "num_train_epochs"}  # which decays towards the last step
BESIDE_CONFIG = ("reward_funcs", "reward_weights", "train_prompts")  # of what ran, though no fields of the config


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


class SavingMixin:
    """The saving half of [`DiffusionTrainer`]; everything it writes is safetensors, JSON, Markdown or JPEG."""

    resumed_from: str | None = None
    _best_before: tuple[float | None, int | None] = (None, None)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """
        As in the Trainer. `resume_from_checkpoint` may be True or `"latest"` (the newest whole checkpoint of
        `output_dir`) or a folder; a missing or damaged one is an error, never a silent fresh start.
        """
        if self.args.should_save:
            remove_torn_saves(self.args.output_dir)
        self.resumed_from, step = None, 0
        if resume_from_checkpoint:
            self.resumed_from = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            step = check_trainer_state(self.resumed_from)
            self._report_changes(self.resumed_from)
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            set_aside_later(self.args.output_dir, step)
        self.theta_is_whole = False  # until the loop has loaded what it continues from
        with self.stop_signals:
            try:
                output = super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
                self.check_stop()
            except StopRequested as stop:
                raise self._stop() from stop
            except Exception as error:
                self.peers.tell(error, f"step {self.state.global_step}")
                self._save_what_is_whole()
                raise
        return output

    # ---- stopping ----

    def check_stop(self) -> None:
        """Raises [`StopRequested`] in every process if one of them got SIGTERM or Ctrl-C. All have to call it."""
        self.peers.stop_if_any(self.stop_signals.received is not None, f"step {self.state.global_step}")

    def check_own_stop(self) -> None:
        """
        As `check_stop`, for this process alone, inside work that `peers.together` ends for all. A method that has made
        some of a step's several updates (`theta_is_whole` is False) finishes the step first.
        """
        if self.stop_signals.received is not None and self.theta_is_whole:
            raise StopRequested

    def _stop(self) -> TrainingStopped:
        """Saves, and makes the exception that ends the program with the exit code of the signal."""
        folder = self._checkpoint_folder()
        if self.theta_is_whole and not _is_whole(folder):
            self._save_together(folder)
        self.is_in_train = False
        signum = self.stop_signals.received or signal.SIGTERM
        newest = folder if _is_whole(folder) else last_checkpoint(self.args.output_dir)
        what_now = f"Continue from {newest} with resume_from_checkpoint=latest, or see how far it came: es-trl eval "
        what_now += f"--adapter {newest} --prompts FILE --rewards {','.join(self.eval_rewards.names)}"
        logger.warning(
            "Stopped by %s at step %d. %s",
            signal.Signals(signum).name,
            self.state.global_step,
            what_now if newest else "There is no checkpoint.",
        )
        return TrainingStopped(128 + signum)

    def _save_what_is_whole(self) -> None:
        """After an error: the last finished step, where checkpoints are wanted and there is none of it yet."""
        folder = self._checkpoint_folder()
        wanted = self.args.should_save and self.args.save_strategy != SaveStrategy.NO and self.state.global_step > 0
        if not (wanted and self.theta_is_whole) or _is_whole(folder):
            return
        try:
            self._write_checkpoint(folder)
            logger.warning("The run failed; its last finished step is saved in %s.", folder)
        except Exception as error:  # the error that ended the run is the one to show
            logger.warning("The run failed, and its last finished step could not be saved: %s", error)

    def _checkpoint_folder(self, trial=None) -> str:
        return os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    # ---- checkpoints, as the Trainer calls for them ----

    def _save_checkpoint(self, model, trial) -> None:
        folder, best_so_far = self._checkpoint_folder(trial), self.state.best_model_checkpoint
        if self.state.best_global_step:
            best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = os.path.join(self._get_output_dir(trial=trial), best)
            if best == folder or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self._save_together(folder):
            if self.args.push_to_hub:
                self._push_from_checkpoint(folder)
        elif self.state.best_global_step == self.state.global_step:  # the best adapter is one that can be loaded
            self.state.best_metric, self.state.best_global_step = self._best_before
            self.state.best_model_checkpoint = best_so_far

    def _determine_best_metric(self, metrics, trial) -> bool:
        self._best_before = self.state.best_metric, self.state.best_global_step
        return super()._determine_best_metric(metrics, trial)

    def _save_together(self, folder: str) -> bool:
        """Whether the checkpoint stands; if not, that is an error unless `save_failure="warn"`."""
        saved = not self.args.should_save
        with self.peers.together(f"saving {folder}"):
            if self.args.should_save:
                with self.may_fail(f"The checkpoint of step {self.state.global_step}"):
                    self._write_checkpoint(folder)
                    saved = True
                rotate_checkpoints(
                    output_dir=os.path.dirname(folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=False,
                )
        return bool(self.peers.gather(torch.tensor([saved], dtype=torch.uint8)).all())

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        """
        Around what a run writes on its way: with `save_failure="warn"` it goes on without what the disk refuses, and
        says so once until that works again.
        """
        try:
            yield
        except OSError as error:
            if self.args.save_failure != "warn":
                raise OSError(error.errno, f"{what} could not be written: {error.strerror or error}") from error
            if what not in self._refused:
                logger.warning('%s could not be written; the run goes on (save_failure="warn"). %s', what, error)
            self._refused.add(what)
        else:
            self._refused.discard(what)

    def _write_checkpoint(self, folder: str) -> None:
        if self.journal is not None:
            self.journal.journal.sync()  # a checkpoint never stands without the lines that led to it
        with writing_checkpoint(folder) as directory:
            self._write_run_files(directory)
            save_training_state(
                directory, self.adapter.state_dict(), self.optimizer, self.lr_scheduler, self._pending_logs()
            )
            self._update_callback_states()
            self.state.save_to_json(str(directory / STATE_JSON))

    def _pending_logs(self) -> dict:
        """What was collected since the last log, so that a resumed run logs what the uninterrupted one does."""
        return {
            "loss": float(self._tr_loss),
            "logged_at": self._globalstep_last_logged,
            "sums": self._metrics,
        }

    def restore_pending_logs(self) -> None:
        """Called once the training loop has reset its sums."""
        pending = load_logs(self.resumed_from) if self.resumed_from else None
        if pending is not None:
            self._tr_loss.fill_(pending["loss"])
            self._globalstep_last_logged = pending["logged_at"]
            self._metrics = pending["sums"]

    def _update_callback_states(self) -> None:
        states = defaultdict(list)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__].append(callback.state())
        self.state.stateful_callbacks |= {name: all_ if len(all_) > 1 else all_[0] for name, all_ in states.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.adapter.load_state_dict(load_adapter_state(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer_state(checkpoint, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every random number is a function of the seed, the step and its purpose."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no gradient scaler, and a `scaler.pt` that someone put there is not opened."""

    def _load_best_model(self) -> None:
        # By its name alone: the state that names it may have been moved, or written by someone else.
        best = os.path.join(self._get_output_dir(trial=None), os.path.basename(self.state.best_model_checkpoint))
        logger.info("Loading the best adapter, %s (%.4g).", best, self.state.best_metric)
        verify_checkpoint(best)
        self.adapter.load_state_dict(load_adapter_state(best))

    def _report_changes(self, checkpoint: str) -> None:
        """One warning that lists every setting that is not what it was; what cannot differ fails when it is loaded."""
        saved, now = read_json(checkpoint, CONFIG_FILE), self.run_config()
        if not isinstance(saved.get("config"), dict) or "base_model" not in saved:
            raise CheckpointCorrupt(f"{Path(checkpoint, CONFIG_FILE)} is not the settings of a run.")
        if saved["base_model"] != self.base_model:
            raise ValueError(
                f"{checkpoint} was trained on {saved['base_model']!r}, this run loads {self.base_model!r}: an adapter "
                "continues only on its own base model."
            )
        before, after = ((c.get("model_init_kwargs") or {}).get("revision") for c in (saved["config"], now["config"]))
        if before != after:
            raise ValueError(
                f"{checkpoint} was trained on revision {before!r} of {self.base_model!r}, this run loads {after!r}: "
                "an adapter continues only on its own base model."
            )
        if saved.get("num_processes", self.args.world_size) != self.args.world_size:
            logger.info(
                "Resuming on %d processes what %s began: same numbers.", self.args.world_size, saved["num_processes"]
            )
        before, after = ({**run["config"], **{k: run.get(k) for k in BESIDE_CONFIG}} for run in (saved, now))
        free = FREE_ON_RESUME | (SET_THE_SCHEDULE if "constant" in str(after["lr_scheduler_type"]) else set())
        keys = sorted(set(before) & set(after) - free)
        changed = [key for key in keys if before[key] != json.loads(json.dumps(after[key], default=str))]
        if changed:
            lines = ", ".join(f"{key}: {before[key]!r} -> {after[key]!r}" for key in changed)
            logger.warning("Resuming with other settings than the checkpoint's (%s).", lines)

    # ---- the run folder ----

    def run_config(self) -> dict:
        """What ran: method, base model, rewards, and every setting of the config."""
        fields = {field.name for field in dataclasses.fields(self.args)}
        config = {name: value for name, value in self.args.to_dict().items() if name in fields and name != "hub_token"}
        return {
            "method": self.method_name,
            "base_model": self.base_model,
            "reward_funcs": self.rewards.names,
            "reward_weights": self.rewards.weights.tolist(),
            "eval_reward_funcs": self.eval_rewards.names[len(self.rewards) :],
            "train_prompts": len(self.train_dataset),
            "num_processes": self.args.world_size,
            **self.adapter.space.report(),
            "config": config,
        }

    def _write_run_files(self, directory: str | os.PathLike) -> None:
        self.adapter.save_lora(directory)
        write_json(Path(directory, CONFIG_FILE), self.run_config())
        write_json(Path(directory, "env.json"), self.environment)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter (`pytorch_lora_weights.safetensors`), what ran, and the model card."""
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            self._write_run_files(output_dir)
            self.create_model_card(output_dir=output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _is_whole(folder: str) -> bool:
    try:
        verify_checkpoint(folder)
    except CheckpointCorrupt:
        return False
    return True
