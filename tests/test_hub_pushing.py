"""Pushing, over HTTP to a Hub on the loopback interface: what arrives, what never does, and what a failure costs."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from forks import fork, wait
from loopback_hub import LoopbackHub, talk_to
from PIL import Image
from tiny_runs import same, theta_of, tiny_trainer

from es_trl import assets
from es_trl.cli import main
from es_trl.hub import find_adapter
from es_trl.hub.publishing import reason_of
from es_trl.pipelines import load_pipeline
from es_trl.run.checkpoint import verify_checkpoint


CANARY = "hf_CANARYcanaryCANARYcanaryCANARY"
SETTINGS = ["README.md", "env.json", "es_config.json", "pytorch_lora_weights.safetensors"]
CHECKPOINT = {"MANIFEST.json", "es_state.safetensors", "optimizer.json", "trainer_state.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to."""
    with LoopbackHub() as hub:
        talk_to(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setattr("huggingface_hub.utils._http.time", Impatient())
        yield hub


class Impatient:
    """The module `time`, for a client that tries again at once instead of after 1, 2, 4, 8 and 8 seconds."""

    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        pass


def pushing_trainer(folder, **options):
    return tiny_trainer(folder, push_to_hub=True, hub_model_id="someone/tiny", **({"max_steps": 2} | options))


def hub_environment(hub: LoopbackHub, home: Path) -> dict[str, str]:
    """For a fresh process: nothing cached, nothing patched."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": CANARY}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = str(Path(__file__).parent.parent)
    return kept | own | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def run_elsewhere(hub: LoopbackHub, code: str, folder: Path) -> None:
    """In a copy of this process, with nothing cached and none of its connections."""
    huggingface_hub.close_session()
    patch = pytest.MonkeyPatch()
    talk_to(hub, patch, folder / "cache")
    patch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)  # a copy of what is patched already
    os.chdir(folder)
    warnings.simplefilter("error", FutureWarning)
    exec(compile(code, "card", "exec"), {"__name__": "__main__"})


def test_pushed_adapter_draws_the_same_picture_elsewhere(hub, tmp_path, monkeypatch, capfd, caplog):
    """`es-trl train` with push_to_hub; then, elsewhere, nothing but the lines of the published card."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        model_name_or_path: tiny-sana-sprint
        reward_funcs: [jpeg_compressibility]
        dataset_name: tiny-train
        max_train_prompts: 8
        max_steps: 1
        population_size: 4
        prompts_per_step: 2
        update: optimizer
        learning_rate: 5.0
        max_sequence_length: 16
        num_sample_prompts: 2
        sample_steps: 1
        report_to: none
        use_cpu: true
        push_to_hub: true
        hub_model_id: someone/tiny-es
        hub_private_repo: true
        output_dir: {tmp_path / "run"}
        """
    )
    hub.token = CANARY
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert main(["train", "--config", str(config)]) == 0
    said = "".join([caplog.text, *capfd.readouterr()])
    assert CANARY not in said and f"Pushed to {hub.url}/someone/tiny-es/commit/" in said
    assert hub.repos["model/someone/tiny-es"]["private"]
    messages = [message for _, _, message, _ in hub.commits]
    assert messages == ["Training in progress, step 1"], "the last checkpoint; at the end nothing is new"
    files = hub.files("someone/tiny-es")
    assert CANARY.encode() not in b"".join(files.values())
    pictures = {"samples/metadata.jsonl", "samples/step-000000.jpg", "samples/step-000001.jpg"}
    assert {name for name in files if "members" not in name} == pictures | set(SETTINGS)

    (code,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), flags=re.DOTALL)
    assert '"someone/tiny-es"' in code
    (tmp_path / "elsewhere").mkdir()
    log = tmp_path / "elsewhere.log"
    assert wait(fork(run_elsewhere, hub, code, tmp_path / "elsewhere", output=log)) == 0, log.read_text()
    drawn = np.asarray(Image.open(tmp_path / "elsewhere" / "image.png"), np.int16)

    pipe = load_pipeline("tiny-sana-sprint")
    prompt = re.search(r'image = pipe\(\n    "(.*?)"', code).group(1)
    call = {"num_inference_steps": 1, "intermediate_timesteps": None, "height": 64, "width": 64}

    def draw_here():
        generator = torch.Generator("cpu").manual_seed(0)
        image = pipe(prompt, **call, use_resolution_binning=False, max_sequence_length=16, generator=generator)
        return np.asarray(image.images[0], np.int16)

    base = draw_here()
    pipe.load_lora_weights(str(tmp_path / "run"), use_safetensors=True)
    assert np.abs(drawn - draw_here()).max() <= 1
    assert np.abs(drawn - base).max() > 5


def test_only_the_runs_own_files_are_pushed_in_one_commit(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "report").mkdir()
    for name in ("outside.txt", "notes.json", ".env", "rerun.yaml", "report/index.html", "samples/notes.txt"):
        (run / name).write_text("private")
    (run / "samples" / "step-000099.jpg").symlink_to(run / "outside.txt")
    options = {"sample_steps": 2, "num_sample_prompts": 1, "save_strategy": "steps", "hub_strategy": "end"}
    trainer = pushing_trainer(run, save_steps=1, **options)
    trainer.train()
    commit = trainer.push_to_hub(commit_message="Ready", tags="mine")
    pictures = ["samples/metadata.jsonl", "samples/step-000000.jpg", "samples/step-000002.jpg"]
    ((repo, branch, message, files),) = hub.commits
    assert (repo, branch, message) == ("someone/tiny", "main", "Ready")
    assert [name for name in files if "members" not in name] == sorted(SETTINGS + pictures)
    assert commit.oid in hub.repos["model/someone/tiny"]["commits"] and not trainer.hub.failed
    files = hub.files("someone/tiny")
    assert json.loads(files["es_config.json"])["config"]["output_dir"] == "~/run"
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert b"![At step 2](samples/step-000002.jpg)" in files["README.md"]
    assert b"- mine" in files["README.md"] and b'load_lora_weights("someone/tiny"' in files["README.md"]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_every_save_is_pushed_while_training_goes_on(hub, tmp_path, monkeypatch, strategy):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"hub_strategy": strategy, "hub_always_push": True, "save_strategy": "steps", "save_steps": 1}
    trainer = pushing_trainer(
        tmp_path / "run", update="optimizer", learning_rate=0.1, lr_scheduler_type="constant", **options
    )
    trainer.train()  # which waits for the last push
    messages = [message for _, _, message, _ in hub.commits]
    assert messages == ["Training in progress, step 1", "Training in progress, step 2"]
    found = set(hub.files("someone/tiny"))
    copies = {"every_save": [], "checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    for folder in copies[strategy]:
        assert {f"{folder}/{name}" for name in CHECKPOINT} <= found
    assert {name.split("/")[0] for name in found if "/" in name} == set(copies[strategy])
    assert set(SETTINGS) <= found
    files = hub.files("someone/tiny")
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content], (
        "not in checkpoints either"
    )
    if strategy == "checkpoint":
        resume_from_the_hub(tmp_path)


def resume_from_the_hub(tmp_path):
    folder = huggingface_hub.snapshot_download(
        "someone/tiny", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "copy"
    )
    verify_checkpoint(Path(folder, "last-checkpoint"))
    resumed, at_once = (
        tiny_trainer(tmp_path / name, max_steps=3, update="optimizer", learning_rate=0.1, lr_scheduler_type="constant")
        for name in ("resumed", "at-once")
    )
    resumed.train(resume_from_checkpoint=str(Path(folder, "last-checkpoint")))
    at_once.train()
    assert resumed.state.global_step == 3 and same(theta_of(resumed), theta_of(at_once))


@pytest.mark.parametrize("fault", [{"repos/create": 401}, {"/commit/": 500}, {"/commit/": "die"}, "refused"])
def test_a_failing_hub_costs_the_run_nothing(hub, tmp_path, monkeypatch, caplog, fault):
    monkeypatch.setenv("HOME", str(tmp_path))
    if fault == "refused":
        hub.close()
    else:
        hub.faults.update(fault)
    options = {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 1}
    with caplog.at_level(logging.INFO):
        trainer = pushing_trainer(tmp_path / "my run", **options)
        trainer.train()
        assert trainer.push_to_hub() is None
    assert trainer.state.global_step == 2 and trainer.hub.failed
    assert (tmp_path / "my run" / "pytorch_lora_weights.safetensors").is_file()
    assert CANARY not in caplog.text
    last = caplog.records[-1]
    assert last.levelno == logging.ERROR and str(tmp_path / "my run") in last.getMessage()
    assert "Training goes on" in caplog.text
    if fault == {"repos/create": 401}:
        assert "hf auth login" in last.getMessage()
    if fault == {"/commit/": "die"}:
        hub.faults.clear()
        retry(hub, last.getMessage().split("push it with: ")[1], tmp_path)
        files = hub.files("someone/tiny")
        assert json.loads(files["es_config.json"])["config"]["output_dir"] == "~/my run"
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
        assert trainer.push_to_hub() is not None and not (tmp_path / "my run" / "to_push").exists()


@pytest.mark.parametrize("token", [CANARY, "a-token-of-another-form"])
def test_the_reason_of_a_failure_never_shows_the_token(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    error = ConnectionError(f"http://me:CANARY-pass@proxy.example refused Bearer {token}\nand {CANARY}")
    reason = reason_of(error)
    assert reason.startswith("ConnectionError: http://***@proxy.example refused Bearer ")
    assert token not in reason and "CANARY" not in reason


def retry(hub, command, tmp_path):
    """The printed line, as a user would paste it."""
    words = shlex.split(command)
    assert words[:2] == ["hf", "upload"]
    environment = hub_environment(hub, tmp_path / "home")
    hf = str(Path(sys.executable).parent / "hf")
    done = subprocess.run([hf, *words[1:]], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(hub.files("someone/tiny")) == set(SETTINGS)


@pytest.mark.parametrize("silent", ["repos/create", "/preupload/"])
def test_a_hub_that_never_answers_holds_nobody(hub, tmp_path, monkeypatch, caplog, silent):
    monkeypatch.setattr("es_trl.run.hub_pusher.OPEN_SECONDS", 0.3)
    monkeypatch.setattr("es_trl.run.hub_pusher.PUSH_SECONDS", 0.3)
    hub.faults[silent] = "hang"
    trainer = pushing_trainer(tmp_path, max_steps=1, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.push_to_hub() is None and trainer.hub.failed and trainer.state.global_step == 1
    assert "the Hub did not answer for 0.3 seconds" in caplog.records[-1].getMessage()
    hub.faults.clear()
    monkeypatch.setattr("es_trl.run.hub_pusher.OPEN_SECONDS", 20)
    monkeypatch.setattr("es_trl.run.hub_pusher.PUSH_SECONDS", 20)
    assert trainer.push_to_hub(commit_message=None) is not None and not trainer.hub.failed, "as the Trainer allows"


def test_large_files_go_through_a_storage_and_a_cut_upload_commits_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.lfs, hub.token = True, CANARY
    trainer = pushing_trainer(tmp_path / "run", max_steps=1)
    hub.faults["/large/"] = "die"
    assert trainer.push_to_hub() is None and hub.commits == []
    hub.faults.clear()
    assert trainer.push_to_hub() is not None
    lora = "pytorch_lora_weights.safetensors"
    written = (tmp_path / "run" / lora).read_bytes()
    assert list(hub.large.values()) == [written] == [hub.files("someone/tiny")[lora]]
    assert Path(find_adapter("someone/tiny")).read_bytes() == written
    assert not [a for _, path, a in hub.requests if path.startswith("/large/") and a], "no token for the storage"


def test_a_push_that_failed_is_made_up_for_by_the_next(hub, tmp_path):
    trainer = pushing_trainer(tmp_path, max_steps=1)
    hub.faults["/api/"] = 403
    assert trainer.push_to_hub() is None and trainer.hub.failed
    hub.faults.clear()
    assert trainer.push_to_hub(commit_message=None) is not None and not trainer.hub.failed, "as the Trainer allows"


def test_a_revision_is_a_branch_of_its_own(hub, tmp_path):
    trainer = pushing_trainer(tmp_path, hub_revision="v2")
    trainer.push_to_hub()
    assert set(hub.files("someone/tiny", "v2")) == set(SETTINGS) and hub.files("someone/tiny") == {}
    assert b'revision="v2"' in hub.files("someone/tiny", "v2")["README.md"]


def test_the_name_of_the_run_folder_is_the_default(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "my-run", max_steps=1)
    trainer.push_to_hub(blocking=False, private=True).result()
    assert trainer.hub.repo_id == "someone/my-run" and hub.repos["model/someone/my-run"]["private"]


def test_the_exit_code_tells_of_a_failed_push(hub, tmp_path):
    hub.faults["/commit/"] = 500
    arguments = ["--model_name_or_path", "tiny-sana-sprint", "--reward_funcs", "jpeg_compressibility"]
    arguments += ["--dataset_name", "tiny-train", "--max_steps", "1", "--population_size", "2", "--report_to", "none"]
    arguments += ["--prompts_per_step", "1", "--max_sequence_length", "16", "--use_cpu", "--sample_steps", "0"]
    arguments += ["--push_to_hub", "--hub_model_id", "someone/tiny", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments])
    assert end.value.code == 1
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_pushed_adapter_is_evaluated_by_its_hub_id(hub, tmp_path):
    trainer = pushing_trainer(tmp_path / "run", max_steps=1, model="tiny-sana-sprint", num_inference_steps=1)
    trainer.train()
    trainer.push_to_hub()
    (tmp_path / "prompts.txt").write_text("a red apple\ntwo blue cats\n")
    arguments = ["--adapter", "someone/tiny", "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--rewards", "jpeg_compressibility", "--use_cpu", "--output_dir", str(tmp_path / "eval")]
    assert main(["eval", *arguments]) == 0
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert {"base@1", "adapter@1", "base@2"} <= {row["name"] for row in result["rows"]}
    assert "someone/tiny" in json.dumps(result)


def test_an_adapter_is_found_by_folder_file_and_hub_id(hub, tmp_path):
    lora = "pytorch_lora_weights.safetensors"
    hub.create("someone/tiny", files={lora: b"lora", "es_config.json": b"{}", "other.bin": b"x"})
    path = find_adapter("someone/tiny")
    folder = os.path.dirname(path)
    assert Path(path).read_bytes() == b"lora" and not Path(folder, "other.bin").exists()
    assert sorted(os.listdir(folder)) == ["es_config.json", lora]
    assert find_adapter(folder) == path and find_adapter(path) == path
    hub.create("someone/none", files={"README.md": b"x", "four_steps.safetensors": b"fast"})
    assert Path(find_adapter("someone/none/four_steps.safetensors")).read_bytes() == b"fast"
    for name, message in [
        ("someone/none/five_steps.safetensors", "holds no five_steps.safetensors: look the name up"),
        ("someone/none", "holds no pytorch_lora"),
        ("someone/away", "cannot be had from the Hub .*hf auth login"),
        (str(tmp_path), "holds no pytorch_lora"),
        ("no/such/folder", "neither a folder nor a file nor a Hub id"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_adapter(name)
    with pytest.raises(ValueError, match="revision"):
        find_adapter("someone/tiny", revision="v9")
    hub.close()
    assert find_adapter("someone/tiny") == path, "what is cached needs no Hub"
    with pytest.raises(ValueError, match="cannot be had from the Hub"):
        find_adapter("someone/other")


def test_the_shipped_model_is_no_adapter():
    with pytest.raises(ValueError, match="holds no pytorch_lora"):
        find_adapter(assets.resolve("tiny-sana-sprint"))
