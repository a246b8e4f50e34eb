"""Pushing to the Hub: only the run's own files, and never at the price of the run."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from ..files import write_json
from ..hub.publishing import collect, copy_clean, limit_waiting, open_repository, reason_of, retry_command
from .checkpoint import MANIFEST, fingerprint


logger = logging.getLogger(__name__)

OPEN_SECONDS = 60  # for creating or finding the repository
PUSH_SECONDS = 3600  # for an upload, where training would wait for it
TO_PUSH = "to_push"  # below output_dir: the clean copy of what could not be pushed


class HubPusher:
    """
    What a run gives to the Hub.

    `hub_strategy` is that of transformers: `"end"` pushes when training has ended, `"every_save"` also after each
    checkpoint, in the background; `"checkpoint"` adds the checkpoint itself as `last-checkpoint/`, and
    `"all_checkpoints"` each one under its own name. Every push is one commit.

    Args:
        args ([`DiffusionConfig`]): The `hub_...` settings and `output_dir`.
        write_card (`Callable`): Writes the model card; takes `output_dir` and the keywords of `create_model_card`.

    Attributes:
        repo_id (`str` or `None`): The repository, once it was opened.
        failed (`bool`): Whether the last push that ended had failed.
    """

    def __init__(self, args, write_card: Callable[..., None]):
        self.args, self.write_card = args, write_card
        self.repo_id: str | None = None
        self.failed = False
        self._api = HfApi()  # its one thread runs one thing after the other
        self._under_way: list[Future] = []

    @property
    def repo_name(self) -> str:
        """The repository that is pushed to."""
        return self.repo_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def open(self, token: str | None = None, private: bool | None = None) -> None:
        """Opens the repository; a Hub that cannot be reached is a warning, and the next push tries again."""
        try:
            self._open(token, private)
        except Exception as error:  # network, rights, a bad name: none of them may cost the training
            logger.warning(
                "The Hub repository %s cannot be opened now (%s). Training goes on; each push tries again.",
                self.repo_name,
                reason_of(error),
            )

    def push(self, message: str, blocking: bool, token=None, revision=None, private=None, **card):
        """
        Uploads what `output_dir` has to publish, in one commit. A failed upload is logged with the command that
        repeats it; the files are safe.

        Returns:
            `CommitInfo` (or a future with `blocking=False`), or None if the upload failed.
        """
        folder, away = self.args.output_dir, None
        try:
            self._open(token, private, revision)
        except Exception as error:
            away = error
        self.write_card(output_dir=folder, **card)
        self.finish()
        clean = tempfile.mkdtemp(prefix="es_trl-push-")
        collect(folder, clean)
        if away is not None:
            self._report_failure(away, clean, folder, revision, private, last=True)
            return None
        push = self._upload(clean, folder, message, token, revision, private, last=True)
        if not blocking:
            return push
        try:
            return self._wait(push, PUSH_SECONDS)
        except TimeoutError as error:
            self._report_failure(error, clean, folder, revision, private, last=True)
            return None

    def push_checkpoint(self, checkpoint: str, step: int) -> None:
        """The checkpoint's adapter and card become the repository's newest state, while training goes on."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        self._under_way = [push for push in self._under_way if not push.done()]
        busy = bool(self._under_way)
        if busy and not self.args.hub_always_push:
            logger.info("Step %d is not pushed: the push before is still under way.", step)
            return
        folder = tempfile.mkdtemp(prefix="es_trl-push-")
        try:
            collect(checkpoint, folder)
            collect(self.args.output_dir, folder, only="samples/*", adapter=checkpoint)
            self.write_card(output_dir=folder)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                copy_checkpoint(checkpoint, folder, "last-checkpoint" if last else None)
        except OSError as error:
            self._report_failure(error, folder, checkpoint)
            return
        self._under_way.append(self._upload(folder, checkpoint, f"Training in progress, step {step}"))

    def finish(self) -> None:
        """Waits for the pushes of checkpoints, which the end of the program would cut off."""
        try:
            for push in self._under_way:
                self._wait(push, PUSH_SECONDS)
        except TimeoutError as error:
            logger.warning("A push of a checkpoint is given up: %s.", error)
        self._under_way = []

    def _open(self, token=None, private=None, revision=None) -> None:
        def find():
            return open_repository(
                HfApi(token=token),
                self.repo_name,
                self.args.hub_private_repo if private is None else private,
                revision or self.args.hub_revision,
            )

        limit_waiting()
        self.repo_id = self._wait(self._api.run_as_future(find), OPEN_SECONDS)

    def _wait(self, future: Future, seconds: float):
        """
        The result of `future`; a `TimeoutError` if it is not there in time: it is given up, and later work does not
        wait for it.
        """
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            if future.done():  # the work itself raised one
                raise
            self._api = HfApi()
            raise TimeoutError(f"the Hub did not answer for {seconds:g} seconds") from None

    def _upload(self, folder, source, message, token=None, revision=None, private=None, last=False) -> Future:
        """A future that is None when the upload of `folder`, a clean copy of `source`, has failed."""
        revision = revision or self.args.hub_revision

        def upload():
            try:
                if self.repo_id is None:
                    own = self.args.hub_private_repo if private is None else private
                    self.repo_id = open_repository(HfApi(token=token), self.repo_name, own, revision)
                commit = HfApi(token=token).upload_folder(
                    repo_id=self.repo_id, folder_path=folder, commit_message=message, revision=revision
                )
            except Exception as error:
                self._report_failure(error, folder, source, revision, private, last)
                return None
            for done in (folder, os.path.join(self.args.output_dir, TO_PUSH)):
                shutil.rmtree(done, ignore_errors=True)
            self.failed = False
            logger.info("Pushed to %s", commit.commit_url)
            return commit

        return self._api.run_as_future(upload)

    def _report_failure(self, error, clean, source, revision=None, private=None, last=False) -> None:
        """Keeps the clean copy, which alone may leave this machine, and says how it is pushed later."""
        self.failed = True
        private = self.args.hub_private_repo if private is None else private
        kept = os.path.join(self.args.output_dir, TO_PUSH)
        try:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(clean, kept)
            command = retry_command(self.repo_name, kept, revision or self.args.hub_revision, private)
            how = f"push it with: {command}"
        except OSError as failure:
            how = f"its copy for the Hub could not be kept ({failure}): call push_to_hub again."
        logger.log(
            logging.ERROR if last else logging.WARNING,
            "Pushing to the Hub failed (%s). %s%s is safe; %s",
            reason_of(error),
            "" if last else "Training goes on. ",
            source,
            how,
        )


def copy_checkpoint(checkpoint: str | os.PathLike, destination: str, name: str | None = None) -> None:
    """
    Copies the files that a checkpoint's manifest lists, so that it is whole when it is downloaded. Home folder and
    secrets are cut from its texts, whose entries in the manifest are then those of the copies.
    """
    checkpoint = Path(checkpoint)
    target = Path(destination, name or checkpoint.name)
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    for file in manifest:
        if copy_clean(checkpoint / file, target / file):
            manifest[file] = fingerprint(target / file)
    write_json(target / MANIFEST, manifest)
