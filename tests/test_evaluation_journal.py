"""An evaluation on disk: an earlier one steps aside; finished rows are taken again only where that is asked for."""

import dataclasses
import functools
import json
import math
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from forks import fork, wait
from PIL import Image
from tiny_pipelines import sana

from es_trl.cli import commands
from es_trl.evaluation import EvaluationRow, evaluate
from es_trl.evaluation.journal import Journal
from es_trl.lock import FolderInUse
from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline
from es_trl.rewards import RewardSet


PROMPTS = ["a red cat", "two blue stars", "a green frog", "a yellow house", "a | `bad` <b>prompt</b>"]
CALL = CallSettings(1, 2.0, height=32, width=32, max_sequence_length=16)


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
        config |= {"height": 32, "width": 32}
        ran = {"method": "es", "base_model": "tiny-sana-sprint", "reward_funcs": ["brightness"], "config": config}
        (folder / "es_config.json").write_text(json.dumps(ran))
        folders.append(str(folder))
    return folders


def table_of(folder):
    return json.loads((folder / "eval.json").read_text())


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
            assert Image.open(folder / file).size == (32, 32)
    page = (folder / "eval.md").read_text()
    assert "base@1 best of 2" in page and "<b>" not in page


def evaluate_and_die(words: list[str]) -> None:
    """`kill -9` before the second row is on disk."""
    write = Journal.write

    def write_then_die(self, draw, *arrays):
        if draw.weights == "es-2":
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, draw, *arrays)

    Journal.write = write_then_die
    commands.main(words)


def test_a_killed_command_goes_on_with_resume_and_gives_the_undisturbed_table(adapters, tmp_path, capsys, caplog):
    """The first row is taken, the others are drawn; the same table."""
    common = ["eval", "--adapter", f"es={adapters[0]}", f"es={adapters[1]}", "--prompts", "tiny-test",
              "--images_per_prompt", "2", "--rewards", "jpeg_compressibility,tiny-pickscore",
              "--trained_rewards", "jpeg_compressibility", "--best_of", "2", "--use_cpu",
              "--judge", "tiny-clip-heldout", "--save_images", "2"]  # fmt: skip
    command = [*common, "--max_prompts", "2", "--steps", "1", "2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = fork(evaluate_and_die, [*command, "--output_dir", str(killed)], output=tmp_path / "killed.log")
    assert wait(process) == -signal.SIGKILL
    assert sorted(path.name for path in (killed / "journal").iterdir()) == [
        "base-1.safetensors", "es-1-1.safetensors", "settings.json",
    ]  # fmt: skip
    assert commands.main([*command, "--output_dir", str(whole)]) == 0
    written = {path: path.stat().st_mtime_ns for path in (killed / "journal").iterdir()}
    with caplog.at_level("INFO", logger="es_trl"):
        assert commands.main([*command, "--output_dir", str(killed), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a finished row was drawn again"
    taken = [record.getMessage() for record in caplog.records if "taken from" in record.getMessage()]
    assert [text.partition(":")[0] for text in taken] == ["base-1", "es-1-1"]
    tables = []
    for folder in (killed, whole):
        table = table_of(folder)
        del table["protocol"]["seconds"], table["protocol"]["command"]
        tables.append(table)
        assert len(list((folder / "images").rglob("*.jpg"))) == len(list((whole / "images").rglob("*.jpg")))
    assert tables[0] == tables[1]
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "scores.parquet") for folder in (killed, whole)))

    caplog.clear()  # without the flag it starts afresh, and says so
    less = [*common, "--max_prompts", "1", "--steps", "1"]
    assert commands.main([*less, "--output_dir", str(killed)]) == 0
    assert "holds an earlier evaluation: it is now" in caplog.text and "starts afresh" in caplog.text
    assert (killed / "earlier-1" / "eval.json").is_file() and (killed / "earlier-1" / "journal").is_dir()

    assert commands.main([*less, "--output_dir", str(killed), "--resume", "--seeds", "1"]) == 2
    assert "seeds: [0] -> [1]" in capsys.readouterr().err
    assert commands.main([*command, "--output_dir", str(tmp_path / "nothing"), "--resume"]) == 2
    assert "holds no evaluation to go on with" in capsys.readouterr().err


def mean_channel(images, channel=0):
    return [float(np.asarray(image.convert("RGB"))[:, :, channel].mean()) for image in images]


class Channel:
    __name__ = "mean_channel"

    def __init__(self, channel):
        self.channel = channel

    def __call__(self, images, **_):
        return mean_channel(images, self.channel)


def closure_over(channel):
    def mean_channel_of(images):
        return mean_channel(images, channel)

    return mean_channel_of


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (functools.partial(mean_channel, channel=0), functools.partial(mean_channel, channel=2)),
        (closure_over(0), closure_over(2)),
        (Channel(0), Channel(2)),
        (Channel(0).__call__, Channel(2).__call__),
    ],
    ids=["partial", "closure", "object", "method"],
)
def test_a_second_evaluation_in_the_folder_scores_its_own_pictures(pipe, tmp_path, first, second):
    """No function, however alike, server, scheduler or column gives its scores to another evaluation."""
    options = {"steps": [1], "settings": CALL, "save_images": 0, "resamples": 10}
    evaluate(pipe, PROMPTS[:2], first, output_dir=tmp_path, **options)
    again = evaluate(pipe, PROMPTS[:2], second, output_dir=tmp_path, **options)
    np.testing.assert_array_equal(
        again.scores["base@1"], evaluate(pipe, PROMPTS[:2], second, **options).scores["base@1"]
    )
    assert (tmp_path / "earlier-1" / "eval.json").is_file()


def test_resume_compares_every_setting_by_its_value(pipe, tmp_path):
    """Columns with arrays and pictures, the scheduler, the reward's file: equal ones go on, others are named."""
    file = tmp_path / "mine.py"
    file.write_text("def mine(images, **_):\n    return [1.0] * len(images)\n")
    options = {"steps": [1], "settings": CALL, "save_images": 0, "resamples": 10, "output_dir": tmp_path / "eval"}

    def columns(value=0.0, colour="red"):
        arrays = [np.zeros(5000), np.zeros(5000)]
        arrays[1][2500] = value
        return {"array": arrays, "picture": [{"of": Image.new("RGB", (4, 4), colour)}] * 2, "text": ["a", None]}

    evaluate(pipe, PROMPTS[:2], f"{file}:mine", columns=columns(), **options)
    result = evaluate(pipe, PROMPTS[:2], f"{file}:mine", columns=columns(), resume=True, **options)
    assert (result.scores["base@1"] == 1.0).all()
    for changed, name in (
        ({"columns": columns(value=7.0)}, "columns"),
        ({"columns": columns(colour="blue")}, "columns"),
        ({"columns": columns() | {"text": ["a", "b"]}}, "columns"),
        ({"columns": columns(), "batch_size": 3}, "batch_size: 16 -> 3"),
        ({"columns": columns(), "images_per_prompt": 2}, "images_per_prompt: 1 -> 2"),
        ({"columns": columns(), "settings": dataclasses.replace(CALL, guidance_scale=3.0)}, "guidance_scale"),
    ):
        with pytest.raises(ValueError, match=f"holds another evaluation .*{name}"):
            evaluate(pipe, PROMPTS[:2], f"{file}:mine", resume=True, **(options | changed))
    with pytest.raises(ValueError, match="column 'odd' holds values that cannot be compared"):
        evaluate(pipe, PROMPTS[:2], f"{file}:mine", columns={"odd": [object(), 1]}, resume=True, **options)
    file.write_text("def mine(images, **_):\n    return [2.0] * len(images)\n")
    with pytest.raises(ValueError, match="holds another evaluation .*rewards: .*sha256"):
        evaluate(pipe, PROMPTS[:2], f"{file}:mine", columns=columns(), resume=True, **options)


def test_resume_notices_another_scheduler(tmp_path):
    pipe = sana()
    options = {"steps": [2], "settings": CallSettings(guidance_scale=2.0, max_sequence_length=None), "save_images": 0,
               "resamples": 10, "output_dir": tmp_path}  # fmt: skip
    evaluate(pipe, PROMPTS[:1], "jpeg_compressibility", **options)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
    with pytest.raises(ValueError, match="holds another evaluation .*scheduler"):
        evaluate(pipe, PROMPTS[:1], "jpeg_compressibility", resume=True, **options)


def test_resume_notices_other_weights_of_a_pipeline_in_memory(tmp_path):
    pipe = sana()
    options = {"steps": [2], "settings": CallSettings(guidance_scale=2.0, max_sequence_length=None), "save_images": 0,
               "resamples": 10, "output_dir": tmp_path}  # fmt: skip
    evaluate(pipe, PROMPTS[:1], "jpeg_compressibility", **options)
    evaluate(pipe, PROMPTS[:1], "jpeg_compressibility", resume=True, **options)
    weight = pipe.transformer.proj_out.weight
    weight.data = weight.data.flip(0)  # permuted
    with pytest.raises(ValueError, match="'jpeg_compressibility' now gives .* the model, the reward or its server"):
        evaluate(pipe, PROMPTS[:1], "jpeg_compressibility", resume=True, **options)


def test_resume_notices_another_reward_of_the_same_name(tmp_path, pipe):
    options = {"steps": [1], "settings": CALL, "save_images": 0, "resamples": 10, "output_dir": tmp_path}

    def share(images, channel):
        return [float(np.asarray(image)[..., channel].mean()) for image in images]

    evaluate(pipe, PROMPTS[:2], functools.partial(share, channel=0), **options)
    evaluate(pipe, PROMPTS[:2], functools.partial(share, channel=0), resume=True, **options)
    with pytest.raises(ValueError, match="'share' now gives"):
        evaluate(pipe, PROMPTS[:2], functools.partial(share, channel=2), resume=True, **options)


def test_two_evaluations_at_once_in_one_folder(tmp_path, pipe):
    options = {"steps": [1], "settings": CALL, "save_images": 0, "resamples": 10, "output_dir": tmp_path}
    refused = []

    def second(images):
        with pytest.raises(FolderInUse, match="writes into it. Give another output_dir"):
            evaluate(pipe, PROMPTS[:1], mean_channel, **options)
        refused.append(True)
        return mean_channel(images)

    evaluate(pipe, PROMPTS[:1], second, **options)
    assert refused and not (tmp_path / "eval.lock").exists() and not (tmp_path / "earlier-1").exists()


def test_a_reward_that_compares_pictures_sees_a_prompt_whole_whatever_the_batch_size(pipe):
    def table(batch_size, **options):
        result = evaluate(pipe, PROMPTS[:3], ["pairwise:tiny-pickscore", relative], steps=[1], settings=CALL,
                          images_per_prompt=3, batch_size=batch_size, resamples=10, **options)  # fmt: skip
        return result.scores["base@1"]

    def relative(images, groups):
        values = mean_channel(images)
        return [v - max(w for w, h in zip(values, groups, strict=True) if h == g)
                for v, g in zip(values, groups, strict=True)]  # fmt: skip

    relative.groupwise = True
    whole = table(16)
    assert np.isfinite(whole).all() and (whole[:, :, 1].max(axis=1) == 0).all()
    for batch_size in (1, 2, 3, 4, 7):
        np.testing.assert_allclose(table(batch_size), whole, atol=2e-3)


@pytest.mark.parametrize("options", [{"max_prompts": -1}, {"max_prompts": 0}, {"n_keep": -1}, {"resamples": -1},
                                     {"save_images": -1}, {"batch_size": -1}, {"images_per_prompt": -1},
                                     {"steps": []}, {"seed": 1.5}])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evaluate("no-such-model", PROMPTS, "jpeg_compressibility", **options)


def test_a_row_of_a_model_by_name_says_which_adapter():
    with pytest.raises(ValueError, match="row 'adapter' names no adapter"):
        evaluate("no-such-model", PROMPTS, "jpeg_compressibility", rows=[EvaluationRow("adapter")])


def test_prompts_and_columns_that_no_file_takes_are_refused_before_a_model_loads():
    cut = "cut \ud83d"
    with pytest.raises(ValueError, match="the prompt of the evaluation, row 1 holds half of a surrogate pair"):
        evaluate("no-such-model", ["a", cut], "jpeg_compressibility")
    with pytest.raises(ValueError, match="column 'x', row 0, holds half of a surrogate pair"):
        evaluate("no-such-model", ["a"], "jpeg_compressibility", columns={"x": [{"deep": [cut]}]})


def test_a_nan_in_a_column_is_null_in_the_file(pipe, tmp_path):
    columns = {"x": [math.nan, 1.0], "seed": [2**64 - 1, 2**70]}
    evaluate(pipe, PROMPTS[:2], "jpeg_compressibility", columns=columns, steps=[1], settings=CALL, save_images=0,
             resamples=10, output_dir=tmp_path)  # fmt: skip

    def refuse(text):
        raise AssertionError(text)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["x"] for line in lines] == [None, 1.0] and [line["seed"] for line in lines] == columns["seed"]
