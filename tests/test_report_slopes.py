"""What the page says about an ES run's own way: slopes with errors, the turn, which layers learn."""

import pytest
from report_folders import run_folder
from test_benchmarks import load
from test_report import opened
from tiny_runs import PROMPTS, WHOLE, tiny_trainer

from es_trl.report import page as page_module
from es_trl.report import write_report
from es_trl.report.slopes import facts, read_way, shown_slopes


def entry(step: int, margin: float, turns: int = 0, **more) -> dict:
    scores = {
        "es/slope/reward": 0.2,
        "es/slope_error/reward": 0.02,
        "es/slope/margin": margin,
        "es/slope_error/margin": 0.02,
    }
    return {"step": step, "num_images": 10 * step, "loss": 0.0, "es/turns": turns, "es/sigma": 0.5} | scores | more


def test_the_way_is_what_the_log_says():
    energy = {"es/energy/attn1.to_v": 0.3, "es/energy/<b>$x$": -0.1, "es/signal": 0.2, "es/signal_error": 0.01}
    history = [
        {"step": 0, "num_images": 0, "eval_reward": 1.0},
        {"step": 1, "num_images": 10, "es/sigma": 0.5, "es/slope/lonely": 0.1},
        entry(2, 0.1),
        entry(2, 0.3, **{"es/travel_left": 0.4}),
        entry(3, float("nan"), 1),
        entry(4, -0.2, 1, **energy),
    ]
    way = read_way(history)
    assert set(way.slopes) == {"reward", "margin"}, "a slope without an error is none"
    assert way.slopes["margin"].tolist() == [[2, 20, 0.3, 0.02], [4, 40, -0.2, 0.02]], (
        "the later entry of a step counts"
    )
    assert way.turns == [(3, 30)] and way.watched == "margin" and way.sigma == 0.5 and way.travel_left == 0.4
    assert way.energy == pytest.approx({"attn1.to_v": 1.5, "<b>$x$": -0.5})
    assert shown_slopes(way, ["held", "reward"]) == ["reward", "margin", "reward"]
    told = dict(facts(way))
    assert (
        told["turn"] == "the margin had surely fallen by step 3" and "no signal" not in told["signal in the fitness"]
    )
    lost = read_way([entry(1, 0.1, **energy | {"es/signal": 0.01})])
    assert "no signal found" in dict(facts(lost))["signal in the fitness"]
    empty = read_way([{"step": 1, "loss": 1.0, "grpo/ratio": 1.0}])
    assert not empty.slopes and not empty.energy and facts(empty) == []


def test_a_run_shows_its_way_and_other_methods_show_none(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "save_png", lambda draw, path: None)
    trainer = tiny_trainer(
        tmp_path, "tiny-pickscore", max_steps=3, logging_steps=1, lora_rank=1, output_change=0.2, sigma=None,
        population_size=32, members_per_forward=32, train_dataset=PROMPTS, **WHOLE,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["es/turns"] for line in history] == [0, 0, 0] and history[-1]["es/travel_left"] == 0
    page = opened(write_report(tmp_path))
    assert "What the run found on its way" in page.text and "signal in the fitness" in page.text
    label = next(svg["aria-label"] for svg in page.of("svg") if svg.get("aria-label", "").startswith("Share of"))
    assert "attn" in label
    other = opened(write_report(run_folder(tmp_path / "other")))
    assert "on its way" not in other.text


def test_the_recipe_finds_the_turn_that_a_run_would_find():
    """Steps of length 2: the sum of changes is 0.6, then falls by 0.4, far more than twice its error of 0.04."""
    found = load("slopes").would_have_turned
    rising = [{"step": 1, "es/update_norm": 1.0, "es/sigma": 0.5}, entry(2, 0.3, **{"es/update_norm": 1.0})]
    assert found(rising, "margin") is None
    assert found([*rising, entry(3, -0.2, **{"es/update_norm": 1.0})], "margin") == (3, 1)
    assert found([*rising, entry(3, -0.03, **{"es/update_norm": 1.0})], "margin") is None
