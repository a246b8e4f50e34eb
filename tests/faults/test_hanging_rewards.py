"""Rewards that do not come back (F17): ended after `reward_timeout`, and said which, where, and for whom."""

import asyncio
import queue
import signal
import socket
import threading
import time

import pytest
from tiny_runs import same, theta_of
from toy_runs import history, redness, toy_trainer, train

from es_trl.rewards import reward_set
from es_trl.rewards.calling import time_limit
from es_trl.run.checkpoint import last_checkpoint


OPTIONS = {"max_steps": 3, "save_steps": 2, "reward_timeout": 1.0}


def sleeps():
    time.sleep(600)


def waits_for_a_queue():
    queue.Queue().get()


def reads_from_a_server_that_never_answers():
    server = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(server.getsockname()).recv(1)


def computes_for_ever():
    while True:
        pass


def tries_again_after_any_error():
    while True:
        try:
            time.sleep(600)
        except Exception:
            pass


def hanging(hang, step=1, call=2):
    """`redness`, which in one of the three micro-batches of a step does not come back."""
    calls = []

    def reward(images, trainer_state=None, **_):
        calls.append(trainer_state.global_step)
        if calls[-1] == step and calls.count(step) == call:
            hang()
        return redness(images)

    reward.__name__ = "redness"
    return reward


HANGS = [sleeps, waits_for_a_queue, reads_from_a_server_that_never_answers, computes_for_ever,
         tries_again_after_any_error]  # fmt: skip


@pytest.mark.parametrize("hang", HANGS, ids=lambda hang: hang.__name__)
def test_f17_a_reward_that_hangs_is_ended_and_named(tmp_path, hang):
    threads, handler = set(threading.enumerate()), signal.getsignal(signal.SIGALRM)
    trainer = toy_trainer(tmp_path, hanging(hang), **OPTIONS)
    with pytest.raises(
        RuntimeError, match=r"'redness' failed at step 1, members 2-3 .*no result within reward_timeout=1 s"
    ):
        trainer.train()
    assert set(threading.enumerate()) == threads, "no thread stays behind"
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1"), "the last finished step is kept"


def test_f17_the_run_goes_on_later_and_the_same(tmp_path):
    with pytest.raises(RuntimeError, match="reward_timeout"):
        train(tmp_path / "run", reward_funcs=hanging(sleeps), **OPTIONS)
    resumed, whole = train(tmp_path / "run", "latest", **OPTIONS), train(tmp_path / "whole", **OPTIONS)
    assert same(theta_of(resumed), theta_of(whole)) and history(resumed) == history(whole)


def test_f17_an_async_reward_that_hangs(tmp_path):
    async def judge(images, trainer_state=None, **_):
        await asyncio.sleep(600 if trainer_state.global_step == 1 else 0)
        return redness(images)

    with pytest.raises(RuntimeError, match="'judge' failed at step 1, members 0-1 .*reward_timeout=1 s"):
        train(tmp_path, reward_funcs=judge, **OPTIONS)


def test_f17_an_async_reward_that_blocks_its_event_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_set, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(reward_set, "MAX_BACKOFF_SECONDS", 0.0)

    async def judge(images, **_):
        time.sleep(6)
        return redness(images)

    with pytest.raises(RuntimeError, match="judge did not answer at step 0, members 0-1 within 1 s.*has to await"):
        train(tmp_path, reward_funcs=judge, **OPTIONS)


def test_f17_another_attempt_where_it_was_asked_for(tmp_path, caplog):
    trainer = train(tmp_path / "a", reward_funcs=hanging(sleeps), reward_retries=1, **OPTIONS)
    assert "attempt 1: TimeoutError: no result within reward_timeout=1 s; trying again" in caplog.text
    assert same(theta_of(trainer), theta_of(train(tmp_path / "b", **OPTIONS)))


def test_f17_members_without_a_score_where_the_run_is_to_go_on(tmp_path, caplog):
    """As if the reward had given these two members None; and too many of them still end the run."""

    def nothing(images, trainer_state=None, calls=[], **_):  # noqa: B006
        calls.append(trainer_state.global_step)
        return [None] * len(images) if calls[-1] == 1 and calls.count(1) == 2 else redness(images)

    options = OPTIONS | {"reward_failure": "invalid"}
    trainer = train(tmp_path / "a", reward_funcs=hanging(sleeps), **options)
    assert "'redness' failed at step 1, members 2-3" in caplog.text and "its images have no score" in caplog.text
    assert [entry["es/valid_pairs"] for entry in history(trainer)] == [1, pytest.approx(4 / 6), 1]
    assert same(theta_of(trainer), theta_of(train(tmp_path / "b", reward_funcs=nothing, **OPTIONS)))
    with pytest.raises(RuntimeError, match="33% of the members have no finite reward .*max_invalid_fraction=0.3"):
        train(tmp_path / "c", reward_funcs=hanging(sleeps), max_invalid_fraction=0.3, **options)


def test_a_limit_leaves_a_timer_of_the_programs_own_in_place():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        with pytest.raises(TimeoutError, match="reward_timeout=0.05 s"), time_limit(0.05):
            time.sleep(600)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 500 and not rang
        with time_limit(None):
            pass
        signal.raise_signal(signal.SIGALRM)
        assert rang == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_limit_that_cannot_be_kept_is_refused(tmp_path):
    """Outside the main thread nothing can interrupt a plain function; `async def` can be ended anywhere."""
    errors = []

    def run(folder, reward):
        try:
            train(tmp_path / folder, reward_funcs=reward, **OPTIONS)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))

    async def judge(images, **_):
        return redness(images)

    for folder, reward in (("a", redness), ("b", judge)):
        thread = threading.Thread(target=run, args=(folder, reward))
        thread.start()
        thread.join()
    assert len(errors) == 1 and "reward_timeout=1 cannot end a plain reward function here" in errors[0]
