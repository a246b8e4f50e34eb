"""Pushing to the Hub: only the run's own files, and never at the price of the run."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from ..files import write_json
from ..hub.publishing import collect, copy_clean, limit_waiting, open_repository, reason_of, retry_command
from .checkpoint import MANIFEST, fingerprint


logger = logging.getLogger(__name__)

OPEN_SECONDS = 60  # for creating or finding the repository
PUSH_SECONDS = 3600  # for an upload, where training would wait for it
TO_PUSH = "to_push"  # below output_dir: the clean copy of what could not be pushed


class _Place(NamedTuple):
    """Where a push goes, and as whom."""

    token: str | None
    private: bool | None
    revision: str | None


class HubPusher:
    """
    What a run gives to the Hub.

    `hub_strategy` is that of transformers: `"end"` pushes when training has ended, `"every_save"` also after each
    checkpoint, in the background; `"checkpoint"` adds the checkpoint itself as `last-checkpoint/`, and
    `"all_checkpoints"` each one under its own name. Every push is one commit. `write_card` takes `output_dir` and the
    keywords of `create_model_card`; `repo_id` is there once the repository was opened; `failed` says how the last push
    ended.
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
            self._open(self._place(token, private))
        except Exception as error:  # network, rights, a bad name: none of them may cost the training
            why = f"{self.repo_name} cannot be opened now ({reason_of(error)})"
            logger.warning("The Hub repository %s. Training goes on; each push tries again.", why)

    def push(self, message: str, blocking: bool, token=None, revision=None, private=None, **card):
        """
        Uploads what `output_dir` has to publish, in one commit. A failed upload is logged with the command that
        repeats it; the files are safe.

        Returns:
            `CommitInfo` (or a future with `blocking=False`), or None if the upload failed.
        """
        folder, place = self.args.output_dir, self._place(token, private, revision)
        failure: Exception | None = None
        try:
            self._open(place)
        except Exception as error:
            failure = error
        self.write_card(output_dir=folder, **card)
        self.finish()
        clean = tempfile.mkdtemp(prefix="es_trl-push-")
        collect(folder, clean)
        if failure is None:
            push = self._upload(clean, folder, message, place, last=True)
            try:
                return self._wait(push, PUSH_SECONDS) if blocking else push
            except TimeoutError as error:
                failure = error
        self._report_failure(failure, clean, folder, place, last=True)
        return None

    def push_checkpoint(self, checkpoint: str, step: int) -> None:
        """The checkpoint's adapter and card become the repository's newest state, while training goes on."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        self._under_way = [push for push in self._under_way if not push.done()]
        if self._under_way and not self.args.hub_always_push:
            logger.info("Step %d is not pushed: the push before is still under way.", step)
            return
        folder = tempfile.mkdtemp(prefix="es_trl-push-")
        try:
            collect(checkpoint, folder)
            collect(self.args.output_dir, folder, only="samples/*", adapter=checkpoint)
            self.write_card(output_dir=folder)
            if self.args.hub_strategy == HubStrategy.CHECKPOINT:
                copy_checkpoint(Path(checkpoint), Path(folder, "last-checkpoint"))
            elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
                copy_checkpoint(Path(checkpoint), Path(folder, Path(checkpoint).name))
        except OSError as error:
            self._report_failure(error, folder, checkpoint, self._place())
            return
        self._under_way.append(self._upload(folder, checkpoint, f"Training in progress, step {step}", self._place()))

    def finish(self) -> None:
        """Waits for the pushes of checkpoints, which the end of the program would cut off."""
        try:
            for push in self._under_way:
                self._wait(push, PUSH_SECONDS)
        except TimeoutError as error:
            logger.warning("A push of a checkpoint is given up: %s.", error)
        self._under_way = []

    def _place(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> _Place:
        private = self.args.hub_private_repo if private is None else private
        return _Place(token, private, revision or self.args.hub_revision)

    def _find(self, place: _Place) -> str:
        return open_repository(HfApi(token=place.token), self.repo_name, place.private, place.revision)

    def _open(self, place: _Place) -> None:
        limit_waiting()
        self.repo_id = self._wait(self._api.run_as_future(self._find, place), OPEN_SECONDS)

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

    def _upload(self, clean: str, source: str, message: str, place: _Place, last: bool = False) -> Future:
        """A future that is None when the upload of `clean`, a copy of `source`, has failed."""

        def upload():
            try:
                if self.repo_id is None:
                    self.repo_id = self._find(place)
                commit = HfApi(token=place.token).upload_folder(
                    repo_id=self.repo_id, folder_path=clean, commit_message=message, revision=place.revision
                )
            except Exception as error:
                self._report_failure(error, clean, source, place, last)
                return None
            for done in (clean, os.path.join(self.args.output_dir, TO_PUSH)):
                shutil.rmtree(done, ignore_errors=True)
            self.failed = False
            logger.info("Pushed to %s", commit.commit_url)
            return commit

        return self._api.run_as_future(upload)

    def _report_failure(self, error, clean: str, source: str, place: _Place, last: bool = False) -> None:
        """Keeps the clean copy, which alone may leave this machine, and says how it is pushed later."""
        self.failed = True
        kept = os.path.join(self.args.output_dir, TO_PUSH)
        try:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(clean, kept)
            how = f"push it with: {retry_command(self.repo_name, kept, place.revision, place.private)}"
        except OSError as failure:
            how = f"its copy for the Hub could not be kept ({failure}): call push_to_hub again."
        safe = f"{'' if last else 'Training goes on. '}{source} is safe; {how}"
        logger.log(logging.ERROR if last else logging.WARNING, "Pushing to the Hub failed (%s). %s",
                   reason_of(error), safe)  # fmt: skip


def copy_checkpoint(checkpoint: Path, target: Path) -> None:
    """
    Copies the files that a checkpoint's manifest lists, so that it is whole when it is downloaded. Home folder and
    secrets are cut from its texts, whose entries in the manifest are then those of the copies.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    for file in manifest:
        if copy_clean(checkpoint / file, target / file):
            manifest[file] = fingerprint(target / file)
    write_json(target / MANIFEST, manifest)
