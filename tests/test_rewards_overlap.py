"""Waiting for a reward while drawing on: the same numbers, metrics and errors, in less time."""

import asyncio
import json
import math
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import brightness, redness, same, theta_of, tiny_trainer

from es_trl.rewards import RewardSet


IMAGES = [Image.new("RGB", (size, 8)) for size in (1, 2, 3)]
PROMPTS = ["a cat", "a dog", "a frog"]


def width(images, prompts):
    return [image.width for image in images]


def test_submit_computes_plain_rewards_at_once_and_waits_for_the_others_later():
    gate, order = threading.Event(), []

    async def slow(images, **_):
        while not gate.is_set():
            await asyncio.sleep(0.001)
        return [10 * image.width for image in images]

    def plain(images, **_):
        order.append("plain")
        return width(images, None)

    pending = RewardSet([slow, plain]).submit(PROMPTS, IMAGES)
    assert order == ["plain"] and not pending.done()
    gate.set()
    assert pending.result().tolist() == [[10, 1], [20, 2], [30, 3]]
    assert pending.done()


def test_submit_some_of_the_rewards():
    scores = RewardSet([width, width, width]).submit(PROMPTS, IMAGES, only=[2, 0]).result()
    np.testing.assert_array_equal(scores, [[1, math.nan, 1], [2, math.nan, 2], [3, math.nan, 3]])


def test_groups_reach_only_rewards_that_name_them():
    seen = {}

    def compares(images, groups):
        seen["groups"] = groups
        return [0.0] * len(images)

    def takes_columns(images, prompts, trainer_state, log_extra, log_metric, **columns):
        seen["columns"] = columns
        return [0.0] * len(images)

    RewardSet([compares, takes_columns])(PROMPTS, IMAGES, columns={"target": [1, 2, 3]}, groups=[0, 0, 1])
    assert seen == {"groups": [0, 0, 1], "columns": {"target": [1, 2, 3]}}
    with pytest.raises(ValueError, match="2 entries of groups for 3 images"):
        RewardSet(compares)(PROMPTS, IMAGES, groups=[0, 0])


def as_async(function, trace=None):
    async def reward(images, log_metric, **_):
        if trace is not None:
            trace.append("asked")
        await asyncio.sleep(0.02)
        log_metric("seen/first_width", images[0].getpixel((0, 0))[0])
        return function(images)

    reward.__name__ = function.__name__
    return reward


def as_plain(function):
    def reward(images, log_metric, **_):
        log_metric("seen/first_width", images[0].getpixel((0, 0))[0])
        return function(images)

    reward.__name__ = function.__name__
    return reward


OPTIONS = {"population_size": 8, "members_per_forward": 2, "max_steps": 2}


def test_a_run_that_overlaps_is_the_same_bit_for_bit(tmp_path):
    plain = tiny_trainer(tmp_path / "plain", [as_plain(redness), brightness], **OPTIONS)
    plain.train()
    waiting = tiny_trainer(tmp_path / "async", [as_async(redness), brightness], **OPTIONS)
    waiting.train()
    assert same(theta_of(plain), theta_of(waiting))
    timed = ("time", "images_per_second", "overhead", "runtime", "per_second", "memory", "loss_scale")
    for a, b in zip(plain.state.log_history, waiting.state.log_history, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if not any(word in name for word in timed):
                assert value == b[name], name


def test_the_next_members_are_drawn_while_the_server_thinks(tmp_path):
    """The first request is answered only after the second micro-batch was drawn; without overlap this hangs."""
    drawn = threading.Event()

    async def needs_the_next(images, **_):
        for _ in range(2000):
            if drawn.is_set():
                return redness(images)
            await asyncio.sleep(0.01)
        raise TimeoutError("nobody drew on")

    trainer = tiny_trainer(tmp_path, needs_the_next, max_steps=1, population_size=4, members_per_forward=2)
    draw, calls = trainer.rollout.draw, []

    def counting(*args, **kwargs):
        images = draw(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            drawn.set()
        return images

    trainer.rollout.draw = counting
    trainer.train()
    assert len(calls) == 2


def test_a_late_failure_names_its_own_members_and_ends_the_others(tmp_path):
    cancelled = []

    async def broken(images, **_):
        number = len(cancelled)
        cancelled.append("asked")
        if number == 1:
            raise OSError("the server is gone")
        try:
            await asyncio.sleep(0.05 if number == 0 else 60)
        except asyncio.CancelledError:
            cancelled.append("cancelled")
            raise
        return redness(images)

    trainer = tiny_trainer(tmp_path, broken, **OPTIONS)
    before = theta_of(trainer)
    with pytest.raises(RuntimeError, match="'broken' failed at step 0, members 2-3.*the server is gone"):
        trainer.train()
    assert same(theta_of(trainer), before)
    for _ in range(200):
        if cancelled.count("cancelled") == cancelled.count("asked") - 2:
            break
        threading.Event().wait(0.01)
    assert cancelled.count("cancelled") == cancelled.count("asked") - 2


def test_a_reward_that_compares_sees_the_whole_population_once(tmp_path):
    """Win rates do not depend on how many members are drawn together."""
    calls = []

    class Wins:
        groupwise = True

        def __call__(self, prompts, images, groups):
            calls.append(len(images))
            scores = np.array(redness(images))
            groups = np.array(groups)
            return [float((scores[groups == g] < s).mean()) for s, g in zip(scores, groups, strict=True)]

    results = []
    for together in (1, 4, 8):
        trainer = tiny_trainer(
            tmp_path, [Wins(), redness], population_size=8, members_per_forward=together, max_steps=1
        )
        trainer.train()
        results.append((theta_of(trainer), trainer.state.log_history[0]["rewards/Wins/mean"]))
    assert calls == [16] * 3
    assert results[0][1] == results[1][1] == results[2][1] == pytest.approx(3.5 / 8)
    for theta, _ in results[1:]:
        for name, value in theta.items():
            torch.testing.assert_close(value, results[0][0][name], atol=1e-5, rtol=1e-4)


def test_comparing_rewards_want_one_process(tmp_path):
    from es_trl.trainer.rollout import PopulationRollout

    trainer = tiny_trainer(tmp_path, redness)
    compares = RewardSet(lambda images, groups: [0.0] * len(images))
    compares.load()._calls[0].is_groupwise = True
    with pytest.raises(ValueError, match="lambda in reward_funcs compares the images of all members, but 2 processes"):
        PopulationRollout(trainer.adapter, compares, trainer.population, 0.1, 2, 0, 0, 2)


def test_the_benchmark_compares_equal_work(capsys):
    script = Path(__file__).parent.parent / "recipes" / "benchmarks" / "reward_overlap.py"
    main = runpy.run_path(str(script), run_name="reward_overlap")["main"]
    main("--population_size 4 --members_per_forward 2 --prompts 1 --repeats 1 --delay 0.01".split())
    report = json.loads(capsys.readouterr().out)
    assert report["same_scores"] is True and report["settings"]["requests_per_rollout"] == 2
    assert report["seconds_waiting"]["sequential"] >= 0.02
