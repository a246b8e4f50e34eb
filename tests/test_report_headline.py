"""The first words of a page: the real tables of made-up scores, and nothing that they do not carry."""

import json

import numpy as np
import pytest

from es_trl.evaluation import MIN_PROMPTS, Evaluation, EvaluationRow, Noise, write_files
from es_trl.hub import model_card
from es_trl.report import write_report
from es_trl.report.folder import read_folder
from es_trl.report.headline import headline


ROWS = ("base@1", "adapter@1", "base@2")
BLUE = {"blue": (0.0, 30.0, 0.2)}  # what the adapter and a second step add to every prompt
BETTER, WORSE = {"held": (0.0, 1.0, 0.8)}, {"held": (0.0, -1.0, 0.8)}


def folder_of(path, levels, trained, rising=(), prompts=40, noise=0.3):
    """An evaluation folder: per reward the level of base, adapter and base with two steps."""
    rows = [
        EvaluationRow("base@1", adapter=False, num_inference_steps=1),
        EvaluationRow("adapter@1", num_inference_steps=1, label="adapter"),
        EvaluationRow("base@2", adapter=False, num_inference_steps=2),
    ]
    result = Evaluation(
        rows, list(levels), [f"prompt {i}" for i in range(prompts)], Noise((0,), 1), 500, {"pipeline": "a pipeline"},
        trained=trained, rising=rising, details={"prompts_source": None, "command": "es-trl eval"},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    ease = rng.normal(size=(prompts, 1, 1))
    for i, row in enumerate(rows):
        level = np.array([levels[name][i] for name in levels])
        result.add_row(row, ease + level + noise * rng.normal(size=(prompts, 1, len(levels))), None, None)
    write_files(result, path)
    return read_folder(path)


def said(folder) -> tuple[str, list[str]]:
    head = headline(folder)
    return head["title"].replace("\u00a0", " "), [text.replace("\u00a0", " ") for text in head["lede"]]


def test_a_reward_of_ones_own_is_judged_by_its_gain_and_not_by_steps(tmp_path):
    folder = folder_of(tmp_path, BLUE, {"blue": 1.0})
    title, lede = said(folder)
    assert title == "Better on 100 % of the prompts"
    assert "Judged by blue, the reward it was trained on" in lede[0] and "+30" in lede[0] and "interval" in lede[0]
    assert headline(folder)["gaps"] == [] and "Gap closure" not in write_report(tmp_path).read_text()
    assert folder.evaluation["gap_closure"] == {} and "of the gain" not in model_card({}, {}, folder.evaluation).text


def test_what_fell_is_the_second_sentence(tmp_path):
    title, lede = said(folder_of(tmp_path, BLUE | WORSE, {"blue": 1.0}, rising=["held"]))
    assert title == "blue rose, held fell"
    assert lede[0].startswith("Judged by blue")
    assert lede[1].startswith("But held, which training never saw, fell by 1") and "interval 0." in lede[1]


def test_a_hacked_reward_says_what_fell_though_steps_are_a_yardstick(tmp_path):
    levels = {"pick": (0.0, 2.0, 0.8)} | WORSE
    title, lede = said(folder_of(tmp_path, levels, {"pick": 1.0}, rising=["pick", "held"]))
    assert title == "pick rose, held fell" and "But held" not in lede[0]


@pytest.mark.parametrize("second, held", [(0.8, -20.0), (0.8, -1.0), (0.4, 8.0)])
def test_a_loss_closes_no_gap_and_a_hair_of_a_gap_has_no_ruler(tmp_path, second, held):
    folder = folder_of(tmp_path, BLUE | {"held": (0.0, held, second)}, {"blue": 1.0}, rising=["held"])
    assert folder.evaluation["gap_closure_ci"]["held"] is not None
    assert headline(folder)["gaps"] == [] and "Gap closure" not in write_report(tmp_path).read_text()
    assert ("of the gain" in model_card({}, {}, folder.evaluation).text) is (held > 0)


def test_a_held_out_reward_has_the_word_where_its_gap_is_real(tmp_path):
    levels = {"pick": (0.0, 2.0, 0.8)} | BETTER
    title, lede = said(folder_of(tmp_path, levels, {"pick": 1.0}, rising=["pick", "held"]))
    assert title == "One step now outscores two"
    assert "Judged by held, which training never saw" in lede[0] and "of what one more step would give" in lede[1]


def test_a_gap_that_is_not_real_is_no_yardstick(tmp_path):
    levels = {"pick": (0.0, 2.0, 0.02)}
    folder = folder_of(tmp_path, levels, {"pick": 1.0}, rising=["pick"])
    assert headline(folder)["gaps"] == [] and said(folder)[0] == "Better on 100 % of the prompts"
    assert folder.evaluation["gap_closure"] == {"pick": None}


def test_several_rewards_are_one_weighted_sum_with_its_weights(tmp_path):
    levels = {"blue": (0.0, 30.0, 0.0), "red": (0.0, -3.0, 0.0)}
    folder = folder_of(tmp_path, levels, {"blue": 1.0, "red": 5.0})
    title, lede = said(folder)
    assert title == "The trained sum rose, red fell"
    assert "what was trained, 1 \u00d7 blue + 5 \u00d7 red," in lede[0] and "+1" in lede[0]
    assert lede[1].startswith("But red, the reward it was trained on, fell by")
    assert "1 \u00d7 blue + 5 \u00d7 red" in write_report(tmp_path).read_text().partition("<h1>")[0]


def test_a_reward_that_was_minimised_is_a_gain_when_it_falls(tmp_path):
    title, lede = said(folder_of(tmp_path, {"noise": (0.0, -3.0, 0.0)}, {"noise": -1.0}))
    assert title == "Better on 100 % of the prompts" and "\u22121 \u00d7 noise" in lede[0]
    assert not any("fell" in sentence for sentence in lede)


def test_a_minimised_reward_that_rises_is_what_went_wrong(tmp_path):
    levels = {"blue": (0.0, 30.0, 0.0), "noise": (0.0, 3.0, 0.0)}
    title, lede = said(folder_of(tmp_path, levels, {"blue": 1.0, "noise": -1.0}))
    assert title == "The trained sum rose, noise rose"
    assert lede[1].startswith("But noise, the reward it was trained on, rose by 2.95")


@pytest.mark.parametrize("prompts", [1, 2, 3, MIN_PROMPTS - 1])
def test_few_prompts_make_no_claim_and_have_no_interval(prompts, tmp_path):
    folder = folder_of(tmp_path, BLUE | BETTER, {"blue": 1.0}, rising=["held"], prompts=prompts)
    title, lede = said(folder)
    assert title == "Too few prompts to tell" and f"Below {MIN_PROMPTS} prompts" in lede[0]
    assert lede[0].startswith("1 prompt was" if prompts == 1 else f"{prompts} prompts were")
    table = json.loads((tmp_path / "eval.json").read_text())
    found = [row["rewards"][name] for row in table["rows"] for name in row["rewards"]] + table["paired"]
    assert {entry["ci_low"] for entry in found} == {None} == {entry["ci_high"] for entry in found}
    assert table["gap_closure"] == {"held": None}
    page = write_report(tmp_path).read_text().replace("\u00a0", " ")
    assert "100 %" not in page and "interval" not in page.partition("</section>")[0].replace(lede[0], "")
    assert "better on" not in model_card({}, {}, folder.evaluation).text


def test_enough_prompts_may_claim(tmp_path):
    assert said(folder_of(tmp_path, BLUE, {"blue": 1.0}, prompts=MIN_PROMPTS))[0] == "Better on 100 % of the prompts"
