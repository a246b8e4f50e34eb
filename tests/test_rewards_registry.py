"""Rewards by name: what a string means, and that mistakes are found before a model is loaded."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from es_trl import assets
from es_trl.rewards import REWARD_NAMES, RewardSet, parse_reward


LOCAL_NAMES = [name for name in REWARD_NAMES if name not in ("remote", "vlm_judge")]


@pytest.fixture
def no_models(monkeypatch):
    """Any attempt to load a checkpoint fails the test."""
    monkeypatch.setattr("es_trl.rewards.clip_features._load", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("pikscore", "did you mean 'pickscore'"),
        ("PICKSCORE", "did you mean 'pickscore'"),
        ("tiny-pikscore", "did you mean 'tiny-pickscore'"),
        ("jpeg_compresibility", "did you mean 'jpeg_compressibility'"),
        ("clip_txt:tiny-pickscore", "did you mean 'clip_text'"),
        ("clip_text:tiny-clip-held", "did you mean 'tiny-clip-heldout'"),
        ("xyz", "Known are clip_text, .*tiny-pickscore.*'org/name'"),
        ("", "is unknown"),
        ("clip_text:", "is unknown"),
        ("jpeg_compressibility:tiny-pickscore", "takes no checkpoint"),
        ("./nowhere/clip", "there is no folder"),
        ("/nowhere/clip", "there is no folder"),
        ("tiny-sana-sprint", "no config.json"),
        ("rewards.py", "name the function too"),
        ("nowhere.py:f", "there is no file"),
        ("hpsv2:nowhere", "neither a folder nor a Hub id"),
        ("image_reward:./nowhere", "neither a folder nor a Hub id"),
        ("human:all", "human:PORT with a port such as 8123"),
        ("remote", "needs an address: remote:https"),
        ("remote:", "needs an address"),
        ("remote:ftp://host/x", "must start with https"),
        ("remote:http://example.com/x", "is not this machine"),
        ("remote:https://me:secret@example.com/x", "user name or password"),
        ("remote:https://host:port/x", "cannot be read"),
        ("vlm_judge", "needs an address: vlm_judge:MODEL@"),
        ("vlm_judge:https://host/v1", "needs an address"),
        ("vlm_judge:a-model@http://10.0.0.1/v1", "is not this machine"),
    ],
)
def test_unknown_reward_is_refused_before_loading(spec, hint, no_models):
    with pytest.raises(ValueError, match=hint) as error:
        RewardSet(["pickscore", spec])
    assert "reward_funcs" in str(error.value)


def test_names_in_metrics(no_models, tmp_path):
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    specs = [
        *LOCAL_NAMES,
        "clip_text:tiny-clip-heldout",
        "tiny-pickscore",
        "tiny-clip-heldout",
        "openai/clip-vit-large-patch14",
        f"{folder}/",
        "remote:https://example.com/score",
        "vlm_judge:Qwen/a-model:7b@http://127.0.0.1:8000/v1",
        "vlm_judge:score:a-model@https://example.com/v1",
        "vlm_judge:pairwise:a-model@https://example.com/v1/",
    ]
    expected = [*LOCAL_NAMES, "clip_text_2", "tiny-pickscore", "tiny-clip-heldout", "clip-vit-large-patch14", "judge"]
    expected += ["remote", "vlm_judge", "vlm_judge_score", "vlm_judge_pairwise"]
    assert RewardSet(specs).names == expected


def test_what_a_judge_is_asked_for():
    judge = parse_reward("vlm_judge:score:Qwen/a-model:7b@http://127.0.0.1:8000/v1").build("cpu", None)
    assert (judge.model, judge.mode) == ("Qwen/a-model:7b", "score")
    assert judge.endpoint.url == "http://127.0.0.1:8000/v1/chat/completions"
    assert parse_reward("vlm_judge:m@https://example.com/v1").build("cpu", None).mode == "yes_no"


@pytest.mark.parametrize("name", ["clip_text", "clip_aesthetic", "no_artifacts", "pickscore", "pairwise"])
def test_every_clip_name_takes_a_checkpoint(name):
    reward = parse_reward(f"{name}:tiny-pickscore").build("cpu", None)
    assert reward.__name__ == name
    assert reward.scorer.checkpoint == "tiny-pickscore"
    assert len(reward(prompts=["a cat"], images=[Image.new("RGB", (64, 64))])) == 1


def test_default_checkpoints_are_the_documented_ones(monkeypatch):
    asked = []

    def record(checkpoint, processor):
        asked.append((checkpoint, processor))
        raise OSError("offline")

    monkeypatch.setattr("es_trl.rewards.clip_features._load", record)
    for name in ("clip_text", "clip_aesthetic", "no_artifacts", "pickscore"):
        with pytest.raises(OSError, match="offline"):
            RewardSet(name).load()
    with pytest.raises(OSError, match="offline"):
        RewardSet("pairwise").load()
    assert asked.pop()[0] == "yuvalkirstain/PickScore_v1"
    vit_b = ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32")
    assert asked == [vit_b] * 3 + [("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")]


def test_function_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Width:\n"
        "    factor: float\n"
        "    def __call__(self, images, prompts):\n"
        "        return [self.factor * image.width for image in images]\n"
        "def brightness(images, prompts):\n"
        "    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]\n"
        "half_width = Width(0.5)\n"
    )
    rewards = RewardSet([f"{file}:brightness", f"{file}:half_width"])
    assert rewards.names == ["brightness", "half_width"]
    images = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (32, 64), "black")]
    assert rewards(["", ""], images).tolist() == [[1.0, 32.0], [0.0, 16.0]]
    with pytest.raises(ValueError, match="no function 'brightnes': did you mean 'brightness'"):
        RewardSet(f"{file}:brightnes")
    with pytest.raises(ValueError, match="no function 'Width'"):
        RewardSet(f"{file}:Width")


def test_file_that_does_not_import_is_named_with_its_error(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import module_that_does_not_exist\n")
    with pytest.raises(ValueError, match="broken.py' failed while it was imported: ModuleNotFoundError"):
        RewardSet(f"{file}:f")


def test_every_shipped_scorer_is_a_reward():
    for name in ("tiny-pickscore", "tiny-clip-heldout"):
        assert name in assets.SHIPPED
        assert parse_reward(name).name == name


def test_a_file_of_rewards_is_utf8_whatever_the_locale(tmp_path):
    """With and without a byte-order mark, under a name that is not ASCII either."""
    text = 'def mine(prompts, images, **_):\n    return [float(len("caf\u00e9 \u732b"))] * len(images)\n'
    for encoding in ("utf-8", "utf-8-sig"):
        file = tmp_path / f"r\u00e9compense_{encoding}.py"
        file.write_text(text, encoding=encoding)
        code = "import sys; from es_trl.rewards import RewardSet; print(RewardSet(sys.argv[1])(['p'], [None])[0, 0])"
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        found = subprocess.run([sys.executable, "-c", code, f"{file}:mine"], capture_output=True, env=environment)
        assert found.stdout.strip() == b"6.0", found.stderr
