"""Rewards to fitness: against hand computations, with missing scores, and without any signal."""

import math

import numpy as np
import pytest
import torch

from es_trl.es import Population, compute_fitness


NAN = math.nan


def fitness_of(scores, antithetic=True, **options):
    """`scores` as nested lists `(N, J)` for one function or `(N, J, K)`."""
    scores = torch.tensor(scores, dtype=torch.float64)
    scores = scores[..., None] if scores.dim() == 2 else scores
    return compute_fitness(scores, Population(len(scores), antithetic), **options)


def unit(values):
    values = np.asarray(values, dtype=float)
    return (values - values.mean()) / values.std()


# --- against hand computations ---


def test_z_by_hand():
    fitness = fitness_of([[1, 10], [3, 10], [2, 16], [6, 12]])
    # Columns centred: [-2, 0, -1, 3] and [-2, -2, 4, 0]; mean over columns: [-2, -1, 1.5, 1.5], then unit deviation.
    np.testing.assert_allclose(fitness.values, unit([-2, -1, 1.5, 1.5]))
    assert fitness.values.dtype == torch.float64
    assert fitness.num_valid == 4 and not fitness.zero_spread.any()
    assert fitness.rewards.tolist() == [[1, 10], [3, 10], [2, 16], [6, 12]]


def test_centered_rank_by_hand():
    fitness = fitness_of([[5.0], [-1.0], [100.0], [5.0]], shaping="centered_rank")
    np.testing.assert_allclose(fitness.values, unit([0.0, -0.5, 0.5, 0.0]), atol=1e-12)  # the tie shares its ranks


def test_sign_by_hand():
    fitness = fitness_of([[5.0], [-1.0], [2.0], [100.0], [3.0], [3.0]], shaping="sign")
    assert fitness.values.tolist() == [1, -1, -1, 1, 0, 0]


def test_win_rate_by_hand():
    fitness = fitness_of([[1, 9], [2, 9], [3, 0], [4, 5]], shaping="win_rate")
    # Column 0: beaten 0, 1, 2, 3 of 3. Column 1: 2.5, 2.5, 0, 1 of 3.
    np.testing.assert_allclose(fitness.values, unit([2.5 / 6, 3.5 / 6, 2 / 6, 4 / 6]))


def test_win_rate_ignores_how_far_a_column_is_won():
    near = fitness_of([[1.0, 3], [2, 2], [3, 1], [4, 0.5]], shaping="win_rate")
    far = fitness_of([[1.0, 3], [2, 2], [3, 1], [4e6, 0.5]], shaping="win_rate")
    assert torch.equal(near.values, far.values)


def test_scale_rewards_none_keeps_the_scale():
    small, large = [[1.0, 2], [3, 2], [2, 2], [6, 4]], [[10.0, 20], [30, 20], [20, 20], [60, 40]]
    np.testing.assert_allclose(fitness_of(small, scale_rewards="none").values, [-1.25, -0.25, -0.75, 2.25])
    np.testing.assert_allclose(
        fitness_of(large, scale_rewards="none").values, 10 * fitness_of(small, scale_rewards="none").values
    )


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("shaping", ["z", "centered_rank", "win_rate"])
def test_scaled_fitness_has_unit_deviation_whatever_the_reward_and_the_prompts(scale_rewards, shaping):
    torch.manual_seed(0)
    for columns, scale, offset in ((1, 1.0, 0.0), (16, 1e-4, 30.0), (3, 1e6, -5e6)):
        scores = torch.randn(8, columns, dtype=torch.float64) * scale + offset
        values = fitness_of(scores.tolist(), scale_rewards=scale_rewards, shaping=shaping).values
        assert float(values.std(correction=0)) == pytest.approx(1.0)
        assert float(values.mean()) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("shaping", ["z", "centered_rank", "sign", "win_rate"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_prompt_that_is_easier_for_everyone_changes_nothing(shaping, scale_rewards):
    torch.manual_seed(0)
    scores = torch.randn(6, 3, dtype=torch.float64)
    easier = scores + torch.tensor([0.0, 50.0, -7.0])
    options = {"shaping": shaping, "scale_rewards": scale_rewards}
    np.testing.assert_allclose(
        fitness_of(scores.tolist(), **options).values, fitness_of(easier.tolist(), **options).values, atol=1e-9
    )


# --- several reward functions ---


def test_weights_combine_the_functions():
    scores = [[[1, 100.0]], [[2, 300.0]], [[4, 200.0]], [[3, 0.0]]]
    fitness = fitness_of(scores, weights=torch.tensor([1.0, -0.01], dtype=torch.float64))
    np.testing.assert_allclose(fitness.values, unit([0, -1, 2, 3]))
    np.testing.assert_allclose(fitness.rewards[:, 0], [0, -1, 2, 3])


def test_normalize_then_sum_frees_the_weights_from_the_scales():
    scores = np.array([[[1, 100.0]], [[2, 300.0]], [[4, 200.0]], [[3, 0.0]]])
    fitness = fitness_of(scores.tolist(), weights=torch.tensor([1.0, 0.5]), aggregation="normalize_then_sum")
    np.testing.assert_allclose(fitness.values, unit(unit(scores[:, 0, 0]) + 0.5 * unit(scores[:, 0, 1])))
    rescaled = scores * [1.0, 1e-3]
    other = fitness_of(rescaled.tolist(), weights=torch.tensor([1.0, 0.5]), aggregation="normalize_then_sum")
    np.testing.assert_allclose(other.values, fitness.values)


def test_normalize_then_sum_is_trls():
    """Per function and prompt over the group, weighted, summed; then ours: the mean over prompts, to unit spread."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 3, 2)) * [1.0, 0.05] + rng.normal(size=(1, 3, 2)) * [0.1, 50.0]
    scores[:, 2, 1] = NAN  # the second function does not apply to the third prompt
    weights = np.array([1.0, 0.5])
    per_function = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    advantages = np.nansum(per_function * weights, axis=2)  # TRL: (group size, prompts)
    fitness = fitness_of(scores.tolist(), weights=torch.tensor(weights), aggregation="normalize_then_sum")
    np.testing.assert_allclose(fitness.values, unit(advantages.mean(axis=1)))
    # The second function rates prompts 50 apart, pictures .05 apart; it still has half the first one's say.
    alone = unit(per_function[:, :, 0].mean(axis=1))
    assert np.abs(fitness.values.numpy() - alone).max() > 0.1


def test_rounding_is_no_spread():
    """A function that says 0.1 for everyone, computed in ever another order, must not be blown up to a preference."""
    jitter = np.array([0.0, 1.4e-17, -1.4e-17, 0.0])
    scores = np.stack([np.array([1.0, 2, 4, 3]), 0.1 + jitter], axis=1)[:, None]
    fitness = fitness_of(scores.tolist(), aggregation="normalize_then_sum")
    np.testing.assert_allclose(fitness.values, unit(scores[:, 0, 0]))


def test_a_function_that_applies_to_no_member_of_a_prompt_does_not_count_there():
    """An OCR reward answers None on prompts without text: nobody is dropped for that."""
    scores = [[[1, NAN], [5, 2]], [[2, NAN], [5, 4]], [[4, NAN], [5, 3]], [[3, NAN], [5, 3]]]
    fitness = fitness_of(scores)
    assert fitness.num_valid == 4
    np.testing.assert_allclose(fitness.values, unit(np.array([1, 2, 4, 3]) + np.array([2, 4, 3, 3])))
    both = fitness_of(scores, aggregation="normalize_then_sum")
    assert torch.isfinite(both.values).all() and both.num_valid == 4


# --- missing and constant scores (F12, F14) ---


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_pair_with_a_non_finite_member_drops_whole(bad, aggregation):
    scores = [[1.0, 4], [2, 3], [bad, 9], [8, 8], [4, 1], [7, 5]]
    fitness = fitness_of(scores, aggregation=aggregation)
    rest = fitness_of([scores[i] for i in (0, 1, 4, 5)], aggregation=aggregation)
    assert fitness.valid.tolist() == [True, True, False, False, True, True]
    assert fitness.values[2:4].tolist() == [0, 0]
    np.testing.assert_allclose(fitness.values[[0, 1, 4, 5]], rest.values)
    assert math.isnan(fitness.rewards[2, 0]) and fitness.rewards[3].tolist() == [8, 8]


def test_an_independent_member_drops_alone():
    fitness = fitness_of([[1.0], [NAN], [3.0], [5.0]], antithetic=False)
    assert fitness.valid.tolist() == [True, False, True, True]
    np.testing.assert_allclose(fitness.values, [unit([1, 3, 5])[0], 0, *unit([1, 3, 5])[1:]])


def test_no_finite_score_at_all_is_no_fitness():
    fitness = fitness_of([[NAN], [NAN], [NAN], [NAN]])
    assert fitness.num_valid == 0 and fitness.values.tolist() == [0, 0, 0, 0] and fitness.zero_spread.all()


@pytest.mark.parametrize("shaping", ["z", "centered_rank", "sign", "win_rate"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_constant_reward_is_exactly_zero_fitness(shaping, scale_rewards, aggregation):
    constant = [[[0.1, 1 / 3], [0.7, 30.3]]] * 6
    fitness = fitness_of(constant, shaping=shaping, scale_rewards=scale_rewards, aggregation=aggregation)
    assert fitness.values.tolist() == [0.0] * 6
    assert fitness.zero_spread.tolist() == [True, True] and fitness.num_valid == 6


@pytest.mark.parametrize("shaping", ["z", "centered_rank", "win_rate"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_prompts_and_functions_without_spread_carry_no_weight(shaping, aggregation):
    informative = [[1.0], [2.0], [4.0], [3.0]]
    # A second function that always says the same, and a second prompt on which both do.
    padded = [[[row[0], 0.7], [0.1, 0.3]] for row in informative]
    options = {"shaping": shaping, "aggregation": aggregation}
    fitness = fitness_of(padded, **options)
    np.testing.assert_allclose(fitness.values, fitness_of(informative, **options).values, atol=1e-9)
    assert fitness.zero_spread.tolist() == [False, True]


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rewards": "groups"}, "scale_rewards must be one of group, batch, none; got 'groups'"),
        ({"shaping": "rank"}, "fitness_shaping must be one of .*centered_rank.*got 'rank'"),
        ({"aggregation": "sum"}, "multi_objective_aggregation must be one of .*got 'sum'"),
        ({"shaping": "sign", "antithetic": False}, "compares the halves of a pair; set antithetic=True"),
    ],
)
def test_unknown_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fitness_of([[1.0], [2.0]], **options)


# --- groups of members, each with columns of its own ---


def test_members_are_compared_within_their_group():
    scores = [[1.0], [3.0], [2.0], [100.0], [140.0], [60.0]]
    fitness = compute_fitness(torch.tensor(scores)[..., None], Population(6, antithetic=False, groups=2))
    first, second = unit([1, 3, 2]), unit([100, 140, 60])  # each group in its own unit: prompts weigh alike
    np.testing.assert_allclose(fitness.values, unit([*first, *second]))
    assert fitness.zero_spread.tolist() == [False, False]


def test_scale_of_a_groups_rewards_counts_only_when_not_scaled():
    scores = torch.tensor([[1.0], [3.0], [2.0], [100.0], [140.0], [60.0]])[..., None]
    population = Population(6, antithetic=False, groups=2)
    none = compute_fitness(scores, population, scale_rewards="none")
    np.testing.assert_allclose(none.values, [-1, 1, 0, 0, 40, -40])
    batch = compute_fitness(scores, population, scale_rewards="batch")
    np.testing.assert_allclose(batch.values, unit([1, 3, 2, 100, 140, 60]))


def test_a_group_without_spread_or_scores_changes_nothing():
    scores = torch.tensor([[5.0], [5.0], [1.0], [2.0], [NAN], [NAN]])[..., None]
    fitness = compute_fitness(scores, Population(6, antithetic=False, groups=3))
    assert fitness.valid.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(fitness.values[:2], [0, 0])
    assert fitness.values[2] < 0 < fitness.values[3] and fitness.values[4:].tolist() == [0, 0]
    assert fitness.zero_spread.tolist() == [True, False, True]


@pytest.mark.parametrize("shaping", ["z", "win_rate", "centered_rank"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_groups_with_the_same_scores_have_the_same_fitness(shaping, aggregation):
    one = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"shaping": shaping, "aggregation": aggregation, "weights": torch.tensor([1.0, 0.5])}
    alone = compute_fitness(one, Population(4, antithetic=False), **options)
    twice = compute_fitness(torch.cat([one, one]), Population(8, antithetic=False, groups=2), **options)
    np.testing.assert_allclose(twice.values, [*alone.values, *alone.values])


@pytest.mark.parametrize(
    "size, antithetic, groups, fix", [(7, False, 2, "use 6"), (6, True, 2, "use 4"), (3, False, 3, "use 6")]
)
def test_groups_are_of_equal_size_and_at_least_two(size, antithetic, groups, fix):
    assert Population(int(fix[-1]), antithetic, groups).group_size >= 2
    with pytest.raises(ValueError, match=f"each of the {groups} groups .*got {size}, {fix}"):
        Population(size, antithetic, groups)


def test_columns_are_those_of_the_group():
    population = Population(6, antithetic=False, groups=3)
    assert [list(population.columns(i, 6)) for i in range(6)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert list(Population(6).columns(5, 2)) == [0, 1]
