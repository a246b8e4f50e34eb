"""Disks that are full or refuse to be written to (F5, F6).

A full disk is simulated by the errors it gives: Python's, and that of safetensors, which is no OSError. On one that is
really full: tests/soak/full_disk.py.
"""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from forks import fork, wait
from safetensors import SafetensorError
from tiny_runs import PROMPTS, same, theta_of
from toy_runs import history, toy_trainer, train

from es_trl import ESConfig, ESTrainer
from es_trl.files import read_lines
from es_trl.replay import verify_run
from es_trl.run import checkpoint, journal
from es_trl.run.checkpoint import last_checkpoint, verify_checkpoint
from es_trl.run.journal import JOURNAL
from recipes.benchmarks.toy_pipeline import redness, toy_pipeline


STEPS = {"max_steps": 8, "save_steps": 3, "logging_steps": 2}
NOBODY = 65534
FULL = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "disk full, said by safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), **STEPS)


def refuse(monkeypatch, error, number):
    """The `number`-th checkpoint, counted from 0, cannot be written."""
    save, saved = checkpoint.save_file, []

    def failing(tensors, path, **kwargs):
        saved.append(path)
        if len(saved) == number + 1:
            raise error
        return save(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", failing)


def checkpoints(folder):
    return sorted(name for name in os.listdir(folder) if "checkpoint" in name)


@pytest.mark.parametrize("kind", FULL)
def test_f5_a_full_disk_ends_the_run(tmp_path, monkeypatch, uninterrupted, kind):
    refuse(monkeypatch, FULL[kind], 1)
    trainer = toy_trainer(tmp_path, **STEPS)
    with pytest.raises(
        OSError, match=r"No space left for .*checkpoint-6: [\d,]+ bytes were written.* [\d,]+ are free"
    ):
        trainer.train()
    assert checkpoints(tmp_path)[0] == "checkpoint-3" and not any(".tmp" in name for name in checkpoints(tmp_path))
    verify_checkpoint(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    resumed = train(tmp_path, str(tmp_path / "checkpoint-3"), **STEPS)
    assert same(theta_of(resumed), theta_of(uninterrupted)) and history(resumed) == history(uninterrupted)


@pytest.mark.parametrize("kind", FULL)
def test_f5_or_a_warning_and_the_run_goes_on(tmp_path, monkeypatch, uninterrupted, kind, caplog):
    """The checkpoint of step 6 is missing, that of step 3 stands until the next one; nothing else differs."""
    refuse(monkeypatch, FULL[kind], 1)
    trainer = train(tmp_path, save_failure="warn", **STEPS)
    warnings = [r.getMessage() for r in caplog.records if "save_failure" in r.getMessage()]
    assert len(warnings) == 1 and "The checkpoint of step 6 could not be written" in warnings[0]
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-8"]
    assert same(theta_of(trainer), theta_of(uninterrupted)) and history(trainer) == history(uninterrupted)
    assert verify_run(tmp_path, toy_pipeline).proven


def test_f5_killed_after_a_save_that_failed(tmp_path, monkeypatch, uninterrupted):
    """From checkpoint 3: what came after it is drawn again."""
    refuse(monkeypatch, FULL["disk full"], 1)

    def die():
        trainer = toy_trainer(tmp_path, save_failure="warn", **STEPS)
        draw = trainer.rollout.draw
        trainer.rollout.draw = lambda members, batch, factors, step, micro=0: (
            os._exit(9) if step == 7 else draw(members, batch, factors, step, micro)
        )
        trainer.train()

    assert wait(fork(die, output=tmp_path / "out.log")) == 9
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    monkeypatch.undo()
    resumed = train(tmp_path, "latest", **STEPS)
    assert same(theta_of(resumed), theta_of(uninterrupted)) and history(resumed) == history(uninterrupted)


def test_f5_the_best_adapter_is_one_that_is_on_the_disk(tmp_path, monkeypatch):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": PROMPTS[:2],
               "save_steps": 1, "max_steps": 3, "save_failure": "warn"}  # fmt: skip
    evaluations = iter([1.0, 3.0, 2.0])
    evaluate = ESTrainer.evaluate
    monkeypatch.setattr(
        ESTrainer, "evaluate", lambda trainer, *a, **k: evaluate(trainer, *a, **k) | {"eval_reward": next(evaluations)}
    )
    refuse(monkeypatch, FULL["disk full"], 1)
    trainer = train(tmp_path, **options)
    assert trainer.state.best_global_step == 3 and trainer.state.best_metric == 2.0
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_f5_a_journal_that_cannot_be_written_is_caught_up(tmp_path, monkeypatch, uninterrupted, caplog):
    """The lines of steps 3 and 4 are refused and written with that of step 5; said once."""
    append, refused = journal.append_whole, []
    whole = [e for e in read_lines(os.path.join(uninterrupted.args.output_dir, JOURNAL)) if "step" in e]

    def failing(path, text):
        if path.name == JOURNAL and '"step": 3' in text and len(refused) < 2:
            refused.append(text)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(path, text)

    monkeypatch.setattr(journal, "append_whole", failing)
    train(tmp_path / "warn", save_failure="warn", **STEPS)
    assert len(refused) == 2 and caplog.text.count("A line of journal.jsonl could not be written") == 1
    assert [e for e in read_lines(tmp_path / "warn" / JOURNAL) if "step" in e] == whole
    refused.clear()
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path / "raise", **STEPS)
    assert [e["step"] for e in read_lines(tmp_path / "raise" / JOURNAL) if "step" in e] == [0, 1, 2]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    """Real: a limit on the size of files, beyond which the kernel writes the first part of a line."""
    path = tmp_path / "lines"
    path.write_text("a line\n")

    def limited():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        journal.append_whole(path, "b" * 1000 + "\n")

    assert wait(fork(limited, output=tmp_path / "out.log")) == 1
    assert "File too large" in (tmp_path / "out.log").read_text()
    assert path.read_text() == "a line\n"


# ---- F6: folders that cannot be written to are refused before anything is loaded ----


def as_a_user(folder):
    """To root, rights mean nothing."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        ESTrainer("no/such-model", redness, args=ESConfig(output_dir=folder, use_cpu=True), train_dataset=PROMPTS)
    except ValueError as error:
        os.write(1, str(error).encode())


@pytest.mark.parametrize("below", ["", "new/run"], ids=["the folder", "one in it"])
def test_f6_a_read_only_folder(tmp_path, below):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        os.chmod(place, 0o755)
        folder = Path(place, "locked")
        folder.mkdir(mode=0o555)
        assert wait(fork(as_a_user, str(folder / below), output=tmp_path / "out.log")) == 0
    output = (tmp_path / "out.log").read_text()
    assert output == f"output_dir={str(folder / below)!r} cannot be written: {folder}: Permission denied."


@pytest.mark.parametrize(
    ("place", "reason"),
    [("/proc/es_trl-run", "/proc: "), ("a-file", "is a file"), ("a-file/run", "is a file"), ("a-link", "a-link: ")],
)
def test_f6_places_where_no_folder_can_be_made(tmp_path, place, reason):
    """Rights say nothing here: /proc takes no folders, and a link to nowhere is none."""
    (tmp_path / "a-file").write_text("")
    (tmp_path / "a-link").symlink_to(tmp_path / "nowhere")
    folder = place if place.startswith("/") else str(tmp_path / place)
    with pytest.raises(ValueError, match=rf"output_dir='{folder}' cannot be written: .*{reason}"):
        ESTrainer("no/such-model", redness, args=ESConfig(output_dir=folder, use_cpu=True), train_dataset=PROMPTS)
    assert os.listdir(tmp_path) and not last_checkpoint(tmp_path)
