"""Windows, simulated: folders and readers cannot be synced, names are refused, the default encoding is cp1252."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import files_in, tiny_trainer


ROOT = Path(__file__).parent.parent
FORBIDDEN = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ]$')
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}
SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "sample_steps": 1}


@pytest.fixture
def no_sync_but_by_writers(monkeypatch):
    """`os.open` refuses folders and `os.fsync` handles that may only read, as on Windows."""
    real_open, real_sync, readers = os.open, os.fsync, set()

    def open_(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        handle = real_open(path, flags, *args, **kwargs)
        (readers.add if flags & (os.O_WRONLY | os.O_RDWR) == 0 else readers.discard)(handle)
        return handle

    def sync(handle):
        if handle in readers:
            raise OSError(9, "Bad file descriptor")
        real_sync(handle)

    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # which open folders, and are not used on Windows
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", sync)


def test_a_run_saves_and_resumes_where_folders_cannot_be_synced(tmp_path, no_sync_but_by_writers):
    trainer = tiny_trainer(tmp_path, **SAVING)
    trainer.train()
    trainer.save_model()
    assert {"checkpoint-2/MANIFEST.json", "pytorch_lora_weights.safetensors", "README.md"} <= set(files_in(tmp_path))
    tiny_trainer(tmp_path, **SAVING | {"max_steps": 3}).train(resume_from_checkpoint="latest")
    assert (tmp_path / "checkpoint-3").is_dir()


def test_every_name_of_a_run_folder_is_one_on_windows(tmp_path):
    trainer = tiny_trainer(tmp_path / "a run", **SAVING)
    trainer.train()
    trainer.save_model()
    for name in files_in(tmp_path):
        for part in Path(name).parts:
            assert not FORBIDDEN.search(part) and part.partition(".")[0].lower() not in RESERVED, name


def test_no_file_is_opened_in_the_encoding_of_the_system():
    """Windows' default is cp1252."""
    command = [sys.executable, "-m", "ruff", "check", "--preview", "--select", "PLW1514", "es_trl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
