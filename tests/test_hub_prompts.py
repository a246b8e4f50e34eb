"""Prompts from the Hub, over HTTP: configuration, split and revision, from Python and from a config file."""

import pytest
from loopback_hub import LoopbackHub, talk_to

from es_trl import ESTrainer
from es_trl.cli import load_config, prepare
from es_trl.data import load_prompts
from es_trl.pipelines import load_pipeline


README = b"""---
configs:
- config_name: plain
  data_files: [{split: train, path: plain.csv}, {split: test, path: test.csv}]
- config_name: hard
  data_files: [{split: train, path: hard.csv}]
---
"""


CONFIG = """
model_name_or_path: tiny-sana-sprint
reward_funcs: [jpeg_compressibility]
dataset_name: someone/prompts
dataset_config: hard
dataset_prompt_column: text
prompts_per_step: 2
report_to: none
use_cpu: true
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        talk_to(hub, monkeypatch, tmp_path / "cache")
        files = {"README.md": README, "plain.csv": b"text,tag\na cat,x\n", "test.csv": b"text,tag\na frog,y\n"}
        repo = hub.create("someone/prompts", "dataset", files=files | {"hard.csv": b"text\nnine cats\nten dogs\n"})
        hub.first = repo["branches"]["main"]
        hub.commit(repo, "main", {"hard.csv": b"text\neleven cats\ntwelve dogs\n"})
        yield hub


def test_configuration_split_and_revision(hub):
    options = {"column": "text", "name": "hard"}
    assert load_prompts("someone/prompts", **options)["prompt"][:] == ["eleven cats", "twelve dogs"]
    assert load_prompts("someone/prompts", revision=hub.first, **options)["prompt"][:] == ["nine cats", "ten dogs"]
    assert load_prompts("someone/prompts", "test", "text", name="plain")[0] == {"prompt": "a frog", "tag": "y"}
    with pytest.raises(ValueError, match="data set 'someone/prompts', split 'train': .*plain.*hard"):
        load_prompts("someone/prompts", column="text")


@pytest.mark.parametrize(("name", "revision"), [("someone/away", None), ("someone/prompts", "v9")])
def test_what_is_not_there_says_what_to_do(hub, name, revision):
    with pytest.raises(OSError, match=f"{name!r} cannot be loaded from the Hub.*give a local file"):
        load_prompts(name, revision=revision)


def test_a_config_file_pins_its_prompts(hub, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG + f"output_dir: {tmp_path / 'run'}\n")
    trainer = prepare(ESTrainer, *load_config(path, overrides=["--dataset_revision", hub.first]))
    assert trainer.train_dataset["prompt"][:] == ["nine cats", "ten dogs"]


@pytest.mark.parametrize("where", ["someone/model/resolve", "models/someone/model"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((403, "GatedRepo"), "'someone/model' is gated: accept the licence at http.*/someone/model and log in with"),
        ((401, "GatedRepo"), "'someone/model' is gated: accept the licence"),
        ((401, "RepoNotFound"), "no model 'someone/model' to this login: check the name, or if it is private log in"),
        ((404, "RepoNotFound"), "no model 'someone/model' to this login"),
    ],
)
def test_a_gated_or_private_base_model_says_what_to_do(hub, where, fault, message):
    hub.create("someone/model", "model", files={"model_index.json": b"{}"})
    hub.faults[where] = fault
    with pytest.raises(ValueError, match=message):
        load_pipeline("someone/model")
