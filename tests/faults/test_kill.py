"""`kill -9` and torn saves (F1, F2, F3): the run goes on as if nothing had happened."""

import os
import shutil
import signal

import pytest
from forks import fork, wait
from tiny_runs import same, theta_of
from toy_runs import history, redness, toy_trainer, train

from es_trl.files import read_lines
from es_trl.replay import verify_run
from es_trl.run import checkpoint
from es_trl.run.checkpoint import last_checkpoint
from es_trl.run.journal import JOURNAL
from recipes.benchmarks.toy_pipeline import toy_pipeline


STEPS = {"max_steps": 8, "save_steps": 3, "logging_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), **STEPS)


def journal(folder):
    return [entry for entry in read_lines(folder / JOURNAL) if "step" in entry]


def is_the_same(resumed, whole):
    folders = [os.path.join(t.args.output_dir) for t in (resumed, whole)]
    lines = [[e for e in read_lines(os.path.join(f, JOURNAL)) if "step" in e] for f in folders]
    return same(theta_of(resumed), theta_of(whole)) and history(resumed) == history(whole) and lines[0] == lines[1]


def die_in_step(folder, step, micro_batch):
    calls = []

    def deadly(images, trainer_state, **_):
        calls.append(trainer_state.global_step)
        if calls.count(step) > micro_batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return redness(images)

    deadly.__name__ = "redness"
    train(folder, reward_funcs=deadly, **STEPS)


@pytest.mark.parametrize(("step", "micro_batch"), [(4, 1), (1, 0), (7, 2)])
def test_f1_killed_in_a_step(tmp_path, uninterrupted, step, micro_batch):
    """Before the first checkpoint there is nothing to resume, and the run starts afresh."""
    assert wait(fork(die_in_step, tmp_path, step, micro_batch, output=tmp_path / "out.log")) == -signal.SIGKILL
    assert [entry["step"] for entry in journal(tmp_path)] == list(range(step))
    assert is_the_same(train(tmp_path, last_checkpoint(tmp_path), **STEPS), uninterrupted)


def test_f1_a_killed_step_is_drawn_again(tmp_path, uninterrupted):
    """Killed in step 5, resumed from checkpoint 3: everything since then is drawn again, nothing is taken over."""

    def die():
        trainer = toy_trainer(tmp_path, **STEPS)
        draw = trainer.rollout.draw

        def deadly(members, batch, factors, step, micro=0):
            if (step, members[0]) == (5, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(members, batch, factors, step, micro)

        trainer.rollout.draw = deadly
        trainer.train()

    assert wait(fork(die, output=tmp_path / "out.log")) == -signal.SIGKILL
    trainer, drawn = toy_trainer(tmp_path, **STEPS), []
    draw = trainer.rollout.draw
    trainer.rollout.draw = lambda members, batch, factors, step, micro=0: (
        drawn.append((step, members[0])) or draw(members, batch, factors, step, micro)
    )
    trainer.train(resume_from_checkpoint="latest")
    assert drawn == [(step, member) for step in range(3, 8) for member in (0, 2, 4)]
    assert is_the_same(trainer, uninterrupted)


def test_f2_resumed_at_every_step(tmp_path, uninterrupted):
    """Also where a step is not one that logs: sums that were not logged yet go on."""
    options = STEPS | {"save_steps": 1, "save_total_limit": None}
    train(tmp_path, **options)
    for step in range(1, 8):
        folder = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{step}")
        resumed = train(folder, str(folder / f"checkpoint-{step}"), **options)
        assert is_the_same(resumed, uninterrupted), step


def die_in_save(folder, step, after_files):
    sync, synced = checkpoint.sync, []

    def deadly(path):
        sync(path)
        synced.append(path)
        torn = f"{os.getpid()}-checkpoint-{step}"
        if torn in str(path) and sum(torn in str(p) for p in synced) > after_files:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.sync = deadly
    train(folder, **STEPS)


@pytest.mark.parametrize("after_files", [0, 3, 6])
def test_f3_killed_in_a_save(tmp_path, uninterrupted, after_files, caplog):
    """After the first file, in the middle, and with the manifest written but the folder not yet renamed."""
    assert wait(fork(die_in_save, tmp_path, 6, after_files, output=tmp_path / "out.log")) == -signal.SIGKILL
    torn = [name for name in os.listdir(tmp_path) if name.startswith(".tmp-") and name.endswith("-checkpoint-6")]
    assert len(torn) == 1 and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    resumed = train(tmp_path, "latest", **STEPS)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum(torn[0] in message for message in warnings) == 1
    assert is_the_same(resumed, uninterrupted) and not (tmp_path / torn[0]).exists()


def test_an_error_leaves_the_last_finished_step(tmp_path, uninterrupted):
    """F13, F16: the run ends with the reward's error, and step 5 is on disk although no checkpoint was due."""

    def broken(images, trainer_state, **_):
        if trainer_state.global_step == 5:
            raise OSError("the server is gone")
        return redness(images)

    broken.__name__ = "redness"
    with pytest.raises(RuntimeError, match="the server is gone"):
        train(tmp_path, reward_funcs=broken, **STEPS)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert is_the_same(train(tmp_path, "latest", **STEPS), uninterrupted)
    assert verify_run(tmp_path, toy_pipeline).proven


def test_a_checkpoint_of_another_revision_is_refused(tmp_path):
    """F10: the same name at another commit is another base model."""
    import json

    train(tmp_path, **(STEPS | {"max_steps": 3}))
    path = tmp_path / "checkpoint-3" / "es_config.json"
    saved = json.loads(path.read_text())
    saved["config"]["model_init_kwargs"] = {"revision": "abc"}
    path.write_text(json.dumps(saved))
    manifest = json.loads((tmp_path / "checkpoint-3" / "MANIFEST.json").read_text())
    manifest["es_config.json"] = checkpoint.fingerprint(path)
    (tmp_path / "checkpoint-3" / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was trained on revision 'abc' of 'toy', this run loads None"):
        train(tmp_path, "latest", **STEPS)
