"""Trackers, for real: scalars, pictures and histograms arrive in files of theirs."""

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
from tiny_runs import PROMPTS, redness, tiny_trainer
from transformers.integrations import TrackioCallback

from es_trl.run.trackers import tracker_urls


# Read once, when trackio is imported.
TRACKIO_DIR = tempfile.mkdtemp(prefix="trackio-")
os.environ["TRACKIO_DIR"] = TRACKIO_DIR

CANARY = "hf_CANARYcanaryCANARYcanary"
# Settings that a careless user may have filled with secrets; none of them may reach a tracker.
SECRETS = {"model_init_kwargs": {"token": CANARY, "proxies": {"https": "http://me:CANARY-pass@proxy.example"}}}
RUN = {"max_steps": 2, "sample_steps": 1, "num_sample_prompts": 2, "run_name": "tiny", "eval_dataset": PROMPTS[:2],
       "eval_strategy": "steps", "eval_steps": 2, **SECRETS}  # fmt: skip


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)


def config_without_secrets(folder: Path) -> bool:
    """Whether the settings of the run are somewhere below `folder`, and no secret is."""
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert CANARY.encode() not in everything and b"CANARY-pass" not in everything
    return b"population_size" in everything


def pictures_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".webp")]


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    tiny_trainer(tmp_path / "run", report_to="tensorboard", **RUN).train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = events.Tags()
    assert {"train/reward", "train/es/sigma", "train/rewards/redness/mean", "eval/reward"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
    assert set(tags["images"]) == {"samples", "members"} and tags["histograms"] == ["reward_histogram"]
    assert [event.step for event in events.Images("samples")] == [0, 1, 2]
    assert [event.step for event in events.Images("members")] == [1, 2]
    assert config_without_secrets(tmp_path / "events")
    assert events.Histograms("reward_histogram")[0].histogram_value.num == 8, "four members on two prompts"


def test_wandb_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = tiny_trainer(tmp_path / "run", report_to="wandb", **RUN)
    try:
        trainer.train()
        summary, config = dict(wandb.run.summary), dict(wandb.config)
        assert tracker_urls(trainer) == {}, "an offline run has no page"
    finally:
        wandb.finish()
        wandb.teardown()  # else its service keeps these folders for the tests after this one
    assert {"train/reward", "eval/reward", "reward_histogram", "samples", "members"} <= set(summary)
    names = {path.name.split("_")[0] for path in pictures_below(tmp_path / "wandb")}
    assert names == {"samples", "members"}
    assert summary["members"]["caption"] == "best, median and worst member"
    assert config["population_size"] == 4 and "CANARY" not in str(config)
    assert b"CANARY" not in b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1.23."),
    reason="huggingface_hub 1.23: trackio 0.43 asks the Hub who is there, offline too",
)
def test_trackio(tmp_path):
    trainer = tiny_trainer(tmp_path, report_to="trackio", project="tiny-project", **RUN)
    try:
        trainer.train()  # which finishes the run, too
        folder = Path(TRACKIO_DIR)
        (database,) = folder.glob("tiny-project*.db")
        with sqlite3.connect(database) as connection:
            rows = [str(row) for row in connection.execute("SELECT * FROM metrics")]
        logged = "".join(rows)
        (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, TrackioCallback)]
        assert tracker_urls(trainer) == {}, "a local run has no page"
        callback._space_id = "me/space"
        assert tracker_urls(trainer) == {"Trackio": "https://huggingface.co/spaces/me/space"}
        for name in ("train/reward", "eval/reward", "reward_histogram", "members", "samples"):
            assert name in logged, name
        assert "best, median and worst member" in logged, "captions"
        assert config_without_secrets(folder)
        assert len(pictures_below(folder)) >= 5, "samples at steps 0, 1, 2 and members at steps 1, 2"
    finally:
        shutil.rmtree(TRACKIO_DIR, ignore_errors=True)


def test_pictures_stay_home_unless_wanted(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    tiny_trainer(tmp_path / "run", report_to="tensorboard", log_images=False, **RUN).train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert not events.Tags()["images"] and not events.Tags()["histograms"] and events.Tags()["scalars"]
    assert (tmp_path / "run" / "samples" / "step-000000.jpg").exists(), "the run folder has them all the same"


def test_a_failing_tracker_never_ends_a_run(tmp_path, monkeypatch, caplog):
    from transformers.integrations import TensorBoardCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = tiny_trainer(tmp_path / "run", redness, report_to="tensorboard", **RUN)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
    callback._init_summary_writer(trainer.args)

    def broken(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(callback.tb_writer, "add_image", broken)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "did not reach TensorBoardCallback: no route" in caplog.text


def test_an_unknown_tracker_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nosuchtracker"):
        tiny_trainer(tmp_path, report_to="nosuchtracker")
