"""`es-trl dry-run` says what a config would take without taking it; `es-trl env` can be pasted into a bug report."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_runs import PROMPTS, tiny_trainer

from es_trl.cli import dry_run, main
from es_trl.cli.dry_run import Workload
from es_trl.run import peak_memory_gb


CONFIG = """
model_name_or_path: tiny-sana-sprint
reward_funcs: [jpeg_compressibility]
dataset_name: tiny-train
max_train_prompts: 100
eval_dataset_name: tiny-validation
max_eval_prompts: 10
eval_strategy: steps
eval_steps: 5
test_dataset_name: tiny-test
max_test_prompts: 20
test_images_per_prompt: 2
max_steps: 20
population_size: 16
prompts_per_step: 4
members_per_forward: 2
num_sample_prompts: 3
sample_steps: 10
max_sequence_length: 16
push_to_hub: true
hub_model_id: someone/never
report_to: wandb
use_cpu: true
"""


def config_in(folder: Path, lines: str = "") -> list[str]:
    path = folder / "config.yaml"
    path.write_text(CONFIG + f"output_dir: {folder / 'run'}\n" + lines)
    return ["--config", str(path)]


def test_a_dry_run_counts_what_the_config_would_draw(tmp_path, capsys):
    assert main(["dry-run", *config_in(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "WANDB" not in line]  # which transformers prints
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert rows["prompts"] == "100 for training, 10 for evaluations, 20 for the comparison"
    assert rows["one pair"].startswith("2 images of one prompt") and "jpeg_compressibility" in rows["one pair"]
    assert "the same picture (pixels differ by up to 0 of 255)" in rows["save and load"]
    assert rows["full batch"].startswith("2 images in ")
    assert rows["a step"].startswith("16 images, ")
    assert rows["20 steps"].startswith("320 images, ")
    assert rows["evaluations"].startswith("40 images, ")
    assert rows["samples"].startswith("12 images, ")
    assert rows["comparison"].startswith("160 images, ")
    assert float(rows["memory"].split()[0]) == pytest.approx(peak_memory_gb(torch.device("cpu")), abs=0.02)
    assert rows["in all"].startswith("about ")
    assert not (tmp_path / "run").exists(), "nothing is written where the real run will write"


@pytest.mark.parametrize("max_steps", [-1, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_workload_is_what_a_run_really_draws(tmp_path, max_steps, accumulation):
    """Six batches of two prompts, twice: with accumulation an epoch is two updates, of four batches and of two."""
    options = {"max_steps": max_steps, "num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2, "eval_on_start": True}
    trainer = tiny_trainer(
        tmp_path, train_dataset=[*PROMPTS, *(f"{p} again" for p in PROMPTS)], eval_dataset=PROMPTS[:1], **options
    )
    found = Workload.of(trainer.args, trainer.images_per_batch, prompts=12, eval_prompts=1, test_images=0)
    trainer.train()
    assert (found.steps, found.training) == (trainer.state.global_step, trainer.images_drawn)
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert found.evaluations == len(evaluations)


def test_accumulation_and_an_evaluation_before_training(tmp_path, capsys, monkeypatch):
    """They are counted, and not drawn: of four accumulated batches a step would be timed four times too long."""
    made = []
    monkeypatch.setattr(
        dry_run, "_small_trainer", lambda *a, own=dry_run._small_trainer: made.append(own(*a)) or made[0]
    )
    lines = "gradient_accumulation_steps: 4\neval_on_start: true\n"
    arguments = config_in(tmp_path, lines)
    path = Path(arguments[1])
    path.write_text(path.read_text().replace("max_steps: 20\n", "num_train_epochs: 2\n"))
    assert main(["dry-run", *arguments]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert made[0].images_drawn == 4  # two steps of one pair
    assert rows["a step"].startswith("64 images, ")
    assert rows["14 steps"].startswith("800 images, ")  # 25 batches an epoch in 7 steps, of 16 images each
    assert rows["evaluations"].startswith("30 images, ")


@pytest.mark.parametrize(("method", "images"), [("grpo", 12), ("dpo", 12)])
def test_every_method_has_a_dry_run(tmp_path, capsys, method, images):
    lines = f"method: {method}\nnum_generations: 3\nimages_per_forward: 5\n"
    arguments = config_in(tmp_path, lines)
    path = Path(arguments[1])
    own = ("population_size", "members_per_forward")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith(own)))
    assert main(["dry-run", *arguments]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["one prompt"].startswith("3 images of one prompt")
    assert rows["full batch"].startswith("5 images in ")
    assert rows["a step"].startswith(f"{images} images, ") and rows["20 steps"].startswith(f"{20 * images} images, ")


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        ("sigmaa: 1", 2, "Did you mean 'sigma'"),
        ("dataset_name: nowhere.txt", 2, "nowhere.txt"),
        ("reward_funcs: [REWARD:broken]", 1, "no such picture"),
    ],
)
def test_what_cannot_work_is_one_line_and_an_exit_code(tmp_path, capsys, lines, code, message):
    reward = tmp_path / "reward.py"
    reward.write_text("def broken(images, **kwargs):\n    raise KeyError('no such picture')\n")
    arguments = config_in(tmp_path, lines.replace("REWARD", str(reward)) + "\n")
    assert main(["dry-run", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and "es-trl dry-run: " in error and "Traceback" not in error


def test_dry_run_explains_itself(capsys):
    assert main(["dry-run", "--help"]) == 0
    assert "Exit code" in capsys.readouterr().out
    assert main(["dry-run"]) == 2


def test_env_is_a_list_to_paste_and_holds_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(re.fullmatch(r"- [^:]+: \S.*", line) for line in text.splitlines())
    for name in ("es_trl", "Python", "torch", "diffusers", "CPU", "GPU"):
        assert f"- {name}: " in text
    assert main(["env", "--json"]) == 0
    table = capsys.readouterr().out
    assert json.loads(table)["packages"]["torch"] and json.loads(table)["memory_gb"] > 0
    assert "hf_abc" not in text + table
