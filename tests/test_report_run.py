"""What training leaves for the report: what was spent, in every line of the log; the population; `rerun.yaml`."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tiny_runs import PROMPTS, brightness, redness, tiny_trainer

from es_trl.cli import parse
from es_trl.cli.rerun import write_rerun
from es_trl.report.folder import read_folder
from es_trl.report.pictures import populations


RUN = {"max_steps": 2, "sample_steps": 1, "num_sample_prompts": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = tiny_trainer(
        folder, redness, eval_dataset=PROMPTS[:2], eval_reward_funcs=[brightness], eval_strategy="steps", eval_steps=1,
        **RUN,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    return folder, trainer


def test_every_line_of_the_log_says_what_was_spent(trained):
    folder, trainer = trained
    history = read_folder(folder).history
    assert history == json.loads(json.dumps(trainer.state.log_history))
    for entry in history:
        assert entry["num_images"] == 8 * entry["step"]
    seconds = [entry["train_time"] for entry in history if "reward" in entry]
    assert 0 < seconds[0] < seconds[1]
    steps = [entry["step_time"] for entry in history if "reward" in entry]
    imports = 30 if torch.__version__.startswith("2.6.") else 0  # of its compiler, after the first population's time
    assert sum(steps) <= seconds[1] < sum(steps) + 1 + imports, "evaluations and samples do not count"
    assert seconds[1] - seconds[0] < steps[1] + 1


def test_a_resumed_run_counts_on(trained, tmp_path):
    folder, first = trained
    trainer = tiny_trainer(tmp_path, redness, **RUN | {"sample_steps": 0, "max_steps": 3})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    at_checkpoint = next(entry["train_time"] for entry in first.state.log_history if entry["step"] == 1)
    seconds = [entry["train_time"] for entry in trainer.state.log_history if "reward" in entry]
    assert seconds[0] == at_checkpoint and seconds[1] > seconds[0] and seconds[2] > seconds[1]


def test_the_population_is_kept_as_pictures(trained):
    folder, _ = trained
    found = populations(read_folder(folder))
    assert [entry["step"] for entry in found] == [1, 2]
    for entry in found:
        rewards = [member["reward"] for member in entry["members"]]
        assert [member["label"] for member in entry["members"]] == ["best", "median", "worst"]
        assert rewards == sorted(rewards, reverse=True)
        name = folder / "samples" / f"members-{entry['step']:06d}"
        with Image.open(f"{name}-tiles.jpg") as tiles, Image.open(f"{name}.jpg") as strip:
            assert tiles.size == (2 * 32, 3 * 32) and strip.width > tiles.width
        assert len(entry["prompts"]) == 2


def test_rerun_yaml_is_the_same_run(tmp_path):
    arguments, config = parse(None, [
        "--model_name_or_path", "tiny-sana-sprint", "--reward_funcs", "tiny-pickscore", "clip_text:tiny-clip-heldout",
        "--reward_weights", "1", "0.5", "--dataset_name", "tiny-train", "--max_steps", "7", "--sigma", "0.2",
        "--eval_dataset_name", "tiny-validation", "--eval_strategy", "steps", "--eval_steps", "3", "--use_cpu", "true",
        "--lora_target_modules", "to_q", "to_k", "--report_to", "none", "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    path = write_rerun(arguments, config)
    again, same = parse(None, ["--config", path])
    assert dataclasses.asdict(again) == dataclasses.asdict(arguments)
    assert same.to_dict() == config.to_dict()
