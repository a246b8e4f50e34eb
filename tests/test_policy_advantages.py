"""From rewards to advantages: groups, statistics of prompts, win rates; by hand on small numbers."""

import asyncio
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from es_trl.es import Population, compute_fitness
from es_trl.rewards.preferences import GroupJudge, mean_wins, win_rates
from es_trl.rewards.results import refuse_missing, weighted_total, zero_spread
from es_trl.trainer.advantages import PromptStatistics, combine, group_advantages
from es_trl.trainer.dpo_pairs import best_and_worst, totals


REWARDS = np.array([[1.0, 3.0, 2.0], [10.0, 10.0, 10.0]])


def test_group_advantages_by_hand():
    spread = math.sqrt(2 / 3)
    expected = np.array([[-1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(group_advantages(REWARDS, "none"), expected)
    np.testing.assert_allclose(group_advantages(REWARDS, "group"), expected / (spread + 1e-4))
    np.testing.assert_allclose(group_advantages(REWARDS, "batch"), expected / (REWARDS.std() + 1e-4))


def test_a_missing_reward_is_left_out_and_gets_no_advantage():
    rewards = np.array([[1.0, np.nan, 3.0]])
    scores = rewards[..., None]
    for scale in ("none", "group", "batch"):
        advantages = combine(scores, np.ones(1), lambda r, s=scale: group_advantages(r, s), "sum_then_normalize")
        assert advantages[0, 1] == 0 and advantages[0, 0] == -advantages[0, 2] < 0
    assert not group_advantages(np.full((1, 3), np.nan))[np.isfinite(group_advantages(np.full((1, 3), np.nan)))].any()


def test_normalising_each_reward_first_frees_them_of_their_scales():
    scores = np.stack([REWARDS, 1000 * REWARDS[:, ::-1]], axis=-1)
    weights = np.array([1.0, 1.0])

    def normalise(rewards):
        return group_advantages(rewards, "group")

    summed = combine(scores, weights, normalise, "sum_then_normalize")
    apart = combine(scores, weights, normalise, "normalize_then_sum")
    assert summed[0].argmax() == 2 - REWARDS[0].argmax(), "the large one decides"
    np.testing.assert_allclose(apart, normalise(REWARDS) + normalise(REWARDS[:, ::-1]), atol=1e-3)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_does_not_apply_to_a_prompt_leaves_it_to_the_others(aggregation):
    """As in TRL and in ES: silent for a whole group is no opinion, silent for one image is a missing score."""
    nan = np.nan
    scores = np.array([[[1.0, nan], [3.0, nan], [2.0, nan]], [[1.0, 5.0], [1.0, nan], [1.0, 7.0]]])
    weights = np.array([1.0, 2.0])
    np.testing.assert_equal(weighted_total(scores, weights), [[1, 3, 2], [11, nan, 15]])
    as_members = torch.from_numpy(scores.transpose(1, 0, 2))  # three members, two columns
    fitness = compute_fitness(as_members, Population(3, antithetic=False), torch.from_numpy(weights))
    np.testing.assert_equal(fitness.rewards.numpy().T, weighted_total(scores, weights))
    advantages = combine(scores, weights, lambda r: group_advantages(r, "none"), aggregation)
    np.testing.assert_allclose(advantages, [[-1, 1, 0], [-2, 0, 2]])
    np.testing.assert_equal(np.isnan(totals(scores, weights, aggregation)), [[False] * 3, [False, True, False]])
    assert best_and_worst(totals(scores, weights, aggregation)) == [(0, 1, 0), (1, 2, 0)]
    assert zero_spread(weighted_total(scores, weights)).tolist() == [False, False]
    assert zero_spread(np.array([[2.0, nan, 2.0], [nan, nan, nan]])).all()


def test_what_is_missing_is_named_with_its_place():
    scores = np.array([[[1.0, np.nan], [np.inf, 1.0]]])
    refuse_missing(0.5, "images", scores, ["a", "b"], 3, "a red apple", 0.5)
    with pytest.raises(RuntimeError, match=r"Step 3: 75% of the images .*\(a, b\), more than max_inv"):
        refuse_missing(0.75, "images", scores, ["a", "b"], 3, "a red apple", 0.5)


def test_prompt_statistics_are_those_of_the_last_rewards():
    tracker = PromptStatistics(buffer_size=4, min_count=3)
    first = tracker.advantages(["a", "b"], np.array([[1.0, 3.0], [5.0, 5.0]]))
    batch = np.array([1, 3, 5, 5.0])
    np.testing.assert_allclose(first[0], (np.array([1, 3]) - batch.mean()) / (batch.std() + 1e-4))
    second = tracker.advantages(["a"], np.array([[5.0, np.nan]]))
    kept = np.array([1, 3, 5.0])
    np.testing.assert_allclose(second[0, 0], (5 - kept.mean()) / (kept.std() + 1e-4))
    assert np.isnan(second[0, 1])
    tracker.advantages(["a"], np.array([[7.0, 9.0]]))
    assert list(tracker.rewards["a"]) == [3, 5, 7, 9], "the oldest is gone"
    again = PromptStatistics(4, 3)
    again.restore(json.loads(json.dumps(tracker.to_json())))
    np.testing.assert_array_equal(*(t.advantages(["a"], np.array([[0.1, 0.2]])) for t in (tracker, again)))


def test_win_rates_are_the_mean_of_bradley_terry():
    logits = np.array([[0.0, 1.0, 3.0]])

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [(sigmoid(-1) + sigmoid(-3)) / 2, (sigmoid(1) + sigmoid(-2)) / 2, (sigmoid(3) + sigmoid(2)) / 2]
    np.testing.assert_allclose(win_rates(logits)[0], expected)
    np.testing.assert_allclose(win_rates(logits * 5, temperature=5)[0], expected)
    assert win_rates(logits * 1e6)[0].tolist() == [0, 0.5, 1]
    assert win_rates(logits).mean() == pytest.approx(0.5)
    missing = win_rates(np.array([[0.0, np.nan, 3.0]]))
    assert np.isnan(missing[0, 1]) and missing[0, 0] == pytest.approx(sigmoid(-3))
    assert np.isnan(mean_wins(np.full((1, 2, 2), np.nan))).all()


# --- judges ---


def grey(level):
    return Image.new("RGB", (8, 8), (level, level, level))


GROUPS = [[grey(10), grey(200), grey(100)], [grey(50), grey(60), grey(70)]]


def level(image):
    return image.getpixel((0, 0))[0]


def test_a_pairwise_judge_is_asked_in_both_orders():
    calls = []

    def judge(prompts, images_a, images_b, tag, **_):
        """Always a little for the first picture, as judges are."""
        calls.append(len(prompts))
        assert set(prompts) == {"p", "q"} and tag == [{"p": 1, "q": 2}[prompt] for prompt in prompts]
        wins = [0.8 if level(a) > level(b) else 0.4 for a, b in zip(images_a, images_b, strict=True)]
        return [
            None if level(a) == 60 and level(b) == 50 else w for a, b, w in zip(images_a, images_b, wins, strict=True)
        ]

    rates = GroupJudge(judge)(["p", "q"], GROUPS, {"tag": [1, 2]})
    assert calls == [2 * 3 * 2], "three pairs per group, twice"
    np.testing.assert_allclose(rates[0], [0.3, 0.7, 0.5])
    np.testing.assert_allclose(rates[1], [((0.4 + 1 - 0.5) / 2 + 0.3) / 2, ((0.5 + 0.6) / 2 + 0.3) / 2, 0.7])


def test_a_pointwise_reward_judges_by_its_scores():
    def score(images, **_):
        return [level(image) / 50 for image in images]

    rates = GroupJudge(score, temperature=2.0)(["p", "q"], GROUPS)
    expected = win_rates(np.array([[10, 200, 100], [50, 60, 70]]) / 50, 2.0)
    np.testing.assert_allclose(rates, expected)


def test_a_scorer_by_name_judges(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def better(prompts, images_a, images_b):\n    return [1.0] * len(prompts)\n")
    np.testing.assert_allclose(GroupJudge(f"{file}:better")(["p", "q"], GROUPS), 0.5)
    rates = GroupJudge("tiny-pickscore")(["a red apple", "a dog"], GROUPS)
    assert rates.shape == (2, 3) and ((rates > 0) & (rates < 1)).all()
    with pytest.raises(ValueError, match="did you mean 'tiny-pickscore'"):
        GroupJudge("tiny-pikscore")


def test_a_judge_may_wait():
    """As one does that asks a server."""

    async def judge(prompts, images_a, images_b):
        await asyncio.sleep(0.001)
        return [float(level(a) > level(b)) for a, b in zip(images_a, images_b, strict=True)]

    np.testing.assert_allclose(GroupJudge(judge)(["p", "q"], GROUPS), [[0, 1, 0.5], [0, 0.5, 1]])


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [([0.5], "returned 1 verdicts for 12 pairs"), ([1.5] * 12, r"returned 1.5: give the prob")],
)
def test_verdicts_that_cannot_be(verdicts, message):
    def judge(prompts, images_a, images_b):
        return verdicts

    with pytest.raises(ValueError, match=message):
        GroupJudge(judge)(["p", "q"], GROUPS)
