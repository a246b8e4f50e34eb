"""Checkpoints: complete or invisible, never unpickled, and a resumed run ends bit by bit where it would have ended."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS, files_in, same, theta_of, tiny_trainer
from transformers import TrainerCallback

from es_trl.run import CheckpointCorrupt
from es_trl.run.checkpoint import (
    MANIFEST,
    READ_ON_RESUME,
    STATE_FILE,
    last_checkpoint,
    verify_checkpoint,
    writing_checkpoint,
)


RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "eval_strategy": "steps",
       "eval_steps": 3, "eval_dataset": PROMPTS[:2], "population_size": 4}  # fmt: skip
OPTIMIZERS = {
    "mean": {},
    "sgd with momentum": {
        "update": "optimizer",
        "learning_rate": 0.1,
        "optim_args": "momentum=0.9",
        "noise_reuse": 2,
    },
    "adamw, cosine": {
        "update": "optimizer",
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "es_space": "lora",
    },
    "accumulation": {"gradient_accumulation_steps": 2, "prompts_per_step": 1},
}
CLOCK = ("time", "runtime", "per_second", "overhead", "memory")


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def history(trainer):
    """All that was logged, without what a clock measured."""
    entries = [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in trainer.state.log_history]
    return [entry for entry in entries if "train_loss" not in entry]


def train(output_dir, stop_at=None, resume=None, **options):
    trainer = tiny_trainer(output_dir, callbacks=[StopAt(stop_at)], **(RUN | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = train(tmp_path_factory.mktemp("whole"), **OPTIMIZERS[name])
        return runs[name]

    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped at step 5, with checkpoints at 2 and 4; tests work on copies."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, stop_at=5, **OPTIMIZERS["mean"])
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4", "journal.jsonl", "trainer_state.json"]
    return folder


@pytest.fixture
def run_folder(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path, uninterrupted, name):
    """Stopped at step 2, in the middle of an epoch."""
    whole = uninterrupted(name)
    train(tmp_path, stop_at=2, **OPTIMIZERS[name])
    resumed = train(tmp_path, resume=True, **OPTIMIZERS[name])
    assert resumed.state.global_step == 6
    assert same(theta_of(resumed), theta_of(whole))
    assert history(resumed) == history(whole)
    assert len([entry for entry in history(whole) if "reward" in entry]) == 3


@pytest.mark.parametrize("resume", ["latest", True, "path"])
def test_ways_to_name_a_checkpoint(run_folder, uninterrupted, resume):
    resume = str(run_folder / "checkpoint-2") if resume == "path" else resume
    resumed = train(run_folder, resume=resume)
    assert same(theta_of(resumed), theta_of(uninterrupted("mean")))


def test_a_missing_checkpoint_is_an_error_never_a_fresh_start(tmp_path):
    trainer = tiny_trainer(tmp_path, **RUN)
    with pytest.raises(ValueError, match=f"No valid checkpoint found in output directory .{tmp_path}"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match="No valid checkpoint found.*Leave resume_from_checkpoint out to start afresh"
    ):
        trainer.train(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at .*checkpoint-7"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert trainer.state.global_step == 0


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_pickles_beside_a_checkpoint_are_never_opened(run_folder, tmp_path):
    """F24: what the Trainer would have loaded, and what an attacker would have added."""
    marker = tmp_path / "marker"
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin",
                 "pytorch_model.bin", "adapter_model.bin", "extra.pkl"):  # fmt: skip
        (run_folder / "checkpoint-4" / name).write_bytes(pickle.dumps(Payload(marker)))
    assert train(run_folder, resume=True).state.global_step == 6
    assert not marker.exists()


# --- damage (F3, F4) ---


def seal(checkpoint):
    """Writes a manifest that fits, as someone would who changes a checkpoint on purpose."""
    import hashlib

    entries = {
        name: {"sha256": hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(),
               "size": (checkpoint / name).stat().st_size}
        for name in files_in(checkpoint) if name != MANIFEST
    }  # fmt: skip
    (checkpoint / MANIFEST).write_text(json.dumps(entries))


def flip_byte(checkpoint):
    data = bytearray((checkpoint / STATE_FILE).read_bytes())
    data[-5] ^= 1
    (checkpoint / STATE_FILE).write_bytes(data)


def link_outside(checkpoint):
    target = checkpoint.parent / "elsewhere.json"
    (checkpoint / "env.json").rename(target)
    (checkpoint / "env.json").symlink_to(target)


DAMAGE = {
    "no manifest: killed while saving": (lambda c: (c / MANIFEST).unlink(), "not written to its end"),
    "empty manifest": (lambda c: (c / MANIFEST).write_text(""), "MANIFEST.json is not a manifest"),
    "manifest of another kind": (lambda c: (c / MANIFEST).write_text('["a"]'), "MANIFEST.json is not a manifest"),
    "manifest without the state": (lambda c: (c / MANIFEST).write_text("{}"), f"{MANIFEST}.*{STATE_FILE}"),
    "flipped byte": (flip_byte, f"{STATE_FILE} is damaged.*sha256.*expected"),
    "truncated": (lambda c: os.truncate(c / STATE_FILE, 100), f"{STATE_FILE} is damaged: 100 bytes"),
    "missing file": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "symbolic link": (link_outside, "env.json.*not a plain file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_older_checkpoint_is_taken(run_folder, damage, caplog):
    inflict, message = DAMAGE[damage]
    inflict(run_folder / "checkpoint-4")
    with pytest.raises(CheckpointCorrupt, match=message) as error:
        verify_checkpoint(run_folder / "checkpoint-4")
    assert str(run_folder / "checkpoint-4") in str(error.value)
    assert last_checkpoint(run_folder) == str(run_folder / "checkpoint-2")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "checkpoint-4" in warnings[0]


def test_a_run_goes_on_from_the_older_checkpoint_but_not_when_the_damaged_one_is_named(run_folder, uninterrupted):
    flip_byte(run_folder / "checkpoint-4")
    trainer = tiny_trainer(run_folder, **RUN)
    with pytest.raises(CheckpointCorrupt, match=STATE_FILE):
        trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert same(theta_of(trainer), theta_of(uninterrupted("mean")))


def change_tensors(checkpoint, change):
    tensors = load_file(checkpoint / STATE_FILE)
    change(tensors, next(name for name in tensors if name.startswith("theta.")))
    save_file(tensors, checkpoint / STATE_FILE)
    seal(checkpoint)


CRAFTED = {
    "not finite": (lambda t, name: t[name].fill_(float("nan")), "not finite"),
    "other shape": (lambda t, name: t.update({name: torch.zeros(7, 7)}), "does not fit this one.*lora_rank"),
    "other names": (lambda t, name: t.update({"theta.other": t.pop(name)}), "does not fit this one.*es_space"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_sealed_checkpoints_with_wrong_content_are_refused(run_folder, kind):
    change, message = CRAFTED[kind]
    change_tensors(run_folder / "checkpoint-4", change)
    trainer = tiny_trainer(run_folder, **RUN)
    start = theta_of(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert same(theta_of(trainer), start)


def test_a_pickle_named_safetensors_is_refused(run_folder, tmp_path):
    (run_folder / "checkpoint-4" / STATE_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    seal(run_folder / "checkpoint-4")
    with pytest.raises(CheckpointCorrupt, match=f"{STATE_FILE} is not a safetensors file"):
        train(run_folder, resume=True)
    assert not (tmp_path / "marker").exists()


# --- other settings (F10) ---


def test_changed_settings_are_listed_in_one_warning(run_folder, caplog):
    trainer = tiny_trainer(run_folder, **(RUN | {"sigma": 0.07, "population_size": 6, "logging_steps": 5}))
    trainer.train(resume_from_checkpoint=True)
    warnings = [r.getMessage() for r in caplog.records if "Resuming with other settings" in r.getMessage()]
    assert len(warnings) == 1
    assert "sigma: 0.1 -> 0.07" in warnings[0] and "population_size: 4 -> 6" in warnings[0]
    assert "logging_steps" not in warnings[0] and "max_steps" not in warnings[0]


def test_unchanged_settings_are_silent(run_folder, caplog):
    train(run_folder, resume=True)
    assert "other settings" not in caplog.text


@pytest.mark.parametrize(
    "change", [{"lora_rank": 3}, {"es_space": "lora"}, {"lora_target_modules": ["to_q"]}], ids=str
)
def test_what_cannot_change_is_an_error(run_folder, change):
    with pytest.raises(ValueError, match="does not fit this one"):
        train(run_folder, resume=True, **change)


def test_another_base_model_is_an_error(run_folder):
    from tiny_pipelines import fresh_sprint

    pipe = fresh_sprint()
    pipe.register_to_config(_name_or_path="somebody/else")
    with pytest.raises(ValueError, match="was trained on 'tiny-sana-sprint', this run loads 'somebody/else'"):
        train(run_folder, resume=True, model=pipe)


# --- writing (F3, F5) ---


def test_a_failing_save_leaves_nothing_behind_and_old_checkpoints_alone(run_folder, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("es_trl.run.checkpoint.save_training_state", full_disk)
    shutil.rmtree(run_folder / "checkpoint-4")
    with pytest.raises(OSError, match="No space left"):
        train(run_folder, resume=True)
    assert sorted(os.listdir(run_folder)) == ["checkpoint-2", "journal.jsonl", "trainer_state.json"]
    verify_checkpoint(run_folder / "checkpoint-2")


def test_what_a_killed_save_left_is_removed(run_folder, caplog):
    torn = run_folder / ".tmp-999999-checkpoint-6"
    torn.mkdir()
    (torn / STATE_FILE).write_bytes(b"half")
    train(run_folder, resume=True)
    assert not torn.exists()
    assert sum("-checkpoint-6" in record.getMessage() for record in caplog.records) == 1


def test_writing_is_all_or_nothing(tmp_path):
    target = tmp_path / "checkpoint-1"
    with writing_checkpoint(target) as folder:
        (folder / STATE_FILE).write_text("1")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt):
        with writing_checkpoint(target) as folder:
            (folder / STATE_FILE).write_text("2")
            raise KeyboardInterrupt
    assert (target / STATE_FILE).read_text() == "1" and os.listdir(tmp_path) == ["checkpoint-1"]
    with writing_checkpoint(target) as folder:
        (folder / STATE_FILE).write_text("3")
        for name in READ_ON_RESUME[1:]:
            (folder / name).write_text("{}")
    assert (target / STATE_FILE).read_text() == "3" and os.listdir(tmp_path) == ["checkpoint-1"]
    verify_checkpoint(target)
