"""The mean update against its formulas: every member weighs alike, and the size of a step is known beforehand."""

import math

import pytest
import torch
from torch import nn

from es_trl.es import (
    MeanUpdate,
    NoiseBank,
    Population,
    Turn,
    estimate,
    first_step,
    mean_step,
    projections,
    slope,
    travel_left,
)


SHAPES = {"a": (8, 8), "b": (12, 5)}
NUMBERS = sum(m * n for m, n in SHAPES.values())


def standardised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std(correction=0)


def theta_of(shapes=SHAPES) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def feed(optimizer, theta, factors, fitness, population, valid=None):
    """What a training step does: minus the sum over members into `.grad`, and their number."""
    for name, parameter in theta.items():
        parameter.grad = -population.size * estimate(factors[name], fitness, population)
    optimizer.add_members(population.size if valid is None else valid)
    optimizer.step()


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize(("antithetic", "groups"), [(False, 1), (False, 4), (True, 1), (True, 4)])
def test_steps_follow_the_formula_for_pairs_groups_and_unequal_numbers_of_members(antithetic, groups):
    """theta_T = sigma sum_t eta_t believed_t S_t / sqrt(n_t), with S and n written out member by member."""
    population, noise = Population(16, antithetic, groups), NoiseBank(3, SHAPES, rank=2)
    theta = theta_of()
    optimizer = MeanUpdate(theta.values(), lr=0.0, sigma=0.2)
    expected, total, members = torch.zeros(NUMBERS), torch.zeros(NUMBERS), 0
    generator = torch.Generator().manual_seed(0)
    for step, (length, dropped) in enumerate([(0.3, 0), (0.2, 4), (0.1, 2)]):
        factors = noise.draw(step, range(population.num_directions))
        fitness = 4 * torch.randn(16, generator=generator, dtype=torch.float64)
        fitness[:dropped] = 0.0
        for member in range(16):
            (direction,), sign = population.directions([member]), population.signs([member])[0]
            dense = flat([factors[name].dense()[direction] for name in SHAPES])
            total += float(fitness[member] * sign) * dense
        members += 16 - dropped
        optimizer.param_groups[0]["lr"] = length
        feed(optimizer, theta, factors, fitness, population, 16 - dropped)
        surplus = (float(total.square().sum()) / members - NUMBERS) / math.sqrt(2 * NUMBERS)
        step_by_hand = length * min(max(surplus / 2, 0.01), 1.0) * total / math.sqrt(members)
        expected += 0.2 * step_by_hand
        torch.testing.assert_close(flat(theta.values()), expected)
        torch.testing.assert_close(flat(optimizer.last_step()), step_by_hand)
    assert expected.any()


def test_every_estimate_has_the_same_weight_and_sgd_with_dampening_would_not():
    """The sum that a step follows holds each estimate once; torch's SGD gives the first one ten times the weight."""
    unit = 9 * torch.eye(4)
    theta = nn.Parameter(torch.zeros(4))
    optimizer = MeanUpdate([theta], lr=1.0, sigma=1.0)
    for estimate_of_step in unit:
        theta.grad = -estimate_of_step.clone()
        optimizer.add_members(1)
        optimizer.step()
    step = optimizer.last_step()[0]
    torch.testing.assert_close(step / step[0], torch.ones(4))

    damped = nn.Parameter(torch.zeros(4))
    sgd = torch.optim.SGD([damped], lr=1.0, momentum=0.9, dampening=0.9)
    for estimate_of_step in unit:
        damped.grad = -estimate_of_step.clone()
        sgd.step()
    buffer = -sgd.state[damped]["momentum_buffer"]
    assert float(buffer[0] / buffer[1]) == pytest.approx(9.0)


@pytest.mark.parametrize("antithetic", [False, True])
def test_pure_noise_has_the_known_variance_and_moves_next_to_nothing(antithetic):
    """Without signal S / sqrt(n) has unit variance, the believed share is near zero, and all lengths sum to travel."""
    shapes = {"a": (40, 40), "b": (60, 20)}
    population, noise, steps, travel = Population(64, antithetic), NoiseBank(1, shapes), 6, 0.9
    theta = theta_of(shapes)
    optimizer = MeanUpdate(theta.values(), lr=first_step(travel, steps), sigma=0.5)
    lengths = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = first_step(travel, steps) * (1 - step / steps)
        lengths.append(optimizer.param_groups[0]["lr"])
        fitness = standardised(torch.randn(64, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
        feed(optimizer, theta, noise.draw(step, range(population.num_directions)), fitness, population)
        sums = flat([optimizer.state[parameter]["sum"] for parameter in theta.values()])
        assert float(sums.square().mean()) / (64 * (step + 1)) == pytest.approx(1, abs=0.3)
        assert float(flat(optimizer.last_step()).abs().max()) <= float(sums.abs().max()) * lengths[-1]
    assert sum(lengths) == pytest.approx(travel)
    assert 0 < float(flat(theta.values()).square().mean().sqrt()) < 0.5 * 0.5 * travel


def test_a_step_without_signal_keeps_a_hundredth_of_its_length():
    """|S|^2 / n below d: what a first step of few members often is. The adapter is small, and not the base."""
    (step,) = mean_step([torch.full((8, 8), 2.0)], members=16, length=0.5)
    torch.testing.assert_close(step, torch.full((8, 8), 0.5 * 0.01 * 2.0 / 4))


def test_a_planted_signal_is_found_at_the_predicted_angle():
    """
    Fitness with a share r2 of rank-one signal: cos^2 of the mean estimate = r2 / (r2 + d / n). (With noise of rank one
    products of four normals add to the variance along the signal's rows and columns; at rank 8 they hardly do.)
    """
    shapes, r2, steps = {"a": (16, 16)}, 0.3, 6
    population, noise = Population(256, False), NoiseBank(5, shapes, rank=8)
    generator = torch.Generator().manual_seed(2)
    gradient = torch.outer(torch.randn(16, generator=generator), torch.randn(16, generator=generator))
    gradient /= gradient.norm()
    theta = theta_of(shapes)
    optimizer = MeanUpdate(theta.values(), lr=0.1, sigma=1.0)
    for step in range(steps):
        factors = noise.draw(step, range(256))
        signal = (factors["a"].dense() * gradient).sum(dim=(1, 2)).double()
        fitness = r2**0.5 * signal + (1 - r2) ** 0.5 * torch.randn(256, generator=generator, dtype=torch.float64)
        feed(optimizer, theta, factors, standardised(fitness), population)
        found = optimizer.last_step()[0]
        cosine = float((found * gradient).sum() / found.norm())
        predicted = (r2 / (r2 + 256 / (256 * (step + 1)))) ** 0.5
        assert cosine == pytest.approx(predicted, abs=0.06), step


def test_a_step_without_valid_members_and_a_restart_leave_theta_where_it_is():
    population, noise, theta = Population(4, False), NoiseBank(0, SHAPES), theta_of()
    optimizer = MeanUpdate(theta.values(), lr=0.5, sigma=0.1)
    factors = noise.draw(0, range(4))
    feed(optimizer, theta, factors, torch.zeros(4, dtype=torch.float64), population, 0)
    assert not flat(theta.values()).any()
    optimizer.remember()
    feed(optimizer, theta, factors, 9 * standardised(torch.arange(4.0).double()), population)
    moved = flat(theta.values()).clone()
    assert moved.any()
    for parameter in theta.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.add_members(4)
    optimizer.go_back()
    optimizer.step()
    assert not flat(theta.values()).any() and not flat(optimizer.last_step()).any()
    feed(optimizer, theta, factors, 9 * standardised(torch.arange(4.0).double()), population)
    torch.testing.assert_close(flat(theta.values()), moved)  # as if it were the first step


def test_the_state_survives_saving_bit_by_bit():
    population, noise = Population(8, False), NoiseBank(0, SHAPES)
    fitness = [5 * standardised(torch.randn(8, generator=torch.Generator().manual_seed(s)).double()) for s in range(4)]

    def walk(steps, theta, optimizer):
        for step in steps:
            feed(optimizer, theta, noise.draw(step, range(8)), fitness[step], population)

    whole = theta_of()
    walk(range(4), whole, MeanUpdate(whole.values(), lr=0.3, sigma=0.1))
    half = theta_of()
    first = MeanUpdate(half.values(), lr=0.3, sigma=0.1)
    walk(range(2), half, first)
    second = MeanUpdate(half.values(), lr=0.9, sigma=0.9)
    second.load_state_dict(first.state_dict())
    walk(range(2, 4), half, second)
    assert torch.equal(flat(whole.values()), flat(half.values()))


@pytest.mark.parametrize(("antithetic", "groups"), [(False, 1), (False, 8), (True, 8)])
def test_slopes_are_unbiased_and_their_errors_are_true(antithetic, groups):
    """Scores with a known slope along a direction: over many steps the mean is right and the spread is the error's."""
    population, noise = Population(64, antithetic, groups), NoiseBank(7, SHAPES)
    direction = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()
    }
    length = float(flat(direction.values()).norm())
    found = []
    for step in range(200):
        factors = noise.draw(step, range(population.num_directions))
        projected = projections([(slice(None), factors)], direction, population)
        other = torch.randn(64, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        scores = 0.6 * projected / length + 0.8 * other  # of unit deviation
        found.append(slope(scores, projected, length, population))
    values = torch.tensor([s.value for s in found])
    errors = torch.tensor([s.error for s in found])
    assert float(values.mean()) == pytest.approx(0.6, abs=3 * float(values.std()) / 200**0.5)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.2)


def test_projections_are_those_of_the_written_out_perturbations():
    population, noise = Population(6, True), NoiseBank(7, SHAPES, rank=3)
    factors = noise.draw(0, range(3))
    direction = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    dense = sum((factors[name].dense() * direction[name]).sum(dim=(1, 2)) for name in SHAPES)
    expected = torch.stack([dense, -dense], dim=1).flatten().double()
    torch.testing.assert_close(
        projections([(slice(None), factors)], direction, population), expected, rtol=1e-5, atol=1e-5
    )


def test_a_turn_is_called_two_errors_below_the_maximum():
    turn = Turn()
    assert [turn.add(change, 0.1) for change in (0.5, 0.2, -0.1, 0.3)] == ["top", "top", "below", "top"]
    assert turn.total == turn.top == pytest.approx(0.9)
    assert turn.add(-0.15, 0.1) == "below"  # limit 0.2
    assert turn.add(-0.12, 0.1) == "below"  # 0.27 below, limit 2 sqrt(2) 0.1 = 0.283
    assert turn.add(-0.10, 0.1) == "turned"  # 0.37 below, limit 0.346


def test_travel_left_is_the_sum_of_the_steps_to_come():
    lengths = [first_step(0.7, 9) * (1 - step / 9) for step in range(9)]
    for done in range(10):
        assert travel_left(0.7, done, 9) == pytest.approx(sum(lengths[done:]))
    assert travel_left(0.7, 12, 9) == 0
