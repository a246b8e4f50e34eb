"""What a run says on the terminal: differences to the base, and two lines at the end; and what its eyes see."""

import logging

import numpy as np
import pytest
from PIL import Image
from tiny_runs import PROMPTS, tiny_trainer

from es_trl import ESConfig
from es_trl.cli.messages import AboveTheBar
from es_trl.evaluation import LOOKS, looks_of


EIGHT = [*PROMPTS, "a white star", "two red frogs"]


def darkness(images, **_):
    return [-float(np.asarray(image.convert("L"), dtype=np.float64).mean()) for image in images]


def darkened(adapter, images):
    """What a run that hacks `darkness` would draw: everything at a third of its brightness."""
    return [image.point(lambda value: value // 3) for image in images]


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().out.strip().split("\n")


def test_training_ends_with_the_gain_and_with_where_everything_lies(tmp_path, lines):
    trainer = tiny_trainer(tmp_path, darkness, eval_dataset=EIGHT, disable_tqdm=False, max_steps=2)
    trainer.train()
    *_, gain, where = lines()
    assert gain.startswith("On 8 evaluation prompts darkness went from ") and "better on" in gain
    assert "[" in gain and "]" in gain, "the interval"
    assert str(tmp_path) in where and "es-trl report" in where


def test_without_evaluation_prompts_it_says_that_nothing_was_compared(tmp_path, lines):
    tiny_trainer(tmp_path, darkness, disable_tqdm=False, max_steps=1).train()
    *_, nothing, where = lines()
    assert nothing.startswith("Nothing was compared with the base: give eval_dataset") and str(tmp_path) in where


def test_few_evaluation_prompts_have_no_interval(tmp_path, lines):
    tiny_trainer(tmp_path, darkness, eval_dataset=EIGHT[:3], disable_tqdm=False, max_steps=1).train()
    gain = lines()[-2]
    assert "on too few prompts for an interval" in gain and "[" not in gain and "better on" not in gain


def test_evaluations_say_how_far_they_are_from_the_base_and_a_resumed_run_counts_on(tmp_path, lines):
    run = {"eval_dataset": EIGHT, "eval_strategy": "steps", "eval_steps": 1, "disable_tqdm": False,
           "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    tiny_trainer(tmp_path, darkness, max_steps=1, **run).train()
    first = lines()
    assert any("Evaluation at step 1: " in line and "to the base)" in line for line in first)
    start = float(next(line for line in first if line.startswith("Steps 1/1 reward ")).split()[3])
    trainer = tiny_trainer(tmp_path, darkness, max_steps=2, **run)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    second = next(line for line in lines() if line.startswith("Steps 2/2 reward "))
    assert float(second.split("(")[1].split(")")[0]) == pytest.approx(float(second.split()[3]) - start, abs=0.06)


def test_ten_logs_whatever_the_length(tmp_path):
    assert ESConfig(str(tmp_path)).logging_steps == 0.1
    trainer = tiny_trainer(tmp_path, darkness, max_steps=20, logging_steps=0.1, population_size=2, prompts_per_step=1)
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "reward" in entry]) == 10


def test_messages_stand_above_the_bar(capsys):
    AboveTheBar().emit(logging.LogRecord("es_trl", logging.INFO, "", 0, "a line", (), None))
    assert capsys.readouterr().err == "a line\n"


def test_every_look_moves_with_what_it_is_called():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    red = Image.new("RGB", (64, 64), (200, 30, 30))
    white = Image.new("RGB", (64, 64), "white")
    found = {name: dict(zip(LOOKS, looks_of(image), strict=True)) for name, image in
             (("grey", grey), ("noise", noise), ("red", red), ("white", white))}  # fmt: skip
    assert found["white"]["brightness"] == pytest.approx(1.0) and found["grey"]["brightness"] < 0.6
    assert found["red"]["saturation"] > 0.8 > found["grey"]["saturation"] == 0.0
    for name in ("contrast", "edges", "fine_detail", "entropy"):
        assert found["noise"][name] > 0.01 > found["grey"][name]


def test_it_sees_pictures_go_dark_though_nothing_held_out_was_named(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, darkness, eval_dataset=EIGHT)
    draw = trainer.adapter.generate
    assert trainer.evaluate()["eval_early_warning"] == 0.0
    monkeypatch.setattr(
        trainer.adapter, "generate", lambda *args, **kwargs: darkened(trainer.adapter, draw(*args, **kwargs))
    )
    assert trainer.evaluate()["eval_early_warning"] == 1.0
    assert "pictures go darker (brightness" in caplog.text and "while reward +" in caplog.text


def test_with_few_prompts_the_early_warning_says_why_it_is_silent(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = tiny_trainer(tmp_path, darkness, eval_dataset=EIGHT[:4])
    assert "eval_early_warning" not in trainer.evaluate()
    assert "4 evaluation prompts are too few for the early warning; give 8." in caplog.text


def test_an_alert_reaches_the_tracker_that_has_alerts(tmp_path, monkeypatch):
    from transformers.integrations import WandbCallback

    from es_trl.run.trackers import send_alert

    sent = []

    class Run:
        def alert(self, title, text, level):
            sent.append((title, text, level))

    callback = WandbCallback.__new__(WandbCallback)
    callback._wandb = type("wandb", (), {"run": Run()})
    trainer = tiny_trainer(tmp_path, darkness)
    monkeypatch.setattr(trainer.callback_handler, "callbacks", [callback])
    send_alert(trainer, "Early warning", "pictures go darker")
    assert sent == [("Early warning", "pictures go darker", "WARN")]
