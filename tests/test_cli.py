"""`es-trl` and the recipe script: one run from a YAML file, and one sentence for a file that cannot work."""

import json
import logging
import os
import runpy
import sys
from pathlib import Path

import pytest

from es_trl.cli import main, messages


ROOT = Path(__file__).parent.parent
TINY = """
model_name_or_path: tiny-sana-sprint
reward_funcs: [jpeg_compressibility]
eval_reward_funcs: [tiny-clip-heldout]
judge: tiny-clip-heldout
dataset_name: tiny-train
dataset_train_split: train
dataset_prompt_column: prompt
max_train_prompts: 16
eval_dataset_name: tiny-validation
max_eval_prompts: 2
eval_strategy: steps
eval_steps: 1
test_dataset_name: tiny-test
max_test_prompts: 4
test_images_per_prompt: 2
max_steps: 1
population_size: 4
prompts_per_step: 2
max_sequence_length: 16
use_cpu: true
"""


def tiny_config(folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(TINY + f"output_dir: {folder / 'run'}\n")
    return ["--config", str(path)]


@pytest.mark.parametrize("entry", ["es-trl train", "recipes/es_sana.py"])
def test_a_run_leaves_a_complete_folder(entry, tmp_path, monkeypatch):
    if entry == "es-trl train":
        assert main(["train", *tiny_config(tmp_path)]) == 0
    else:
        monkeypatch.setattr(sys, "argv", [entry, *tiny_config(tmp_path), "--max_steps", "2"])
        runpy.run_path(str(ROOT / entry), run_name="__main__")
    folder = tmp_path / "run"
    for name in ("pytorch_lora_weights.safetensors", "README.md", "eval.json", "samples/before_after.jpg", "env.json"):
        assert (folder / name).is_file(), name
    table = json.loads((folder / "eval.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["base@1", "adapter@1", "base@2"]
    assert set(table["rows"][0]["rewards"]) == {"jpeg_compressibility", "tiny-clip-heldout"}
    assert (table["protocol"]["prompts"], table["protocol"]["images_per_prompt"]) == (4, 2)
    ran = json.loads((folder / "es_config.json").read_text())
    assert ran["train_prompts"] == 16
    settings = ran["config"]
    assert settings["max_steps"] == (1 if entry == "es-trl train" else 2), "the command line overrides the file"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("populationsize: 3", "Did you mean 'population_size'?"),
        ("population_size: 5\nantithetic: true", "population_size must be even"),
        ("sigma: 0", "sigma must be above 0"),
        ("reward_funcs: [tiny-pickscor]", "tiny-pickscore"),
        ("dataset_name: nowhere.txt", "nowhere.txt"),
        ("bf16: true", "dtype"),
        ("reward_funcs: [someone/clip]", "'someone/clip' cannot be loaded: HF_HUB_OFFLINE is set"),
        ("model_name_or_path: someone/model", "someone/model"),
    ],
)
def test_a_config_that_cannot_work_is_one_sentence(line, message, tmp_path, capsys):
    arguments = tiny_config(tmp_path)
    with open(arguments[1], "a") as file:
        file.write(line + "\n")
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "es-trl train: " in error and "Traceback" not in error
    assert not os.path.exists(tmp_path / "run" / "pytorch_lora_weights.safetensors")


def test_what_a_library_warned_at_its_import_silences_no_message_of_ours(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    assert not messages._set_up()
    logging.warning("a library is imported")  # which gives the root logger a handler
    assert root.handlers and not messages._set_up()
    logging.basicConfig(level=logging.INFO, force=True)
    assert messages._set_up()
