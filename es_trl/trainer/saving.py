"""Saving and resuming, as overrides of the Trainer's: LoRA files in diffusers' format, checkpoints without pickle."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import torch
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..hub.environment import environment
from .checkpoint import (
    CONFIG_FILE,
    find_checkpoint,
    load_adapter_state,
    load_optimizer_state,
    remove_torn_saves,
    save_training_state,
    write_json,
    writing_checkpoint,
)


logger = logging.getLogger(__name__)

# Settings that may differ on resume without a word: where and how often things are written, not what is computed.
FREE_ON_RESUME = {
    "output_dir", "run_name", "report_to", "logging_dir", "resume_from_checkpoint", "disable_tqdm", "max_steps",
    "logging_steps", "save_steps", "eval_steps", "sample_steps", "save_total_limit", "local_rank", "log_level",
    "num_train_epochs", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
}  # fmt: skip


class SavingMixin:
    """The saving half of [`DiffusionTrainer`]; everything it writes is safetensors, JSON, Markdown or JPEG."""

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint=None, **kwargs):
        """
        As in the Trainer. `resume_from_checkpoint` may be True or `"latest"` (the newest whole checkpoint of
        `output_dir`) or a folder; a missing or damaged one is an error, never a silent fresh start.
        """
        if self.args.should_save:
            remove_torn_saves(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            self._report_changes(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.state.best_global_step:
            best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = os.path.join(self._get_output_dir(trial=trial), best)
            if best == folder or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            with writing_checkpoint(folder) as directory:
                self._write_run_files(directory)
                save_training_state(directory, self.adapter.state_dict(), self.optimizer, self.lr_scheduler)
                self._update_callback_states()
                self.state.save_to_json(str(directory / "trainer_state.json"))
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial=trial),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        if self.args.world_size > 1:
            torch.distributed.barrier()
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)

    def _update_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, state = type(callback).__name__, callback.state()
            if isinstance(self.state.stateful_callbacks[name], list):
                self.state.stateful_callbacks[name].append(state)
            else:
                self.state.stateful_callbacks[name] = state

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
        best = self.state.best_model_checkpoint
        logger.info("Loading the best adapter, %s (%s).", best, self.state.best_metric)
        self.adapter.load_state_dict(load_adapter_state(best))

    def _report_changes(self, checkpoint: str) -> None:
        """One warning that lists every setting that is not what it was; what cannot differ fails when it is loaded."""
        saved = json.loads(Path(checkpoint, CONFIG_FILE).read_text())
        if saved["base_model"] != self.base_model:
            raise ValueError(
                f"{checkpoint} was trained on {saved['base_model']!r}, this run loads {self.base_model!r}: an adapter "
                "continues only on its own base model."
            )
        now = self.run_config()
        keys = sorted(set(saved["config"]) & set(now["config"]) - FREE_ON_RESUME)
        changed = [k for k in keys if saved["config"][k] != json.loads(json.dumps(now["config"][k], default=str))]
        if changed:
            lines = ", ".join(f"{key}: {saved['config'][key]!r} -> {now['config'][key]!r}" for key in changed)
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
            **self.adapter.space.report(),
            "config": config,
        }

    def _write_run_files(self, directory: str | os.PathLike) -> None:
        self.adapter.save_lora(directory)
        write_json(Path(directory, CONFIG_FILE), self.run_config())
        write_json(Path(directory, "env.json"), environment())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter (`pytorch_lora_weights.safetensors`), what ran, and the model card."""
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            self._write_run_files(output_dir)
            self.create_model_card(output_dir=output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
