"""The live page: follows a run that trains, on this machine only, behind a token, with a button that stops it."""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
from forks import fork, wait
from report_folders import run_folder
from test_report import Page
from tiny_runs import redness, tiny_trainer
from transformers import TrainerCallback

from es_trl.cli import commands
from es_trl.evaluation import find_adapters
from es_trl.lock import this_process
from es_trl.report import LivePage
from es_trl.run import running


def fetched(url, data=None):
    with urllib.request.urlopen(urllib.request.Request(url, data=data)) as answer:
        return answer.read().decode(), answer.headers


class Looks(TrainerCallback):
    """What the page says from the inside of a run, at every log."""

    def __init__(self, page):
        self.page, self.seen = page, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(fetched(self.page.url)[0])


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    page = LivePage(folder, running=running).start()
    looks = Looks(page)
    trainer = tiny_trainer(folder, redness, max_steps=3, sample_steps=1, num_sample_prompts=2, callbacks=[looks])
    trainer.train()
    yield folder, page, looks.seen
    page.close()


def test_it_follows_the_run(watched):
    _, page, seen = watched
    texts = [Page(text).text for text in seen]
    assert "The first step is being drawn" in texts[0] and "Training step 0 of 3" in texts[0]
    assert "Step 2 of 3" in texts[2] and "16 images" in texts[2] and "to go" in texts[2]
    assert "The trained reward of the last batches is" in texts[2]
    assert seen[2].count('<svg class="chart"') >= 1 and "Sample pictures at step 2" in seen[2]
    assert "best member at step 2" in seen[2], "best and worst with their pictures"
    assert "before training" not in texts[0] and "before training" in texts[1] and "nothing picked" in texts[1]
    assert "redness (trained)" in texts[2] and "held out" not in texts[2], "what is trained is known from the start"
    after = Page(fetched(page.url)[0]).text
    assert "Not training" in after and "Step 3 of 3" not in after and "before training" not in after


def test_the_run_leaves_its_log_and_nothing_that_says_it_still_runs(watched):
    folder, _, _ = watched
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert running(folder) is None and not (folder / "running.json").exists()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_nothing_is_served_without_the_token_or_outside_the_page(watched):
    _, page, _ = watched
    assert page.server.server_address[0] == "127.0.0.1" and len(page.token) >= 20
    root = page.url.replace(f"{page.token}/", "")
    inside = ("", "/../es_config.json", "/es_config.json", "/samples/step-000000.jpg")
    for path in ("", "x/", "version", *(page.token + name for name in inside)):
        with pytest.raises(urllib.error.HTTPError) as error:
            fetched(root + path)
        assert error.value.code == 404
    foreign = urllib.request.Request(page.url, headers={"Host": "example.org:80"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(foreign)
    text, headers = fetched(page.url)
    assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    assert "default-src 'none'" in text and "connect-src 'self'" in text


def test_the_button_does_what_ctrl_c_does_and_only_to_a_run_that_trains(watched, monkeypatch):
    folder, page, _ = watched
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with pytest.raises(urllib.error.HTTPError):
        fetched(page.url + "stop", b"")
    entry = this_process() | {"started": 0, "first_step": 0, "max_steps": 3}
    earlier = entry["process"] - 60  # a process that had this number before
    (folder / "running.json").write_text(json.dumps(entry | {"process": earlier}))
    with pytest.raises(urllib.error.HTTPError):
        fetched(page.url + "stop", b"")
    (folder / "running.json").write_text(json.dumps(entry))
    assert fetched(page.url + "stop", b"")[0] == "stopping" and sent == [(os.getpid(), signal.SIGINT)]
    (folder / "running.json").unlink()


def test_a_run_is_stopped_from_its_page_with_a_checkpoint(tmp_path):
    """`es-trl train --live` in a process of its own, the address from its log, and the button."""
    words = ["train", "--model_name_or_path", "tiny-sana-sprint", "--reward_funcs", "jpeg_compressibility",
             "--dataset_name", "tiny-train", "--output_dir", str(tmp_path / "run"), "--max_steps", "100000",
             "--population_size", "2", "--prompts_per_step", "1", "--max_sequence_length", "16", "--use_cpu", "true",
             "--live", "true", "--report_to", "none", "--sample_steps", "0"]  # fmt: skip
    log = tmp_path / "output.log"
    process = fork(commands.main, words, output=log)
    timer = threading.Timer(240, os.kill, (process, signal.SIGKILL))
    timer.start()
    while running(tmp_path / "run") is None:
        assert timer.is_alive(), log.read_text()
        time.sleep(0.1)
    url = next(line.split()[-1] for line in log.read_text().splitlines() if "The page of this run" in line)
    assert fetched(url + "stop", b"")[0] == "stopping"
    assert wait(process) == 130, log.read_text()
    rest = log.read_text()
    timer.cancel()
    (folder,) = (tmp_path / "run").glob("checkpoint-*")
    assert running(tmp_path / "run") is None
    assert f"es-trl eval --adapter {folder} --prompts FILE --rewards jpeg_compressibility" in rest
    assert find_adapters(str(folder))[0].trained_rewards == {"jpeg_compressibility": 1.0}, "an adapter that loads"


def test_a_folder_that_is_still_empty_and_a_finished_one_have_a_page(tmp_path):
    for folder in (tmp_path / "empty", run_folder(tmp_path / "done")):
        page = LivePage(folder, running=running).start()
        text = Page(fetched(page.url)[0]).text
        assert "Not training" in text and ("One step now" in text) == (folder.name == "done")
        page.close()


def test_a_taken_port_is_one_line(tmp_path, capsys):
    from es_trl.cli import main

    page = LivePage(tmp_path).start()
    port = page.server.server_address[1]
    assert main(["report", str(tmp_path), "--follow", "--port", str(port)]) == 2
    assert f"es-trl report: port {port} cannot be used" in capsys.readouterr().err
    assert main(["report", str(tmp_path), str(tmp_path), "--follow"]) == 2
    page.close()
