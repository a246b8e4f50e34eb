"""What rewards say through `log_extra` stands in a table beside the run, in the trackers, for every method."""

import json
from pathlib import Path

import pandas
import pytest
from forks import ranks
from tiny_policies import tiny_policy
from tiny_runs import PROMPTS, brightness, redness, tiny_trainer

from es_trl.report import write_report
from es_trl.run.image_table import ImageTable, write_table
from es_trl.run.processes import Peers


def talkative(prompts, images, log_extra, **_):
    """Redness, and a caption and the length of the prompt for every image."""
    scores = redness(images)
    log_extra("caption", [f"{prompt}: {score:.3f}" for prompt, score in zip(prompts, scores, strict=True)])
    log_extra("length", [len(prompt) for prompt in prompts])
    return scores


def tables(folder: Path) -> dict[str, pandas.DataFrame]:
    return {path.name: pandas.read_parquet(path) for path in sorted((folder / "images").glob("*.parquet"))}


def check(table: pandas.DataFrame, step: int):
    """Every row has its own prompt, its own rewards, and what was said of that very image."""
    assert (table["step"] == step).all() and set(table["prompt"]) <= set(PROMPTS)
    for row in table.to_dict("records"):
        assert row["caption"] == f"{row['prompt']}: {row['talkative']:.3f}" and row["length"] == len(row["prompt"])
    assert table["brightness"].notna().all()


@pytest.mark.parametrize("groups", [{}, {"prompts_per_member": 1, "population_size": 4}])
def test_es_writes_a_table_at_every_log(tmp_path, groups):
    trainer = tiny_trainer(
        tmp_path, [talkative, brightness], max_steps=4, logging_steps=2, members_per_forward=2, **groups
    )
    trainer.train()
    found = tables(tmp_path)
    assert list(found) == ["images_000002.parquet", "images_000004.parquet"]
    for step, table in zip((2, 4), found.values(), strict=True):
        check(table, step)
        assert len(table) == trainer.images_per_batch and sorted(set(table["member"])) == [0, 1, 2, 3]
        assert table.groupby("member")["fitness"].nunique().max() == 1


@pytest.mark.parametrize(("method", "own"), [("grpo", {"image", "advantage"}), ("dpo", {"image"})])
def test_every_method_writes_one(tmp_path, method, own):
    trainer = tiny_policy(tmp_path, method, [talkative, brightness], max_steps=1)
    trainer.train()
    (table,) = tables(tmp_path).values()
    check(table, 1)
    assert own <= set(table.columns) and len(table) == 6 and set(table["image"]) == {0, 1, 2}


def test_the_page_shows_what_was_said_and_runs_nothing_of_it(tmp_path):
    def hostile(images, log_extra, **_):
        log_extra("says", ["<script>alert(1)</script>"] * len(images))
        return redness(images)

    trainer = tiny_trainer(tmp_path, hostile, max_steps=1)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    page = Path(write_report(tmp_path)).read_text()
    assert "What the rewards said" in page and "8 of 8 rows" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>alert(1)" not in page


def test_without_log_extra_there_is_no_table(tmp_path):
    tiny_trainer(tmp_path, max_steps=1).train()
    assert not (tmp_path / "images").exists()


def test_another_number_of_values_ends_the_run_and_says_where(tmp_path):
    def short(images, log_extra, **_):
        log_extra("caption", ["only one"])
        return redness(images)

    with pytest.raises(
        RuntimeError, match=r"short.*step 0.*log_extra\('caption', ...\) was given 1 values for 8 images"
    ):
        tiny_trainer(tmp_path, short, max_steps=1).train()


def test_accumulated_batches_are_all_there_and_an_async_reward_may_speak(tmp_path):
    async def slow(prompts, images, log_extra, **_):
        return talkative(prompts, images, log_extra)

    slow.__name__ = "talkative"
    trainer = tiny_trainer(tmp_path, [slow, brightness], max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    (table,) = tables(tmp_path).values()
    check(table, 1)
    assert len(table) == 2 * trainer.images_per_batch


def test_a_column_of_several_kinds_is_text(tmp_path):
    table = ImageTable(["r"])
    log_extra = table.extras(0, 0)([(0, 0), (0, 1), (0, 2), (0, 3)])
    log_extra("mixed", [1, "two", None, {"three": [3]}])
    log_extra("number", [float("nan"), 2**70, 0.5, 1])
    table.add(0, [[[1.0], [2.0], [3.0], [4.0]]], prompt=[["a", "b", "c", "d"]])
    write_table(tmp_path / "t.parquet", table.rows(1, Peers()))
    found = pandas.read_parquet(tmp_path / "t.parquet")
    assert found["mixed"].tolist()[:2] == ["1", "two"] and json.loads(found["mixed"][3]) == {"three": [3]}
    assert found["r"].tolist() == [1, 2, 3, 4] and found["number"].isna()[0]


def test_a_tracker_gets_the_first_rows(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = tiny_trainer(tmp_path / "run", [talkative, brightness], max_steps=1, report_to="wandb")
    try:
        trainer.train()
    finally:
        wandb.finish()
        wandb.teardown()  # else its service keeps this folder for the tests after this one
    (file,) = (tmp_path / "wandb").rglob("images_*.table.json")
    sent = json.loads(file.read_text())
    assert (
        sent["columns"] == list(tables(tmp_path / "run")["images_000001.parquet"].columns) and len(sent["data"]) == 8
    )


def train_talking(folder: Path) -> None:
    tiny_trainer(folder, [talkative, brightness], max_steps=2, members_per_forward=1).train()


def test_two_processes_write_the_table_of_one(tmp_path):
    train_talking(tmp_path / "one")
    codes, outputs = ranks(2, train_talking, tmp_path / "two", folder=tmp_path)
    assert codes == [0, 0], outputs
    one, two = tables(tmp_path / "one"), tables(tmp_path / "two")
    assert list(one) == list(two)
    for name in one:
        pandas.testing.assert_frame_equal(one[name], two[name])
