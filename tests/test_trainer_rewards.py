"""Rewards that fail, at the level of a run (F12 to F16): half pairs never count, and nothing moves on bad numbers."""

import logging
import math

import numpy as np
import pytest
import torch
from tiny_runs import PROMPTS, brightness, redness, same, theta_of, tiny_trainer

from es_trl.es import compute_fitness, estimate, mean_step
from es_trl.trainer.rollout import PromptBatch


def failing_on(members, value, per_member=2):
    """`redness`, but `value` for the first picture of some members; one forward holds the whole population."""

    def reward(images, **_):
        scores = redness(images)
        for member in members:
            scores[member * per_member] = value
        return scores

    return reward


@pytest.mark.parametrize("value", [None, math.nan, math.inf], ids=str)
def test_a_missing_score_drops_its_pair_and_nothing_else(tmp_path, value):
    """The step equals the one by hand from the remaining pairs."""
    options = {"population_size": 6, "members_per_forward": 6, "max_steps": 1, "travel": 0.5}
    options["antithetic"] = True
    trainer = tiny_trainer(tmp_path, failing_on([3], value), **options)
    batch = PromptBatch.from_rows(next(iter(trainer.get_train_dataloader())), 1)
    factors = trainer.noise.draw(0, range(3))
    clean = tiny_trainer(tmp_path, **options)
    scores, _ = clean.rollout.scores(batch, factors, 0)
    scores[2:4] = math.nan
    fitness = compute_fitness(scores, trainer.population)
    before = theta_of(trainer)
    trainer.train()
    estimates = {name: estimate(factors[name], fitness.values, trainer.population) for name in before}
    steps = mean_step([6 * value for value in estimates.values()], 4, 0.5)
    assert trainer.watch.optimizer.param_groups[0]["members"] == 4
    for (name, value), step in zip(theta_of(trainer).items(), steps, strict=True):
        torch.testing.assert_close(value, before[name] + 0.1 * step, atol=1e-6, rtol=1e-4)
    metrics = trainer.state.log_history[0]
    assert metrics["es/valid_pairs"] == pytest.approx(2 / 3)
    assert all(math.isfinite(value) for value in metrics.values())


def test_an_independent_member_drops_alone(tmp_path):
    trainer = tiny_trainer(
        tmp_path, failing_on([1], None), antithetic=False, population_size=5, members_per_forward=5, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["es/valid_pairs"] == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("members", "limit", "stops"),
    [([0], 0.5, False), ([0, 2], 0.5, True), ([0], 0.2, True), ([0, 1], 0.4, False)],
)
def test_too_many_missing_scores_stop_the_run_before_the_update(tmp_path, members, limit, stops):
    trainer = tiny_trainer(
        tmp_path, failing_on(members, math.nan), population_size=6, members_per_forward=6, max_steps=1,
        max_invalid_fraction=limit, antithetic=True,
    )  # fmt: skip
    before = theta_of(trainer)
    if not stops:
        trainer.train()
        return
    with pytest.raises(
        RuntimeError, match=rf"Step 0: .*% of the members.*\(reward\).*max_invalid_fraction={limit}"
    ) as e:
        trainer.train()
    assert "The adapter was not updated" in str(e.value) and any(prompt in str(e.value) for prompt in PROMPTS)
    assert same(theta_of(trainer), before)


def test_a_reward_that_never_answers_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path, lambda images, **_: [None] * len(images), max_invalid_fraction=0.99)
    before = theta_of(trainer)
    with pytest.raises(RuntimeError, match="100% of the members have no finite reward"):
        trainer.train()
    assert same(theta_of(trainer), before)


@pytest.mark.parametrize("options", [{}, {"es_space": "lora"}, {"fitness_shaping": "win_rate"}], ids=str)
def test_a_constant_reward_changes_nothing_and_is_said_once(tmp_path, options, caplog):
    def constant(images, **_):
        return [0.1] * len(images)

    trainer = tiny_trainer(tmp_path, constant, max_steps=3, **options)
    before = theta_of(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert same(theta_of(trainer), before)
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["frac_reward_zero_std"] for entry in entries] == [1.0] * 3
    assert [entry["es/update_norm"] for entry in entries] == [0.0] * 3
    assert sum("every member got the same reward" in record.getMessage() for record in caplog.records) == 1


def test_an_inapplicable_function_does_not_drop_members(tmp_path):
    """An OCR reward has nothing to say about prompts without text."""

    def only_cats(prompts, images, **_):
        return [score if "cat" in prompt else None for prompt, score in zip(prompts, redness(images), strict=True)]

    prompts = ["two blue cats", "a red apple"]
    trainer = tiny_trainer(tmp_path, [only_cats, brightness], train_dataset=prompts, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["es/valid_pairs"] == 1 and math.isfinite(entry["rewards/only_cats/mean"])


def test_a_raising_reward_says_which_and_where(tmp_path):
    def broken(images, trainer_state, **_):
        if trainer_state.global_step == 1:
            raise OSError("the server is gone")
        return redness(images)

    trainer = tiny_trainer(tmp_path, broken, max_steps=3, members_per_forward=2)
    with pytest.raises(
        RuntimeError, match="'broken' failed at step 1, members 0-1.*first prompt of 4.*the server is gone"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


def test_reward_retries(tmp_path):
    calls = []

    def flaky(images, **_):
        calls.append(len(calls))
        if calls[-1] == 0:
            raise OSError("once")
        return redness(images)

    tiny_trainer(tmp_path, flaky, reward_retries=1, max_steps=1).train()
    assert len(calls) == 2


@pytest.mark.parametrize("value", [[1.0], 1.0, np.zeros((8, 1)), ["a"] * 8], ids=str)
def test_a_wrong_return_value_names_the_function_and_is_never_broadcast(tmp_path, value):
    def odd(images, **_):
        return value

    trainer = tiny_trainer(tmp_path, odd)
    before = theta_of(trainer)
    with pytest.raises(ValueError, match="reward function 'odd' at step 0, members 0-3 must return .* 8 here"):
        trainer.train()
    assert same(theta_of(trainer), before)


def test_weights_and_async_rewards_reach_the_step(tmp_path):
    """`-1 x` the reward is the opposite step, from an `async def` too."""

    async def colour(images, **_):
        return redness(images)

    thetas = []
    for weight in (1.0, -1.0):
        trainer = tiny_trainer(tmp_path, colour, reward_weights=[weight], max_steps=1)
        start = theta_of(trainer)
        trainer.train()
        thetas.append({name: value - start[name] for name, value in theta_of(trainer).items()})
    for name, value in thetas[0].items():
        torch.testing.assert_close(value, -thetas[1][name], atol=1e-7, rtol=1e-5)


def test_the_shipped_scorer_trains(tmp_path):
    trainer = tiny_trainer(tmp_path, "tiny-pickscore", max_steps=1, eval_reward_funcs=["jpeg_compressibility"])
    before = theta_of(trainer)
    trainer.train()
    assert not same(theta_of(trainer), before)
    assert math.isfinite(trainer.state.log_history[0]["reward"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_comparison_of_a_few_prompts_is_logged_without_a_claim(tmp_path, caplog, count):
    trainer = tiny_trainer(tmp_path, "tiny-pickscore", num_inference_steps=1)
    with caplog.at_level("INFO", logger="es_trl"):
        result = trainer.compare_with_base(PROMPTS[:count], images_per_prompt=1)
    assert "on too few prompts for an interval" in caplog.text and "gap closure" not in caplog.text
    assert result.to_dict()["gap_closure"], "there is a gap of which nothing is claimed"
