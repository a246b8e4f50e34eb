"""Run folders with a past: other settings (F10), earlier branches, and what a killed run left there."""

import json
import os
import shutil
import socket
import time

import pytest
from forks import fork, wait
from tiny_runs import PROMPTS, same, theta_of
from toy_runs import RUN, redness, toy_trainer, train

from es_trl import ESConfig, ESTrainer
from es_trl.lock import FolderInUse
from es_trl.replay import verify_run
from es_trl.run import TrainingStopped, checkpoint
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
    options = {"update": "optimizer", "lr_scheduler_type": "constant", "learning_rate": 0.1}
    train(tmp_path, max_steps=2, **options)
    train(tmp_path, "latest", max_steps=3, **options)
    assert "other settings" not in caplog.text


def test_a_run_that_goes_back_leaves_its_later_checkpoints_behind(tmp_path, caplog):
    """From step 2 with another seed, stopped in step 3: `latest` is step 3 of this run, not 6 of the one before."""

    def stopping(images, trainer_state=None, **_):
        trainer.stopping.signals.received = 15 if trainer_state.global_step == 3 else None
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
    assert sorted(name for name in os.listdir(tmp_path) if "checkpoint" in name) == ["checkpoint-2", "checkpoint-3"]
    theirs = ["checkpoint-4", "checkpoint-6", "journal.jsonl", "trainer_state.json"]
    assert sorted(os.listdir(tmp_path / "earlier-1")) == theirs
    assert same(theta_of(train(tmp_path, "latest", seed=7, max_steps=3)), theta_of(whole))


def test_a_fresh_run_leaves_nothing_of_the_old_one_in_its_place(tmp_path, caplog):
    """Adapter, card, comparison, samples, page: all are moved aside, what is not ours stays, and it is said once."""
    old = train(tmp_path, max_steps=2, sample_steps=1)
    old.compare_with_base(PROMPTS[:2])
    old.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    theirs = set(os.listdir(tmp_path)) - {"notes.txt"}
    new = toy_trainer(tmp_path, max_steps=1)
    new.train()
    assert set(os.listdir(tmp_path)) == {
        "notes.txt",
        "earlier-1",
        "checkpoint-1",
        "journal.jsonl",
        "trainer_state.json",
    }
    assert set(os.listdir(tmp_path / "earlier-1")) == theirs
    assert caplog.text.count("held an earlier run") == 1
    train(tmp_path, max_steps=1)
    assert (tmp_path / "earlier-2" / "checkpoint-1").is_dir()


def test_only_one_run_writes_into_a_folder(tmp_path):
    """The second is refused before its model loads; a lock of a process that is gone, or whose number was given out
    again, is taken over; one of another machine counts while its time moves."""

    config = ESConfig(output_dir=str(tmp_path))

    def second(images, **_):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on .* writes into it"):
            ESTrainer("no/such-model", redness, args=config, train_dataset=PROMPTS)
        return redness(images)

    train(tmp_path, reward_funcs=second, max_steps=1)
    lock = tmp_path / "run.lock"
    assert not lock.exists()
    for holder in ({"pid": 2**22 + 1}, {"pid": os.getpid(), "process": 1.0}):
        lock.write_text(json.dumps({"host": socket.gethostname(), "process": 0.0} | holder))
        train(tmp_path, max_steps=1)
    lock.write_text(json.dumps({"host": "another-machine", "pid": 1, "process": 0.0}))
    with pytest.raises(FolderInUse, match="process 1 on another-machine"):
        toy_trainer(tmp_path)
    os.utime(lock, (time.time() - 600,) * 2)
    train(tmp_path, max_steps=1)
    assert not lock.exists()
    lock.write_bytes(b"\xff{")  # torn, or being written
    with pytest.raises(FolderInUse, match="another process writes into it"):
        toy_trainer(tmp_path)


def die_training(folder):
    def deadly(images, **_):
        os._exit(9)

    train(folder, reward_funcs=deadly)


def test_a_killed_run_locks_nobody_out(tmp_path):
    assert wait(fork(die_training, tmp_path)) == 9 and (tmp_path / "run.lock").exists()
    train(tmp_path, max_steps=1)


def test_names_beside_checkpoints_never_confuse_latest(tmp_path, caplog):
    train(tmp_path, max_steps=2, save_steps=1, save_total_limit=None)
    for name in ("checkpoint-000120 (1)", "checkpoint-abc", "checkpoint-best-7", "checkpoint-0009"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    (tmp_path / "checkpoint-100.safetensors").write_text("")
    (tmp_path / "checkpoint-101").write_text("")
    (tmp_path / "checkpoint-102").symlink_to(tmp_path / "nowhere")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    others = {name for name in os.listdir(tmp_path) if "checkpoint" in name} - {"checkpoint-1", "checkpoint-2"}
    resumed = train(tmp_path, "latest", max_steps=4, save_steps=1, save_total_limit=2)
    assert resumed.state.global_step == 4
    left = {name for name in os.listdir(tmp_path) if "checkpoint" in name}
    assert left == others | {"checkpoint-3", "checkpoint-4"}, "and none of them is removed as an old one"


def test_a_checkpoint_of_another_method_is_none_of_ours(tmp_path, caplog):
    train(tmp_path, max_steps=1)
    theirs = tmp_path / "checkpoint-1"
    shutil.copytree(theirs, tmp_path / "checkpoint-9")
    for folder in (theirs, tmp_path / "checkpoint-9"):
        settings = json.loads((folder / "es_config.json").read_text())
        if folder.name == "checkpoint-9":
            (folder / "es_config.json").write_text(json.dumps(settings | {"method": "grpo"}))
            manifest = json.loads((folder / "MANIFEST.json").read_text())
            manifest["es_config.json"] = checkpoint.fingerprint(folder / "es_config.json")
            (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    assert last_checkpoint(tmp_path, "es") == str(theirs)
    with pytest.raises(ValueError, match="was trained by 'grpo', this run is 'es'"):
        train(tmp_path, str(tmp_path / "checkpoint-9"), max_steps=2)


def test_what_a_run_leaves_can_be_read_by_others(tmp_path):
    """As the umask says, whatever safetensors thinks of it; and a kill in `save_model` leaves the adapter before."""
    mask = os.umask(0o022)
    try:
        trainer = train(tmp_path, max_steps=1)
        trainer.save_model()
    finally:
        os.umask(mask)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert path.stat().st_mode & 0o777 == 0o644, path
    before = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    trainer.adapter.save_lora = lambda directory: (directory / "pytorch_lora_weights.safetensors").write_bytes(b"") / 0
    with pytest.raises(ZeroDivisionError):
        trainer.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


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
    (tmp_path / f".tmp-{os.getpid()}-checkpoint-9").mkdir()
    (tmp_path / f".tmp-{os.getpid()}-journal.jsonl").write_text("half a")
    (tmp_path / f".tmp-{os.getppid()}-checkpoint-9").mkdir()
    train(tmp_path, max_steps=1)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp")] == [f".tmp-{os.getppid()}-checkpoint-9"]
    assert caplog.text.count("which a killed run did not finish writing") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlflow", "report_to='mlflow' is not installed: pip install mlflow"), ("wand", "report_to='wand' is unknown")],
)
def test_f27_a_tracker_that_is_not_there_is_refused_before_a_model_loads(tmp_path, name, message):
    config = ESConfig(**(RUN | {"output_dir": str(tmp_path), "report_to": name}))
    with pytest.raises(ValueError, match=message):
        ESTrainer("no/such-model", redness, args=config, train_dataset=PROMPTS)
