"""An evaluation on disk: it goes on after an interruption, scores no image twice, and never mixes two protocols."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from es_trl.evaluation import EvaluationRow, evaluate
from es_trl.evaluation.fingerprint import weights_checksum
from es_trl.evaluation.journal import Journal
from es_trl.evaluation.rows import Draw
from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline
from es_trl.rewards import RewardSet


PROMPTS = ["a red cat", "two blue stars", "a green frog", "a yellow house", "a | `bad` <b>prompt</b>"]
CALL = CallSettings(num_inference_steps=1, guidance_scale=2.0, max_sequence_length=16)


class Counted:
    """Mean brightness, counting what it scored; fails after `limit` images."""

    __name__ = "brightness"

    def __init__(self):
        self.scored, self.limit = 0, math.inf

    def __call__(self, prompts, images, **kwargs):
        self.scored += len(images)
        if self.scored > self.limit:
            raise OSError("the machine is gone")
        return [float(np.asarray(image.convert("L"), np.float64).mean()) for image in images]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("tiny-sana-sprint")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two runs of one method: the file and the `es_config.json` that a run leaves."""
    folders = []
    for run in range(2):
        adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint"), settings=CALL)
        generator = torch.Generator().manual_seed(run)
        with torch.no_grad():
            for parameter in adapter.theta.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp(f"run{run}")
        adapter.save_lora(folder)
        config = {"guidance_scale": 2.0, "max_sequence_length": 16, "num_inference_steps": 1, "seed": run}
        ran = {"method": "es", "base_model": "tiny-sana-sprint", "reward_funcs": ["brightness"], "config": config}
        (folder / "es_config.json").write_text(json.dumps(ran))
        folders.append(str(folder))
    return folders


def table_of(folder):
    return json.loads((folder / "eval.json").read_text())


def without_times(table):
    for name in ("seconds", "batch_size"):
        table["protocol"].pop(name)
    return table


@pytest.fixture(scope="module")
def whole(pipe, adapters, tmp_path_factory):
    """The evaluation that nobody interrupted: two runs, 1 and 2 steps, best of 2, two LoRA scales."""
    folder, reward = tmp_path_factory.mktemp("whole"), Counted()
    result = evaluate(
        pipe, PROMPTS, RewardSet([reward, "jpeg_compressibility"]), adapters={"es": adapters}, best_of=[2],
        adapter_scales=[0.0, 0.5], output_dir=folder, save_images=3, resamples=200, batch_size=4,
        columns={"category": ["x", "x", "y", "y", "y"]},
    )  # fmt: skip
    return folder, result, reward


def test_every_row_is_there_and_shared_images_are_scored_once(whole):
    folder, result, reward = whole
    table = table_of(folder)
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == [
        "base@1", "es-1@1", "es-2@1", "base@2", "es-1@2", "es-2@2", "base@1 best of 2", "es-1@1 x0", "es-1@1 x0.5",
    ]  # fmt: skip
    assert [row["kind"] for row in rows.values()][-3:] == ["best_of", "scale", "scale"]
    assert rows["base@1 best of 2"]["images_drawn"] == 10 and rows["es-2@1"]["method"] == "es"
    assert reward.scored == 10 + 7 * 5 == table["protocol"]["images_drawn"]
    assert table["rewards"]["brightness"]["optimised"] and not table["rewards"]["jpeg_compressibility"]["optimised"]
    assert table["checks"]["scale_zero_equals_base"]["max_score_difference"] < 0.05
    best, base = result.of("base@1 best of 2", "brightness"), result.of("base@1", "brightness")
    assert (best >= base).all() and (best > base).any()
    assert table["adapters"][1]["rank"] == 8 and table["adapters"][1]["training"]["seed"] == 1
    over_runs = [entry for entry in table["methods"] if entry["against"] == "base@1"]
    assert {entry["reward"] for entry in over_runs} == {"brightness", "jpeg_compressibility"}
    assert all(entry["runs"] == 2 and len(entry["deltas"]) == 2 for entry in over_runs)
    groups = table["exploratory"]["entries"]
    assert {entry["value"]: entry["prompts"] for entry in groups} == {"x": 2, "y": 3}
    assert "looked at" in table["exploratory"]["note"]


def test_the_scores_and_pictures_are_on_disk(whole):
    folder, result, _ = whole
    scores = pd.read_parquet(folder / "scores.parquet")
    of_row = scores[scores["row"] == "es-2@1"].sort_values("prompt_index")
    np.testing.assert_array_equal(of_row["reward/brightness"], result.of("es-2@1", "brightness")[:, 0])
    chosen = scores[scores["row"] == "base@1 best of 2"]["image_index"]
    assert set(chosen) == {0, 1}
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS and lines[4]["category"] == "y"
    pictures = table_of(folder)["pictures"]
    assert [entry["kind"] for entry in pictures] == ["best", "typical", "worst"] * 2
    assert [entry["reward"] for entry in pictures] == ["jpeg_compressibility"] * 3 + ["brightness"] * 3
    assert pictures[3]["change"] > pictures[5]["change"]
    for entry in pictures:
        assert set(entry["files"]) == {row.name for row in result.rows}
        for file in entry["files"].values():
            assert Image.open(folder / file).size == (64, 64)
    page = (folder / "eval.md").read_text()
    assert "base@1 best of 2" in page and "<b>" not in page


def test_an_interrupted_evaluation_goes_on_and_scores_nothing_twice(whole, pipe, adapters, tmp_path):
    arguments = {
        "adapters": {"es": adapters}, "best_of": [2], "adapter_scales": [0.0, 0.5], "output_dir": tmp_path,
        "save_images": 3, "resamples": 200, "columns": {"category": ["x", "x", "y", "y", "y"]},
    }  # fmt: skip
    reward = Counted()
    reward.limit = 22
    rewards = RewardSet([reward, "jpeg_compressibility"])
    with pytest.raises(RuntimeError, match="the machine is gone"):
        evaluate(pipe, PROMPTS, rewards, batch_size=4, **arguments)
    assert not (tmp_path / "eval.json").exists()
    lines = sum(len(file.read_bytes().splitlines()) for file in (tmp_path / "journal").glob("*.jsonl"))
    torn = sorted((tmp_path / "journal").glob("es-1-1-*.jsonl"))[0]
    torn.write_bytes(torn.read_bytes()[:-9])  # the machine died in the middle of a line
    reward.scored, reward.limit = 0, math.inf
    evaluate(pipe, PROMPTS, rewards, batch_size=4, **arguments)
    assert reward.scored == 45 - (lines - 1)
    found, expected = without_times(table_of(tmp_path)), without_times(table_of(whole[0]))
    assert_close(found, expected)
    reward.scored = 0
    evaluate(pipe, PROMPTS, rewards, batch_size=4, **arguments)
    assert reward.scored == 0


def assert_close(found, expected, where=""):
    """Equal, numbers to 4 digits: what was drawn again was in another batch."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{where}[{i}]")
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-2), where
    else:
        assert found == expected, where


def test_another_protocol_in_the_folder_is_refused(whole, pipe, adapters):
    folder = whole[0]
    before = (folder / "eval.json").read_bytes()
    rewards = RewardSet([Counted(), "jpeg_compressibility"])
    columns = {"category": ["x", "x", "y", "y", "y"]}
    with pytest.raises(ValueError, match=r"prompts: .* -> .*another output_dir, or overwrite"):
        evaluate(pipe, [*PROMPTS[:4], "a dog"], rewards, adapters=adapters[0], output_dir=folder, columns=columns)
    with pytest.raises(ValueError, match=r"seeds: \[0\] -> \[1\]"):
        evaluate(pipe, PROMPTS, rewards, adapters=adapters[0], output_dir=folder, columns=columns, seed=1)
    with pytest.raises(ValueError, match="guidance_scale"):
        evaluate(pipe, PROMPTS, rewards, adapters=adapters[0], output_dir=folder, columns=columns,
                 settings=CallSettings(guidance_scale=3.0))  # fmt: skip
    assert (folder / "eval.json").read_bytes() == before


def test_overwrite_drops_the_scores(pipe, tmp_path):
    reward = Counted()
    rows = [EvaluationRow("base", adapter=False, num_inference_steps=1)]
    evaluate(pipe, PROMPTS[:2], reward, rows, output_dir=tmp_path, settings=CALL)
    evaluate(pipe, PROMPTS[:3], reward, rows, output_dir=tmp_path, settings=CALL, overwrite=True)
    assert reward.scored == 5 and table_of(tmp_path)["protocol"]["prompts"] == 3


def test_processes_share_a_journal_and_their_number_may_change(tmp_path):
    """Two processes wrote; one reads both, with features, and appends behind a torn line of its own."""
    draw = Draw("es", 1)
    first = Journal(tmp_path, {"seed": 0}, {"es": "abc"}, process_index=0)
    second = Journal(tmp_path, {"seed": 0}, {"es": "abc"}, process_index=1)
    features = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    first.append(draw, [(0, 0), (2, 0)], np.array([[1.5, np.nan], [0.1, np.inf]]), features)
    second.append(draw, [(1, 0), (3, 0)], np.array([[2.0, 3.0], [4.0, 5.0]]), features)
    file = tmp_path / "es-1-abc.0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    first.append(draw, [(4, 0)], np.array([[7.0, 8.0]]), features[:1])
    known = first.read(draw, features=True)
    assert sorted(known) == [(0, 0), (1, 0), (3, 0), (4, 0)]
    np.testing.assert_array_equal(known[3, 0][1], features[1])
    np.testing.assert_array_equal(known[0, 0][0], [1.5, np.nan])
    other = Journal(tmp_path, {"seed": 0}, {"es": "def"})
    assert other.read(draw, features=True) == {}, "another adapter under the same label has nothing yet"


def test_checksum_sees_one_changed_bit_and_no_device():
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": weights["b"].clone(), "a": weights["a"].clone()}
    changed = {"a": weights["a"] + torch.tensor([0, 0, 0, 0, 0, 1e-6]), "b": weights["b"]}
    assert weights_checksum(weights.items()) == weights_checksum(same.items())
    assert weights_checksum(weights.items()) != weights_checksum(changed.items())
