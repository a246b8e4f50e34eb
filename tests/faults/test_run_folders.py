"""Run folders with a past: other settings (F10), earlier branches, and what a killed run left there."""

import json
import os

import pytest
from tiny_runs import PROMPTS, same, theta_of
from toy_runs import RUN, redness, toy_trainer, train

from es_trl import ESConfig, ESTrainer
from es_trl.replay import verify_run
from es_trl.run import TrainingStopped
from es_trl.run.checkpoint import last_checkpoint
from recipes.benchmarks.toy_pipeline import toy_pipeline


def test_f10_what_changes_the_numbers_is_in_one_warning(tmp_path, caplog):
    def greenness(images, **_):
        return [-score for score in redness(images)]

    train(tmp_path, max_steps=2)
    changes = {"seed": 7, "noise_rank": 2, "max_steps": 3, "train_dataset": PROMPTS[:5], "save_failure": "warn"}
    train(tmp_path, "latest", reward_funcs=greenness, **changes)
    (warning,) = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
    for change in ("max_steps: 2 -> 3", "noise_rank: 1 -> 2", "seed: 42 -> 7", "train_prompts: 6 -> 5",
                   "reward_funcs: ['redness'] -> ['greenness']"):  # fmt: skip
        assert change in warning
    assert "save_failure" not in warning


def test_f10_more_steps_change_no_number_where_the_learning_rate_is_constant(tmp_path, caplog):
    train(tmp_path, max_steps=2, lr_scheduler_type="constant")
    train(tmp_path, "latest", max_steps=3, lr_scheduler_type="constant")
    assert "other settings" not in caplog.text


def test_a_run_that_goes_back_leaves_its_later_checkpoints_behind(tmp_path, caplog):
    """From step 2 with another seed, stopped in step 3: `latest` is step 3 of this run, not 6 of the one before."""

    def stopping(images, trainer_state=None, **_):
        trainer.stop_signals.received = 15 if trainer_state.global_step == 3 else None
        return redness(images)

    train(tmp_path, save_total_limit=None)
    trainer = toy_trainer(tmp_path, stopping, seed=7)
    with pytest.raises(TrainingStopped):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    for step in (4, 6):
        assert (tmp_path / f"superseded-checkpoint-{step}" / "MANIFEST.json").exists()
        assert f"checkpoint-{step} is later than step 2, where this run begins" in caplog.text
    train(tmp_path, "latest", seed=7)
    assert verify_run(tmp_path, toy_pipeline).proven


def test_a_fresh_run_in_an_old_folder_is_not_resumed_from_the_old_one(tmp_path):
    train(tmp_path)
    whole = train(tmp_path / "b", seed=7, max_steps=3)
    train(tmp_path, seed=7, max_steps=3)
    ours = ["checkpoint-2", "checkpoint-3", "superseded-checkpoint-4", "superseded-checkpoint-6"]
    assert sorted(name for name in os.listdir(tmp_path) if "checkpoint" in name) == ours
    assert same(theta_of(train(tmp_path, "latest", seed=7, max_steps=3)), theta_of(whole))
    for _ in range(2):
        train(tmp_path, max_steps=2)
    assert (tmp_path / "superseded-checkpoint-2").is_dir() and (tmp_path / "superseded-2-checkpoint-2").is_dir()


def test_a_torn_list_of_samples_does_not_end_the_run(tmp_path):
    train(tmp_path, max_steps=2, sample_steps=1)
    path = tmp_path / "samples" / "metadata.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    train(tmp_path, "latest", max_steps=3, sample_steps=1)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["step"] for entry in entries} == {0, 1, 2, 3}
    assert whole.splitlines()[:-1] == path.read_text().splitlines()[: len(whole.splitlines()) - 1]


def test_leftovers_of_a_killed_run_with_this_very_number_are_removed(tmp_path, caplog):
    """In a container every run may be process 7."""
    (tmp_path / f".tmp-checkpoint-9-{os.getpid()}").mkdir()
    (tmp_path / f".tmp-journal.jsonl-{os.getpid()}").write_text("half a")
    (tmp_path / f".tmp-checkpoint-9-{os.getppid()}").mkdir()
    train(tmp_path, max_steps=1)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp")] == [f".tmp-checkpoint-9-{os.getppid()}"]
    assert caplog.text.count("which a killed run did not finish writing") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlflow", "report_to='mlflow' is not installed: pip install mlflow"), ("wand", "report_to='wand' is unknown")],
)
def test_f27_a_tracker_that_is_not_there_is_refused_before_a_model_loads(tmp_path, name, message):
    config = ESConfig(**(RUN | {"output_dir": str(tmp_path), "report_to": name}))
    with pytest.raises(ValueError, match=message):
        ESTrainer("no/such-model", redness, args=config, train_dataset=PROMPTS)
