import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from es_trl.evaluation import holm, runs_difference, statistics, verdict, wilcoxon_p
from es_trl.evaluation.statistics import gap_closure, mean_estimate, paired_difference, wilson_interval


RESAMPLING = {"n_resamples": 20_000, "method": "percentile", "random_state": 2}


def test_mean_interval_agrees_with_scipy():
    values = np.random.default_rng(3).gamma(2.0, 1.0, 80)  # skewed, so that the two ends differ
    ours = mean_estimate(values, resamples=20_000, seed=1)
    theirs = stats.bootstrap((values,), np.mean, **RESAMPLING).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_gap_closure_interval_agrees_with_scipy():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 100)
    model, target = base + rng.normal(0.8, 0.5, 100), base + rng.normal(1.0, 0.5, 100)

    def ratio(model, base, target, axis):
        return (model.mean(axis) - base.mean(axis)) / (target.mean(axis) - base.mean(axis))

    ours = gap_closure(model, base, target, resamples=20_000, seed=1)
    theirs = stats.bootstrap(
        (model, base, target),
        ratio,
        paired=True,
        n_resamples=20_000,
        method="percentile",
        random_state=2,
        vectorized=True,
    ).confidence_interval
    assert ours.value == pytest.approx(ratio(model, base, target, 0))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@pytest.mark.parametrize("wins, trials", [(0, 5), (5, 5), (31, 64), (900, 1632)])
def test_wilson_interval_agrees_with_scipy(wins, trials):
    expected = stats.binomtest(wins, trials).proportion_ci(method="wilson")
    assert wilson_interval(wins / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_covers_the_truth_as_often_as_it_says():
    """95 % of the intervals of 600 simulated comparisons hold the true difference, within the error of 600 trials."""
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(600):
        easy = rng.normal(0, 5, 64)  # prompts differ far more than the models do: pairing has to remove that
        reference = easy + rng.normal(0, 1, 64)
        result = paired_difference(easy + 0.3 + rng.normal(0, 1, 64), reference, resamples=1000, seed=trial)
        covered += result.low <= 0.3 <= result.high
    assert 0.92 <= covered / 600 <= 0.98


def test_gap_closure_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(8)
    covered = 0
    for trial in range(600):
        base = rng.normal(0, 5, 64)
        model, target = base + rng.normal(1.2, 1, 64), base + rng.normal(1.0, 1, 64)
        result = gap_closure(model, base, target, resamples=1000, seed=trial)
        covered += result.low <= 1.2 <= result.high
    assert 0.92 <= covered / 600 <= 0.98


def test_images_of_a_prompt_do_not_count_as_prompts():
    """Repeating an image adds no information, so the interval must not shrink."""
    values = np.random.default_rng(0).normal(size=50)
    once, often = mean_estimate(values), mean_estimate(np.repeat(values[:, None], 16, axis=1))
    assert (once.low, once.high) == pytest.approx((often.low, often.high), abs=1e-12)


def test_win_rate_counts_ties_half():
    result = paired_difference([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 3.0, 5.0])
    assert result.win_rate == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert result.delta == pytest.approx(0.0)
    assert result.win_low < result.win_rate < result.win_high


def test_missing_scores_leave_on_both_sides_and_are_counted():
    model = np.array([[1.0, np.nan], [2.0, 4.0], [np.nan, np.inf]])
    reference = np.array([[0.0, 100.0], [1.0, 1.0], [0.0, 0.0]])
    result = paired_difference(model, reference)
    assert result.delta == pytest.approx((1.0 + 2.0) / 2)
    assert (result.prompts, result.missing) == (2, 3)


def test_nothing_scored_gives_nan_not_an_error():
    result = paired_difference([np.nan, np.nan], [1.0, 2.0])
    assert math.isnan(result.delta) and math.isnan(result.win_rate) and result.prompts == 0


def test_no_gap_means_no_gap_closure():
    base = np.random.default_rng(0).normal(size=64)
    assert math.isnan(gap_closure(base + 1, base, base - 1).value)
    noisy = base + np.random.default_rng(1).normal(0.01, 1, 64)
    unclear = gap_closure(base + 1, base, noisy + max(0.0, 0.02 - (noisy - base).mean()))
    assert math.isnan(unclear.value) and math.isnan(unclear.low) and math.isnan(unclear.high)


def test_result_does_not_depend_on_the_memory_block(monkeypatch):
    values = np.random.default_rng(0).normal(size=(37, 3))
    values[4, 1] = np.nan
    whole = statistics.bootstrap_means(values, 500, seed=5)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 37 * 7)
    np.testing.assert_allclose(statistics.bootstrap_means(values, 500, seed=5), whole, rtol=1e-12)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        paired_difference([1.0, 2.0], [1.0])


def test_paired_interval_covers_the_truth_in_95_of_100_cases():
    """2,000 simulated comparisons of skewed differences on 200 prompts."""
    rng = np.random.default_rng(11)
    differences = rng.gamma(2.0, 1.0, (200, 2000)) - 2.0 + 0.3  # the true mean difference is 0.3
    draws = statistics.bootstrap_means(differences, resamples=1000, seed=5)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert 0.93 <= ((low <= 0.3) & (0.3 <= high)).mean() <= 0.97


@pytest.mark.parametrize("between_runs", [0.02, 0.3, 1.0])
def test_interval_over_runs_covers_the_truth(between_runs):
    """
    Three training seeds, 100 prompts: at least 95 % within the error of 300 trials, whatever the runs' spread.
    Resampling the three runs with replacement instead covers 85 % at a spread of 0.3.
    """
    rng = np.random.default_rng(12)
    covered = 0
    for trial in range(300):
        base = rng.normal(0, 3, 100)
        prompt_effect = rng.normal(0.5, 1, 100)
        models = [base + prompt_effect + rng.normal(0, between_runs) + rng.normal(0, 0.5, 100) for _ in range(3)]
        found = runs_difference(models, [base], resamples=400, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert 0.925 <= covered / 300 <= 0.998


def test_one_run_is_the_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 2))
    model = base + rng.normal(0.2, 1, (40, 2))
    found, paired = runs_difference([model], [base], seed=3), paired_difference(model, base, seed=3)
    assert (found.delta, found.low, found.high) == pytest.approx((paired.delta, paired.low, paired.high))
    assert found.runs == 1 and math.isnan(found.run_std)


def test_runs_are_listed_and_their_spread_widens_the_interval():
    base = np.zeros(60)
    noise = np.random.default_rng(1).normal(0, 1, 60)
    near = runs_difference([noise + 1.0, noise + 1.0, noise + 1.0], [base])
    far = runs_difference([noise + 0.5, noise + 1.0, noise + 1.5], [base])
    assert far.deltas == pytest.approx([noise.mean() + d for d in (0.5, 1.0, 1.5)])
    assert far.run_std == pytest.approx(0.5)
    assert near.delta == pytest.approx(far.delta) and far.high - far.low > 2 * (near.high - near.low)


def test_runs_on_other_prompts_are_refused():
    with pytest.raises(ValueError, match="the same prompts"):
        runs_difference([np.zeros(3), np.zeros(4)], [np.zeros(3)])


def test_wilcoxon_is_the_share_of_sign_flips_that_are_as_extreme():
    """Against its definition, all 2^10 sign patterns, and against scipy for many prompts with ties and zeros."""
    differences = np.array([0.3, -0.1, 0.5, 0.9, -0.2, 1.4, 0.7, 0.05, 2.0, -0.6])
    ranks = stats.rankdata(np.abs(differences))
    signs = np.array(list(itertools.product([0, 1], repeat=10)))
    totals, middle = signs @ ranks, ranks.sum() / 2
    extreme = np.abs(totals - middle) >= abs((differences > 0) @ ranks - middle)
    assert wilcoxon_p(differences, np.zeros(10)) == pytest.approx(extreme.mean())
    many = np.round(np.random.default_rng(0).normal(0.1, 1, 400), 1)
    assert wilcoxon_p(many, np.zeros(400)) == pytest.approx(stats.wilcoxon(many).pvalue)


def test_wilcoxon_without_a_difference_or_without_scores():
    assert wilcoxon_p(np.ones(5), np.ones(5)) == 1.0
    assert math.isnan(wilcoxon_p([np.nan], [1.0]))


def test_holm_and_wilson_agree_with_statsmodels():
    p_values = [0.04, 0.001, 0.3, 0.012, 0.012, 0.9]
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    with_gap = holm([0.04, math.nan, 0.001])
    assert with_gap[::2] == pytest.approx(multipletests([0.04, 0.001], method="holm")[1]) and math.isnan(with_gap[1])
    assert wilson_interval(37 / 120, 120) == pytest.approx(proportion_confint(37, 120, method="wilson"))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (np.linspace(0.5, 1.5, 12), ("higher", None)),
        (-np.linspace(0.5, 1.5, 12), ("lower", None)),
        (np.array([-0.1] * 12 + [5.0, 5.1, 5.2, 5.3, 5.4, 5.5]), ("unclear", "test")),
        (np.array([-9.0, *[0.1] * 14]), ("unclear", "interval")),
        (np.array([1.0, -1.1] * 10), ("unclear", "both")),
        (np.array([1.0]), ("unclear", "no interval")),
        (np.ones(20), ("unclear", "no interval")),
        (np.full(20, 0.1), ("unclear", "no interval")),
    ],
)
def test_interval_and_test_agree_or_the_weaker_one_is_told(differences, expected):
    found = paired_difference(differences, np.zeros(len(differences)))
    assert not found.low == found.high
    assert verdict(found.low, found.high, wilcoxon_p(differences, np.zeros(len(differences)))) == expected
