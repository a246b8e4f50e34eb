"""Tokens stay where they are (F23), and what others wrote is read as data only (F24)."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS, files_in
from toy_runs import redness, toy_trainer, train

from es_trl.run import CheckpointCorrupt
from es_trl.run.checkpoint import fingerprint


CANARY = "hf_" + "CaNaRy" * 6


def test_f23_a_token_is_nowhere_in_what_a_run_leaves(tmp_path, monkeypatch, caplog, capfd):
    """In the environment, in settings, and in the text of an error; searched in every byte of every file."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    def leaking(images, trainer_state=None, **_):
        if trainer_state is not None and trainer_state.global_step == 2:
            raise OSError(f"401 Client Error for https://user:secret@host/x with {CANARY}")
        return redness(images)

    options = {"run_name": f"tokens {CANARY}", "hub_model_id": "me/x", "report_to": "tensorboard", "sample_steps": 1,
               "eval_dataset": PROMPTS[:2], "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}  # fmt: skip
    trainer = toy_trainer(tmp_path / "run", leaking, **options)
    with pytest.raises(RuntimeError, match="401"):
        trainer.train()
    trainer.save_model()
    names = files_in(tmp_path)
    assert any("events.out" in name for name in names) and "run/README.md" in names and "run/journal.jsonl" in names
    for name in names:
        assert CANARY.encode() not in (tmp_path / name).read_bytes(), name
    captured = capfd.readouterr()
    assert CANARY not in captured.out + captured.err + caplog.text


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder, max_steps=2)
    return folder


def reseal(checkpoint, drop=()):
    """A manifest that fits, as someone would write who changes a checkpoint on purpose."""
    names = [name for name in files_in(checkpoint) if name != "MANIFEST.json" and name not in drop]
    (checkpoint / "MANIFEST.json").write_text(json.dumps({name: fingerprint(checkpoint / name) for name in names}))


def replace(name, content):
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def huge_header(checkpoint):
    data = (checkpoint / "es_state.safetensors").read_bytes()
    (checkpoint / "es_state.safetensors").write_bytes((2**62).to_bytes(8, "little") + data[8:])


def not_listed(checkpoint):
    secret = checkpoint.parent / "secret.json"
    secret.write_text("{}")
    (checkpoint / "optimizer.json").unlink()
    (checkpoint / "optimizer.json").symlink_to(secret)
    reseal(checkpoint, drop=("optimizer.json",))


def another_shape(checkpoint):
    tensors = load_file(checkpoint / "es_state.safetensors")
    tensors["optimizer.0.momentum_buffer"] = torch.zeros(99)
    save_file(tensors, checkpoint / "es_state.safetensors")


NESTED = b"[" * 100_000
CRAFTED = {
    "a header larger than the file": huge_header,
    "a state file outside the manifest": not_listed,
    "settings that are a list": replace("es_config.json", b"[]"),
    "settings without a config": replace("es_config.json", b'{"base_model": "toy"}'),
    "brackets without end": replace("es_config.json", NESTED),
    "an optimizer that is no JSON": replace("optimizer.json", b"\x80\x04K\x01."),
    "an optimizer of another kind": replace("optimizer.json", b'{"state": {}, "param_groups": []}'),
    "an optimizer that is a number": replace("optimizer.json", b"7"),
    "a trainer state with other fields": replace("trainer_state.json", b'{"global_step": 2, "__class__": "x"}'),
    "a trainer state with a text for the step": replace("trainer_state.json", b'{"global_step": "2"}'),
    "a trainer state that is no JSON": replace("trainer_state.json", b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_f24_crafted_checkpoints_are_refused(tmp_path, finished, kind):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    CRAFTED[kind](checkpoint)
    if kind != "a state file outside the manifest":
        reseal(checkpoint)
    trainer = toy_trainer(folder, max_steps=3)
    with pytest.raises(CheckpointCorrupt):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not os.path.exists(tmp_path / "marker")


def test_remote_code_is_off(monkeypatch):
    """No call of the library asks for it, and a model that needs it is not loaded."""
    from diffusers import DiffusionPipeline

    from es_trl.pipelines import load_pipeline

    asked = {}

    def from_pretrained(source, **kwargs):
        asked.update(kwargs)
        raise OSError("enough seen")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="enough seen"):
        load_pipeline("some/model")
    assert asked["use_safetensors"] is True and not asked.get("trust_remote_code")


def test_a_link_to_another_folder_is_not_followed(tmp_path, finished):
    """The manifest fits; the file it names lies outside."""
    import shutil

    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, folder)
    outside.mkdir()
    (outside / "passwd").write_text("root")
    (folder / "checkpoint-2" / "inside").symlink_to(outside)
    path = folder / "checkpoint-2" / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inside/passwd": fingerprint(outside / "passwd")}))
    with pytest.raises(CheckpointCorrupt, match="inside/passwd.*not a plain file of the folder"):
        toy_trainer(folder, max_steps=3).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
