"""`es-trl compare`: seeds of one method are one line with an interval, and nothing is compared that must not be."""

import json
import shutil

import numpy as np
import pytest
from report_folders import HELD_OUT, PROMPTS, TRAINED, run_folder
from scipy.stats import t
from test_report import opened

from es_trl.cli import main
from es_trl.report import write_comparison
from es_trl.report.charts import mean_curve
from es_trl.report.curves import VALIDATION, learning_curves
from es_trl.report.folder import read_folder
from es_trl.report.groups import group, result_of, same_protocol


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of one method, two of a weaker one with another sigma."""
    path = tmp_path_factory.mktemp("runs")
    strong = [run_folder(path / f"strong{seed}", seed, gain=2.0 + 0.05 * seed) for seed in range(3)]
    weak = [run_folder(path / f"weak{seed}", 10 + seed, gain=0.5 + 0.05 * seed, sigma=0.4) for seed in range(2)]
    return [*strong, *weak]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    return write_comparison(runs, tmp_path_factory.mktemp("page"))


def test_runs_that_differ_in_their_seed_are_one_method(runs):
    methods = group([read_folder(run) for run in runs])
    assert [len(method.runs) for method in methods] == [3, 2]
    assert [method.label for method in methods] == ["ES (sigma 0.1)", "ES (sigma 0.4)"]


def test_labels_decide_where_they_are_given(runs):
    folders = [read_folder(run) for run in runs]
    methods = group(folders, ["a", "b", "a", "b", "c"])
    assert [(method.label, len(method.runs)) for method in methods] == [("a", 2), ("b", 2), ("c", 1)]
    with pytest.raises(ValueError, match="2 labels for 5 runs"):
        group(folders, ["a", "b"])


def test_the_interval_of_several_seeds_covers_seeds_and_prompts(runs):
    method = group([read_folder(run) for run in runs])[0]
    found = result_of(method, HELD_OUT)
    singles = [result_of(group([run])[0], HELD_OUT) for run in method.runs]
    assert found["delta"] == pytest.approx(np.mean([one["delta"] for one in singles]))
    assert found["over"] == "prompts and training seeds" and singles[0]["over"] == "prompts"
    assert found["low"] < found["delta"] < found["high"]
    assert found["high"] - found["low"] > max(one["high"] - one["low"] for one in singles) / 2
    for run in method.runs:
        (run.path / "scores.parquet").rename(run.path / "away")
    without = result_of(method, HELD_OUT)
    for run in method.runs:
        (run.path / "away").rename(run.path / "scores.parquet")
    half = t.ppf(0.975, 2) * np.std(found["deltas"], ddof=1) / np.sqrt(3)
    assert without["over"] == "training seeds"
    assert without["high"] - without["delta"] == pytest.approx(half)


def test_the_mean_curve_of_seeds_has_students_interval(runs):
    curves = [learning_curves(read_folder(run).history) for run in runs[:3]]
    mine = [curve[(curve["name"] == HELD_OUT) & (curve["kind"] == VALIDATION)] for curve in curves]
    mine[0] = mine[0].iloc[:1]
    at, mean, half = mean_curve(mine, "images")
    values = [curve["value"].iloc[0] for curve in mine]
    assert at.tolist() == [16] and mean[0] == pytest.approx(np.mean(values))
    assert half[0] == pytest.approx(t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3))


def test_the_page_has_both_methods_against_images_and_time(compared):
    page = opened(compared)
    assert "ES (sigma 0.1) is ahead" in page.text
    assert page.text.count("images drawn in training") >= 2 and page.text.count("training time, seconds") >= 2
    assert "3 seeds" in page.text and "over prompts and training seeds" in page.text
    assert "base, 2 steps" in page.text and "es-trl compare" in page.text
    images = [a for a in page.of("img") if "data-row" in a]
    assert {a["data-row"] for a in images} == {"base", "m0", "m1"}
    assert page.text.index("3 seeds") < page.text.index("base, 2 steps")
    assert len(images) == 3 * len(PROMPTS)
    assert (compared.parent / "learning_curves.png").stat().st_size > 10000


def test_runs_on_different_prompts_are_not_ranked_together(runs, tmp_path):
    other = run_folder(tmp_path / "other", prompts=PROMPTS[:4])
    methods = group([read_folder(run) for run in (runs[0], other)])
    assert not same_protocol(methods) and same_protocol(group([read_folder(run) for run in runs]))
    page = opened(write_comparison([runs[0], other], tmp_path / "page", ["first", "second"]))
    assert "must not be compared" in page.text and "is ahead" not in page.text
    assert "No clear winner" not in page.text


def test_methods_stand_in_the_order_of_their_result_and_the_sentence_says_who_is_behind(runs, tmp_path):
    close = [run_folder(tmp_path / f"close{seed}", 30 + seed, gain=1.98 + 0.1 * seed, sigma=0.2) for seed in range(3)]
    order = [*runs[3:], *close, *runs[:3]]  # the weak method is given first
    labels = ["weak"] * 2 + ["close"] * 3 + ["strong"] * 3
    page = write_comparison(order, tmp_path / "page", labels)
    text = page.with_name("compare.md").read_text()
    first, *others = text.split("\n")
    leader = "strong" if "strong changes" in first else "close"
    assert first.startswith("weak is behind. Under tiny-clip-heldout, which training never saw, ")
    assert "cannot be told apart from it; behind it is weak by" in first
    assert first.partition(". ")[2].replace("-", "\u2212") in opened(page).text.replace("-", "\u2212"), "one sentence"
    rows = [line for line in others if line.startswith("|")][2:6]
    other = {"strong": "close", "close": "strong"}[leader]
    assert [row.split()[1].strip(",") for row in rows][:3] == [leader, other, "weak"] and "base" in rows[3]


def test_what_is_no_improvement_is_not_called_held_out(runs, tmp_path):
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs[:2]]
    for copy in copies:
        table = json.loads((copy / "eval.json").read_text())
        table["rewards"] = {HELD_OUT: {"rises_with_steps": False}, TRAINED: {"rises_with_steps": True}}
        (copy / "eval.json").write_text(json.dumps(table))
    text = write_comparison(copies, tmp_path / "page").with_name("compare.md").read_text()
    assert f"{HELD_OUT} (measured)" in text and "held out" not in text
    assert text.index(f"{TRAINED} (trained)") < text.index(f"{HELD_OUT} (measured)")
    page = " ".join((tmp_path / "page" / "index.html").read_text().split())
    assert f"{HELD_OUT} (measured)" in page and f"{HELD_OUT} (held out)" not in page, "the curves too"


def test_one_point_is_no_curve(runs, tmp_path):
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs[:2]]
    for copy in copies:
        state = json.loads((copy / "trainer_state.json").read_text())
        state["log_history"][0]["rewards/once/mean"] = 1.0
        (copy / "trainer_state.json").write_text(json.dumps(state))
    assert "once (" not in " ".join(write_comparison(copies, tmp_path / "page").read_text().split())


def test_the_headline_is_about_a_reward_that_every_method_was_measured_under(runs, tmp_path):
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs[3:]]
    for copy in copies:
        table = json.loads((copy / "eval.json").read_text())
        for row in table["rows"]:
            del row["rewards"][HELD_OUT]
        table["paired"] = [entry for entry in table["paired"] if entry["reward"] != HELD_OUT]
        (copy / "eval.json").write_text(json.dumps(table))
    text = write_comparison([*runs[:3], *copies], tmp_path / "page").with_name("compare.md").read_text()
    assert text.startswith(f"ES (sigma 0.1) is ahead. Under {TRAINED}, ")
    assert text.index(f"| {TRAINED} (trained)") < text.index(f"| {HELD_OUT} (held out)")


def test_one_run_each_is_too_few(runs, tmp_path):
    page = opened(write_comparison([runs[0], runs[3]], tmp_path / "page"))
    assert "Too few seeds to tell" in page.text and "is ahead" not in page.text


def test_runs_without_evaluation_or_without_log_still_stand_there(runs, tmp_path):
    bare, only = run_folder(tmp_path / "bare"), run_folder(tmp_path / "only", seed=5)
    (bare / "eval.json").unlink()
    (only / "trainer_state.json").unlink()
    page = opened(write_comparison([bare, only], tmp_path / "page", ["bare<b>", "only"]))
    assert "not evaluated" in page.text and "bare<b>" in page.text and HELD_OUT in page.text and TRAINED in page.text


def test_the_command_line(runs, tmp_path, capsys):
    target = tmp_path / "page"
    assert main(["compare", *map(str, runs[:2]), "--output_dir", str(target), "--labels", "a", "a"]) == 0
    assert str(target / "index.html") in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for wrong, message in ((tmp_path / "nowhere", "is not a folder"), (tmp_path / "empty", "neither an evaluation")):
        assert main(["compare", str(wrong), "--output_dir", str(target)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("es-trl compare: ") and message in error and "Traceback" not in error
    assert main(["compare", str(runs[0]), "--labels", "a", "b", "--output_dir", str(target)]) == 2
    assert "2 labels for 1 runs" in capsys.readouterr().err


def test_a_damaged_evaluation_costs_its_own_line_only(runs, tmp_path):
    folder = run_folder(tmp_path / "run")
    evaluation = json.loads((folder / "eval.json").read_text())
    evaluation["paired"] = None
    (folder / "eval.json").write_text(json.dumps(evaluation))
    page = opened(write_comparison([folder, runs[0]], tmp_path / "page", ["damaged", "whole"]))
    assert "not evaluated" in page.text and "whole" in page.text


def test_what_the_runs_watched_comes_before_what_only_the_evaluation_measured(runs, tmp_path):
    """The headline is about the first reward: it should be the one that was chosen as the held-out one."""
    copies = []
    for run in runs:
        copies.append(shutil.copytree(run, tmp_path / run.name))
        table = json.loads((run / "eval.json").read_text())
        for row in table["rows"]:
            row["rewards"] = {"a_bystander": row["rewards"][HELD_OUT]} | row["rewards"]
        table["paired"] += [e | {"reward": "a_bystander"} for e in table["paired"] if e["reward"] == HELD_OUT]
        (copies[-1] / "eval.json").write_text(json.dumps(table))
    page = write_comparison(copies, tmp_path / "page").read_text()
    assert "a_bystander" in page and f"Under {HELD_OUT}, which training never saw" in page
