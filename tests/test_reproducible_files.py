"""The same run writes the same files, whatever the order of Python's sets and of safetensors' hash tables."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from es_trl.report import write_report
from tiny_runs import tiny_trainer
trainer = tiny_trainer({folder!r}, max_steps=1, sample_steps=1)
trainer.train()
trainer.save_model()
write_report({reported!r})
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in the seed of Python's hashes alone; the second also draws the page of the first again."""
    place, here = tmp_path_factory.mktemp("runs"), Path(__file__).parent
    folders = []
    for seed in "12":
        folder, reported = place / seed / "run", place / f"page-{seed}" / "run"
        if folders:
            shutil.copytree(folders[0], reported)
            shutil.rmtree(reported / "report")
        else:
            reported = folder
        script = SCRIPT.format(paths=[str(here), str(here.parent)], folder=str(folder), reported=str(reported))
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        folders.append(folder)
    return folders, [folders[0] / "report", place / "page-2" / "run" / "report"]


def test_the_adapter_is_the_same_file(runs):
    assert len({(folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in runs[0]}) == 1


def test_the_card_differs_in_the_seconds_it_took_alone(runs):
    assert len({re.sub(r"\d+ m?s\b", "_ s", (folder / "README.md").read_text()) for folder in runs[0]}) == 1


def test_the_page_is_the_same_file(runs):
    first, again = runs[1]
    names = sorted(path.name for path in first.iterdir())
    assert "index.html" in names
    assert [name for name in names if (first / name).read_bytes() != (again / name).read_bytes()] == []
