"""The estimate: equal to the dense sum, blind to scale, and good enough to climb."""

import math

import numpy as np
import pytest
import torch

from es_trl.es import NoiseBank, Population, compute_fitness, estimate, gradient, pair_snr


SHAPES = {"w": (5, 7)}


def factors_for(population, rank=2, seed=0, shapes=SHAPES, step=0):
    return NoiseBank(seed, shapes, rank=rank).draw(step, range(population.num_directions))


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_estimate_is_the_dense_sum(antithetic, rank):
    """`(1/N) sum_i F_i s_i E_i`, each `E_i` written out, in numpy and fp64."""
    population = Population(8, antithetic)
    factors = factors_for(population, rank)["w"]
    fitness = torch.randn(8, dtype=torch.float64)
    U, V = factors.U.double().numpy(), factors.V.double().numpy()
    expected = np.zeros((5, 7))
    for member in range(8):
        direction = member // 2 if antithetic else member
        sign = -1 if antithetic and member % 2 else 1
        expected += fitness[member].item() * sign * U[direction] @ V[direction].T / math.sqrt(rank) / 8
    np.testing.assert_allclose(estimate(factors, fitness, population).numpy(), expected, atol=1e-6)
    step = gradient(factors, fitness, population, sigma=0.03, num_valid=8)
    np.testing.assert_allclose(step.numpy(), -0.03 * math.sqrt(8) * expected, atol=1e-7)


def test_swapping_plus_and_minus_flips_the_sign():
    population = Population(6)
    factors = factors_for(population)["w"]
    fitness = torch.randn(6, dtype=torch.float64)
    swapped = fitness.view(3, 2).flip(1).flatten()
    assert torch.equal(estimate(factors, swapped, population), -estimate(factors, fitness, population))


def test_pairs_whose_halves_score_alike_say_nothing():
    population = Population(4)
    fitness = torch.tensor([2.0, 2.0, -2.0, -2.0], dtype=torch.float64)
    assert not estimate(factors_for(population)["w"], fitness, population).any()


def test_dropped_members_leave_the_estimate_of_the_others():
    """A step with dropped pairs is the step of the smaller population of those that remain."""
    population, smaller = Population(8), Population(4)
    scores = torch.randn(8, 3, 1, dtype=torch.float64)
    scores[3] = math.nan
    scores[4, 1] = math.inf
    factors = factors_for(population)["w"]
    fitness = compute_fitness(scores, population)
    assert fitness.num_valid == 4
    rest = compute_fitness(scores[[0, 1, 6, 7]], smaller)
    torch.testing.assert_close(
        gradient(factors, fitness.values, population, 0.1, fitness.num_valid),
        gradient(factors.select(torch.tensor([0, 3])), rest.values, smaller, 0.1, 4),
    )


def test_no_spread_and_no_valid_member_give_an_exactly_zero_step():
    population = Population(4)
    factors = factors_for(population)["w"]
    constant = compute_fitness(torch.full((4, 2, 1), 0.1), population)
    assert not gradient(factors, constant.values, population, 0.1, constant.num_valid).any()
    none = compute_fitness(torch.full((4, 2, 1), math.nan), population)
    step = gradient(factors, none.values, population, 0.1, none.num_valid)
    assert step.shape == (5, 7) and not step.any()


def test_fitness_of_another_population_is_an_error():
    population = Population(8)
    with pytest.raises(ValueError, match="names 2 directions but the noise holds 4"):
        estimate(factors_for(population)["w"], torch.zeros(4), Population(4))


@pytest.mark.parametrize(
    ("size", "rank", "prompts", "scale", "sigma", "antithetic"),
    [
        (8, 1, 4, 1.0, 0.1, True),
        (64, 1, 4, 1.0, 0.1, True),
        (64, 4, 4, 1.0, 0.1, True),
        (64, 1, 32, 1.0, 0.1, True),
        (64, 1, 4, 1e-4, 0.1, True),
        (64, 1, 4, 1e5, 0.003, True),
        (64, 1, 4, 1.0, 0.1, False),
        (256, 2, 1, 1.0, 0.1, False),
    ],
)
def test_the_rms_step_is_sigma_whatever_n_r_prompts_and_reward_scale(size, rank, prompts, scale, sigma, antithetic):
    """With plain SGD at learning rate 1: the unit in which `learning_rate` is given."""
    population = Population(size, antithetic)
    squares = []
    for seed in range(24):
        torch.manual_seed(seed)
        scores = torch.randn(size, prompts, 1, dtype=torch.float64) * scale + 7 * scale
        fitness = compute_fitness(scores, population)
        factors = factors_for(population, rank, seed, {"w": (24, 24)})["w"]
        squares.append(gradient(factors, fitness.values, population, sigma, size).square().mean())
    rms = float(torch.stack(squares).mean().sqrt())
    assert rms == pytest.approx(sigma, rel=0.12)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("landscape", ["sphere", "rotated ellipsoid"])
def test_estimator_and_sgd_solve(landscape, antithetic):
    """Reward only, no derivative: the distance to the optimum falls to a few percent."""
    torch.manual_seed(0)
    m, n = 6, 5
    if landscape == "sphere":
        metric = torch.eye(m * n)
    else:
        rotation = torch.linalg.qr(torch.randn(m * n, m * n))[0]
        metric = rotation @ torch.diag(torch.logspace(0, 1, m * n)) @ rotation.T
    target = torch.randn(m, n)
    theta = torch.nn.Parameter(torch.zeros(m, n))
    population, bank, steps, sigma = Population(64, antithetic), NoiseBank(1, {"w": (m, n)}), 200, 0.05
    optimizer = torch.optim.SGD([theta], lr=1.0, momentum=0.9, dampening=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    signs = population.signs(range(64))
    for step in range(steps):
        factors = bank.draw(step, range(population.num_directions))["w"]
        dense = factors.dense()[population.directions(range(64))]
        offset = (theta.detach() + sigma * signs[:, None, None] * dense - target).flatten(1)
        rewards = -((offset @ metric) * offset).sum(dim=1)
        fitness = compute_fitness(rewards[:, None, None], population)
        theta.grad = gradient(factors, fitness.values, population, sigma, fitness.num_valid)
        optimizer.step()
        schedule.step()
    assert float((theta.detach() - target).norm() / target.norm()) < 0.05


def test_pair_snr_tells_signal_from_even_effects():
    population = Population(6)
    linear = torch.tensor([1.0, -1, 2, -2, -0.5, 0.5], dtype=torch.float64)
    even = torch.tensor([1.0, 1, 2, 2, -0.5, -0.5], dtype=torch.float64)
    assert pair_snr(linear, population) == pytest.approx(math.sqrt(2))
    assert pair_snr(even, population) == 0
    assert pair_snr(torch.zeros(6), population) == 0
    torch.manual_seed(0)
    assert pair_snr(torch.randn(4000), Population(4000)) == pytest.approx(1.0, abs=0.05)
    assert math.isnan(pair_snr(linear, Population(6, antithetic=False)))
