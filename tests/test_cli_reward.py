"""`es-trl reward`: what it says of rewards that work, and of those that would spoil a run."""

import json
import re
import time

import numpy as np
import pytest

from es_trl.cli import main
from es_trl.rewards import CATALOGUE, REWARD_NAMES


MINE = """
import random
def brightness(prompts, images, **_):
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]
def constant(images):
    return [0.5] * len(images)
def noisy(images):
    return [random.random() for _ in images]
def relative(prompts, images):
    values = brightness(prompts, images)
    return [value - max(values) for value in values]
def short(images):
    return [1.0]
def silent(images):
    return [None] * len(images)
def broken(images):
    raise KeyError("model")
def length(prompts, images):
    reds = [image.getpixel((image.width // 2, 8))[0] for image in images]
    return [len(prompt) + 100 * red for prompt, red in zip(prompts, reds)]
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:"


def test_list_names_every_reward_once(capsys):
    assert main(["reward", "list"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert sorted(shown) == sorted(REWARD_NAMES) == sorted(entry.name for entry in CATALOGUE)


@pytest.mark.parametrize(
    ("function", "options", "code", "said"),
    [
        ("brightness", ["--strict"], 0, "note: the prompt makes no difference to the score"),
        ("constant", [], 0, "warning: the score is the same for every picture of a prompt"),
        ("constant", ["--strict"], 1, "warning: the score is the same"),
        ("noisy", ["--strict"], 1, "warning: a second call on the same pictures gave other scores"),
        ("relative", ["--strict"], 1, "warning: a picture's score depends on what else is in the call"),
        ("silent", [], 1, "failure: no picture got a score"),
    ],
)
def test_what_is_said_of_a_function(mine, capsys, function, options, code, said):
    assert main(["reward", "check", mine + function, "--size", "32", *options]) == code
    out = capsys.readouterr().out
    assert said in out
    assert out.count("warning:") + out.count("failure:") == (said[:4] != "note")


@pytest.mark.parametrize(
    ("spec", "code", "said"),
    [
        ("short", 1, "'short' at the first call must return a list .* 8 here, but returned 1 of them"),
        ("broken", 1, "'broken' failed at the first call .*KeyError: 'model'"),
        ("brightnes", 2, "no function 'brightnes': did you mean 'brightness'"),
    ],
)
def test_a_function_that_fails_is_one_line(mine, capsys, spec, code, said):
    assert main(["reward", "check", mine + spec]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("es-trl reward: ")
    assert re.search(said, error)


@pytest.mark.parametrize(("spec", "code"), [("pikscore", 2), ("remote:ftp://x", 2), ("hpsv2", 1)])
def test_names_that_cannot_work(capsys, spec, code):
    assert main(["reward", "check", spec]) == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [["reward"], ["reward", "check"], ["reward", "check", "ocr", "--size", "0"]])
def test_arguments_that_cannot_work(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2


def test_the_numbers(mine, capsys):
    argv = ["reward", "check", mine + "length", "--prompt", "ab", "--prompt", "abcde", "--size", "64", "--json"]
    started = time.perf_counter()
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    scores = np.array(report["scores"])
    assert scores.shape == (2, 4) and (scores[1] - scores[0] == 3).all()
    assert (report["min"], report["max"]) == (scores.min(), scores.max())
    assert report["spread_over_prompts"] == 3 and report["spread_over_pictures"] == np.ptp(scores[0])
    assert report["largest_change_when_repeated"] == report["largest_change_one_by_one"] == report["missing"] == 0
    assert 0 < report["milliseconds_per_image"] * 8 / 1000 < time.perf_counter() - started
    assert report["failures"] == report["warnings"] == report["notes"] == []
