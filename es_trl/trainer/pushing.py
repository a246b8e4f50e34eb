"""Pushing to the Hub: only the run's own files, and never at the price of the run."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy


logger = logging.getLogger(__name__)

# What a repository holds; anything else in the run folder (logs, tracker files, checkpoints) stays at home.
PUSHED = (
    "README.md",
    "pytorch_lora_weights.safetensors",
    "es_config.json",
    "env.json",
    "eval.json",
    "samples/*.jpg",
    "samples/metadata.jsonl",
)


class PushingMixin:
    """The Hub half of [`DiffusionTrainer`]."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Uploads the adapter, its card, samples and settings. A failed upload is logged with the command that repeats
        it; the files are safe in `output_dir`.

        Args: as in [`~transformers.Trainer.push_to_hub`].

        Returns:
            `CommitInfo` (or a future with `blocking=False`), or None if the upload failed.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{k: v for k, v in kwargs.items() if k in ("dataset_name", "tags", "license")})
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            return self._upload(self.args.output_dir, commit_message, token, revision, run_as_future=not blocking)
        except Exception as error:  # network, rights, quota: none of them may cost the training
            self._explain_failed_push(error)
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`hub_strategy="every_save"`: the checkpoint's adapter and card, as the repository's newest state."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                for name in ("pytorch_lora_weights.safetensors", "es_config.json", "env.json"):
                    shutil.copy(os.path.join(checkpoint_folder, name), folder)
                if os.path.isdir(os.path.join(self.args.output_dir, "samples")):
                    shutil.copytree(os.path.join(self.args.output_dir, "samples"), Path(folder, "samples"))
                self.create_model_card(output_dir=folder)
                self._upload(folder, f"Training in progress, step {self.state.global_step}")
        except Exception as error:
            self._explain_failed_push(error)

    def _upload(self, folder: str, message: str, token=None, revision=None, run_as_future: bool = False):
        return HfApi(token=token).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            revision=revision or self.args.hub_revision,
            allow_patterns=list(PUSHED),
            run_as_future=run_as_future,
        )

    def _explain_failed_push(self, error: Exception) -> None:
        repo = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        included = " ".join(f"--include '{pattern}'" for pattern in PUSHED)
        logger.error(
            "Pushing to the Hub failed (%s: %s). The adapter is safe in %s; push it with: hf upload %s %s . %s",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no message",
            self.args.output_dir,
            repo,
            self.args.output_dir,
            included,
        )
