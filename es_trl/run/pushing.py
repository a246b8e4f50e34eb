"""Pushing to the Hub: only the run's own files, and never at the price of the run."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub.background import Background
from ..hub.publishing import collect, open_repository, reason_of, retry_command
from .checkpoint import MANIFEST


logger = logging.getLogger(__name__)

OPEN_SECONDS = 60  # for creating or finding the repository
PUSH_SECONDS = 3600  # for an upload, where training would wait for it


class PushingMixin:
    """
    The Hub half of [`DiffusionTrainer`].

    `hub_strategy` is that of transformers: `"end"` pushes when training has ended, `"every_save"` also after each
    checkpoint, in the background; `"checkpoint"` adds the checkpoint itself as `last-checkpoint/`, and
    `"all_checkpoints"` each one under its own name. Every push is one commit.

    Attributes:
        push_failed (`bool`): Whether the last push that ended had failed.
    """

    push_in_progress: PushInProgress | None = None
    push_failed = False
    _background: Background | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the Trainer; a Hub that cannot be reached is a warning, and the next push tries again."""
        if not self.is_world_process_zero():
            return
        try:
            self._wait(self._submit(lambda: self._open_repository(token, private)), OPEN_SECONDS)
        except Exception as error:  # network, rights, a bad name: none of them may cost the training
            logger.warning(
                "The Hub repository %s cannot be opened now (%s). Training goes on; each push tries again.",
                self._repo_name(),
                reason_of(error),
            )

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
        Uploads the adapter, its card, samples and settings in one commit. A failed upload is logged with the command
        that repeats it; the files are safe in `output_dir`.

        Args: as in [`~transformers.Trainer.push_to_hub`].

        Returns:
            `CommitInfo` (or a future with `blocking=False`), or None if the upload failed.
        """
        error = None
        if self.is_world_process_zero():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            try:
                self._wait(self._submit(lambda: self._open_repository(token, private, revision)), OPEN_SECONDS)
            except Exception as failure:
                error = failure
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{k: v for k, v in kwargs.items() if k in ("dataset_name", "tags", "license")})
        self._finish_current_push()
        if error is not None:
            self._report_failed_push(error, self.args.output_dir, revision, private, last=True)
            return None
        folder = tempfile.mkdtemp(prefix="es_trl-push-")
        collect(self.args.output_dir, folder)
        push = self._upload(folder, self.args.output_dir, commit_message, token, revision, private, last=True)
        if not blocking:
            return push
        try:
            return self._wait(push, PUSH_SECONDS)
        except TimeoutError as failure:
            self._report_failed_push(failure, self.args.output_dir, revision, private, last=True)
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The checkpoint's adapter and card become the repository's newest state, while training goes on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            logger.info("Step %d is not pushed: the push before is still under way.", self.state.global_step)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = tempfile.mkdtemp(prefix="es_trl-push-")
        try:
            collect(checkpoint_folder, folder)
            collect(self.args.output_dir, folder, only="samples/*", adapter=checkpoint_folder)
            self.create_model_card(output_dir=folder)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                copy_checkpoint(checkpoint_folder, folder, "last-checkpoint" if last else None)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._report_failed_push(error, checkpoint_folder)
            return
        message = f"Training in progress, step {self.state.global_step}"
        push = self._upload(folder, checkpoint_folder, message)
        if busy:
            self.push_in_progress.jobs.append(push)
        else:
            self.push_in_progress = PushInProgress([push])

    def _finish_current_push(self) -> None:
        """Waits for the pushes of checkpoints, which the end of the program would cut off."""
        for push in self.push_in_progress.jobs if self.push_in_progress is not None else ():
            try:
                self._wait(push, PUSH_SECONDS)
            except TimeoutError as error:
                logger.warning("A push of a checkpoint is given up: %s.", error)
                break
        self.push_in_progress = None

    # ---- the upload itself ----

    def _submit(self, work):
        self._background = self._background or Background()
        return self._background.submit(work)

    def _wait(self, future, seconds: float):
        return self._background.wait(future, seconds)

    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _open_repository(self, token: str | None = None, private: bool | None = None, revision: str | None = None):
        private = self.args.hub_private_repo if private is None else private
        revision = revision or self.args.hub_revision
        self.hub_model_id = open_repository(HfApi(token=token), self._repo_name(), private, revision)

    def _upload(self, folder, source, message, token=None, revision=None, private=None, last=False):
        """A future that is None when the upload of `folder`, a clean copy of `source`, has failed."""

        def upload():
            try:
                if self.hub_model_id is None:
                    self._open_repository(token, private, revision)
                commit = HfApi(token=token).upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=folder,
                    commit_message=message,
                    revision=revision or self.args.hub_revision,
                )
            except Exception as error:
                self._report_failed_push(error, source, revision, private, last)
                return None
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.push_failed = False
            logger.info("Pushed to %s", commit.commit_url)
            return commit

        return self._submit(upload)

    def _report_failed_push(self, error, folder, revision=None, private=None, last=False) -> None:
        self.push_failed = True
        private = self.args.hub_private_repo if private is None else private
        command = retry_command(self._repo_name(), folder, revision or self.args.hub_revision, private)
        logger.log(
            logging.ERROR if last else logging.WARNING,
            "Pushing to the Hub failed (%s). %s%s is safe; push it with: %s",
            reason_of(error),
            "" if last else "Training goes on. ",
            folder,
            command,
        )


def copy_checkpoint(checkpoint: str | os.PathLike, destination: str, name: str | None = None) -> None:
    """Copies the files that a checkpoint's manifest lists, unchanged, so that it is whole when it is downloaded."""
    checkpoint = Path(checkpoint)
    target = Path(destination, name or checkpoint.name)
    for file in [*json.loads((checkpoint / MANIFEST).read_text()), MANIFEST]:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / file, target / file)
