"""Checkpoints that are complete or invisible: written beside, sealed with a manifest, renamed; never unpickled."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import TEMPORARY, left_by, open_to_all, sync, write_json


logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
STATE_FILE = "es_state.safetensors"
SCALARS_FILE = "optimizer.json"
CONFIG_FILE = "es_config.json"
STATE_JSON = "trainer_state.json"
READ_ON_RESUME = (STATE_FILE, SCALARS_FILE, CONFIG_FILE, STATE_JSON)


class CheckpointCorrupt(ValueError):
    """A checkpoint file is missing or is not what its manifest says."""


@contextmanager
def writing_checkpoint(directory: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a folder to write into; on leaving it is sealed with a manifest and renamed to `directory` in one step. If
    anything fails the folder is removed and what stood at `directory` before is untouched.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f"{TEMPORARY}{os.getpid()}-{directory.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        open_to_all(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(temporary)): fingerprint(path) for path in files}
        for path in files:
            sync(path)
        write_json(temporary / MANIFEST, manifest)
        sync(temporary / MANIFEST)
        sync(temporary)
        _replace_directory(temporary, directory)
        sync(directory.parent)
    except BaseException as error:
        written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        shutil.rmtree(temporary, ignore_errors=True)
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(directory.parent).free
            raise OSError(
                number,
                f"No space left for {directory}: {written:,} bytes were written before the disk was full, {free:,} "
                "are free now. Nothing of it was kept and older checkpoints are as they were; make room and resume",
            ) from error
        if number is not None and not isinstance(error, OSError):
            raise OSError(number, f"{directory} could not be written: {error}") from error
        raise


def verify_checkpoint(directory: str | os.PathLike) -> None:
    """Raises `CheckpointCorrupt` naming the file, and what was expected, if the checkpoint is not whole."""
    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        entries = [(str(name), str(entry["sha256"]), int(entry["size"])) for name, entry in manifest.items()]
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{directory} has no {MANIFEST}: it was not written to its end.") from error
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{directory / MANIFEST} is not a manifest: {error}.") from error
    for name in READ_ON_RESUME:
        if name not in manifest:
            raise CheckpointCorrupt(f"{directory / MANIFEST} does not list {name}.")
    for name, sha256, size in entries:
        path = directory / name
        try:
            plain = path.resolve() == directory.resolve() / name and not path.is_symlink()
            actual = fingerprint(path) if plain and path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            plain = False
        if not plain:
            raise CheckpointCorrupt(
                f"{directory / MANIFEST} names {name[:200]!r}, which is not a plain file of the folder."
            )
        if actual is None:
            raise CheckpointCorrupt(f"{path} is missing.")
        if actual != {"sha256": sha256, "size": size}:
            raise CheckpointCorrupt(
                f"{path} is damaged: {actual['size']} bytes, sha256 {actual['sha256'][:12]}...; expected {size} "
                f"bytes, sha256 {sha256[:12]}...."
            )


def last_checkpoint(output_dir: str | os.PathLike, method: str | None = None) -> str | None:
    """The newest whole checkpoint of a run, or None; damaged ones and another method's are named and passed over."""
    for _, folder in checkpoints_of(output_dir):
        try:
            verify_checkpoint(folder)
            theirs = read_json(folder, CONFIG_FILE).get("method")
        except CheckpointCorrupt as error:
            logger.warning("Passing over a checkpoint that is not whole: %s", error)
        else:
            if method in (None, theirs):
                return str(folder)
            logger.warning("Passing over %s, which was trained by %s and not by %s.", folder, theirs, method)
    return None


def checkpoints_of(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """Steps and folders, the newest first; `checkpoint-<step>` is one, `checkpoint-120 (1)` or a file is none."""
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)", folder.name)
        if name and folder.is_dir():
            found.append((int(name.group(1)), folder))
    return sorted(found, reverse=True)


def remove_oldest(output_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """Keeps the newest checkpoint, the best one, and of the others the newest, `limit` in all."""
    folders = [folder for _, folder in checkpoints_of(output_dir)]
    first = [folder for folder in folders[1:] if best is not None and folder.name == os.path.basename(best)]
    ordered = [*folders[:1], *first, *[folder for folder in folders[1:] if folder not in first]]
    for folder in ordered[limit:] if limit is not None else ():
        logger.info("Removing the older checkpoint %s (save_total_limit).", folder)
        shutil.rmtree(folder)


def remove_torn_saves(output_dir: str | os.PathLike) -> None:
    """Removes what a run that was killed while saving left behind."""
    for path in Path(output_dir).glob(f"{TEMPORARY}*"):
        pid = left_by(path)
        # In a container, the run before this one may have had this very number.
        if pid is not None and (pid == os.getpid() or not psutil.pid_exists(pid)):
            logger.warning("Removing %s, which a killed run did not finish writing.", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def set_aside_later(output_dir: str | os.PathLike, step: int) -> None:
    """
    Renames the checkpoints after `step` to `superseded-...`, and says so: a run that goes back to an earlier one is
    another run than theirs, and must not be resumed from them.
    """
    for later, folder in reversed(checkpoints_of(output_dir)):
        if later > step:
            aside = folder.with_name(f"superseded-{folder.name}")
            number = 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"superseded-{number}-{folder.name}")
            logger.warning("%s is later than step %d, where this run begins: it is now %s.", folder, step, aside.name)
            os.replace(folder, aside)


def find_checkpoint(resume_from_checkpoint: str | bool, output_dir: str, method: str | None = None) -> str:
    """
    The checkpoint folder that `resume_from_checkpoint` names; the newest one of `method`, if that is given.

    Raises:
        `ValueError`: if there is none.
        `CheckpointCorrupt`: if a folder was named and is not whole.
    """
    if resume_from_checkpoint is True or str(resume_from_checkpoint).lower() in ("latest", "true"):
        folder = last_checkpoint(output_dir, method)
        if folder is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}). Leave resume_from_checkpoint out to "
                "start afresh."
            )
        logger.info("Resuming from %s, the newest whole checkpoint.", folder)
        return folder
    if not os.path.isdir(resume_from_checkpoint):
        raise ValueError(
            f"Can't find a valid checkpoint at {resume_from_checkpoint}. Give a checkpoint-<step> folder, or True for "
            f"the newest one in {output_dir}."
        )
    verify_checkpoint(str(resume_from_checkpoint))
    return str(resume_from_checkpoint)


def save_training_state(
    directory: Path, tensors: dict[str, torch.Tensor], optimizer, lr_scheduler, logs: dict[str, Any] | None = None
) -> None:
    """Writes the adapter's tensors, the optimizer, the scheduler and unlogged sums as safetensors and JSON."""
    state = optimizer.state_dict()
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    scalars: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                arrays[f"optimizer.{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                scalars["state"].setdefault(str(index), {})[key] = value
    scalars["lr_scheduler"] = lr_scheduler.state_dict() if lr_scheduler is not None else None
    scalars["logs"] = logs
    save_file(arrays, directory / STATE_FILE)
    write_json(directory / SCALARS_FILE, scalars)


def load_adapter_state(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The adapter's tensors of a checkpoint; raises `CheckpointCorrupt` if any is not finite."""
    tensors = _load_tensors(os.path.join(directory, STATE_FILE))
    adapter = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    for name, tensor in adapter.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointCorrupt(f"{os.path.join(directory, STATE_FILE)}: {name} has entries that are not finite.")
    return adapter


def load_optimizer_state(directory: str | os.PathLike, optimizer, lr_scheduler) -> None:
    """Restores optimizer and scheduler exactly as they were saved."""
    tensors = _load_tensors(os.path.join(directory, STATE_FILE))
    scalars = read_json(directory, SCALARS_FILE)
    try:
        state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in scalars["state"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": scalars["param_groups"]})
        if lr_scheduler is not None and scalars["lr_scheduler"] is not None:
            lr_scheduler.load_state_dict(scalars["lr_scheduler"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointCorrupt(
            f"The optimizer of {directory} does not fit this one ({type(error).__name__}: {error}): optim must be "
            "that of the saved run."
        ) from error


def check_trainer_state(directory: str | os.PathLike) -> int:
    """
    The step of a checkpoint. Raises `CheckpointCorrupt` unless the Trainer can read its state, so that it never starts
    on half of one.
    """
    state, known = read_json(directory, STATE_JSON), {field.name for field in dataclasses.fields(TrainerState)}
    steps = [state.get(name) for name in ("global_step", "max_steps")]
    counts = all(type(step) is int and step >= 0 for step in steps)
    lists = isinstance(state.get("log_history"), list) and isinstance(state.get("stateful_callbacks"), dict)
    if not (state.keys() <= known and counts and lists):
        raise CheckpointCorrupt(f"{Path(directory, STATE_JSON)} is not the state of a Trainer.")
    return state["global_step"]


def load_logs(directory: str | os.PathLike) -> dict[str, Any] | None:
    """
    What had been collected for the next log when the checkpoint was written: `loss`, `logged_at` (step), and `sums`,
    the total and number of the finite values of every metric.
    """
    logs = read_json(directory, SCALARS_FILE).get("logs")
    if logs is None:
        return None
    try:
        sums = {name: (float(total), int(count)) for name, (total, count) in logs.get("sums", {}).items()}
        return {"loss": float(logs["loss"]), "logged_at": int(logs["logged_at"]), "sums": sums}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointCorrupt(f"{Path(directory, SCALARS_FILE)} holds no sums for the next log: {error}.") from error


def read_json(directory: str | os.PathLike, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint; raises `CheckpointCorrupt` for anything else."""
    path = Path(directory, name)
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointCorrupt(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data


def _load_tensors(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointCorrupt(f"{path} is not a safetensors file: {error}.") from error


def _errno(error: BaseException) -> int | None:
    """The number of an operating system's error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found.group(1)) if found else None


def fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _replace_directory(source: Path, target: Path) -> None:
    """`os.replace` cannot overwrite a folder with content, so an old one steps aside first."""
    if not target.exists():
        os.replace(source, target)
        return
    aside = target.parent / f"{TEMPORARY}{os.getpid()}-old-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)
    os.replace(source, target)
    shutil.rmtree(aside, ignore_errors=True)
