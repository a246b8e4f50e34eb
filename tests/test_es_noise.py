"""Keys, noise and members: every random number is a function of its key, and nothing else."""

import math

import pytest
import torch

from es_trl.es import (
    Factors,
    NoiseBank,
    Population,
    StepNoise,
    estimate,
    make_generator,
    make_seed,
    noise,
    projections,
)


SHAPES = {"first": (3, 5), "second": (4, 2)}


# --- keys ---


def test_a_key_always_names_the_same_seed():
    """Golden values, the same in every process and on every machine: another hash would change every published run."""
    assert make_seed(0, "noise", 0, 0, 0) == 588176884
    assert make_seed(42, "latents", 7, 3, 1) == 2846716963
    assert 0 <= make_seed(2**70, "noise", -1) < 2**32


def test_different_keys_name_different_seeds():
    keys = [
        (seed, tag, a, b) for seed in range(5) for tag in ("noise", "latents") for a in range(10) for b in range(10)
    ]
    assert len({make_seed(*key) for key in keys}) == len(keys)
    assert make_seed(1, "noise", 11, 1) != make_seed(1, "noise", 1, 11) != make_seed(1, "noise", 111)


def test_a_generator_is_on_the_cpu_and_fresh():
    first, second = make_generator(1, "latents", 2), make_generator(1, "latents", 2)
    assert first.device.type == "cpu"
    torch.randn(3, generator=first)
    assert torch.equal(torch.randn(4, generator=make_generator(1, "latents", 2)), torch.randn(4, generator=second))


# --- noise ---


@pytest.mark.parametrize("rank", [1, 3])
def test_noise_is_bitwise_a_function_of_its_key(rank):
    """Whichever other directions are drawn with it, in whatever order, and whatever the global generator did."""
    bank = NoiseBank(3, SHAPES, rank=rank)
    torch.manual_seed(0)
    together = bank.draw(6, range(5))
    torch.manual_seed(123)
    alone = NoiseBank(3, SHAPES, rank=rank).draw(6, [4, 2])
    for name, (m, n) in SHAPES.items():
        assert together[name].U.shape == (5, m, rank) and together[name].V.shape == (5, n, rank)
        for row, direction in enumerate([4, 2]):
            assert torch.equal(alone[name].U[row], together[name].U[direction])
            assert torch.equal(alone[name].V[row], together[name].V[direction])


def test_threads_change_the_time_alone(monkeypatch):
    alone = NoiseBank(0, SHAPES).draw(4, range(16))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr("es_trl.es.noise.THREADS_FROM", 0)
    assert torch.equal(NoiseBank(0, SHAPES).draw(4, range(16)).flat, alone.flat)


def test_a_choice_of_directions_is_that_of_every_matrix():
    factors, chosen = NoiseBank(0, SHAPES, rank=2).draw(0, range(3)), torch.tensor([2, 0, 2])
    for name, own in factors.select(chosen).items():
        assert torch.equal(own.dense(), factors[name].select(chosen).dense())
        assert torch.allclose(factors.scaled(8.0)[name].dense(), 8 * factors[name].dense())


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.randn(2)
    torch.manual_seed(1)
    NoiseBank(0, SHAPES).draw(0, range(3))
    assert torch.equal(torch.randn(2), expected)


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 1}, {"micro": 1}, {"direction": 1}], ids=str)
def test_every_part_of_the_key_counts(other):
    def draw(seed=3, step=0, micro=0, direction=0):
        return NoiseBank(seed, SHAPES).draw(step, [direction], micro)["first"].U

    assert not torch.equal(draw(), draw(**other))


def test_noise_reuse_shares_a_draw_between_consecutive_steps():
    bank = NoiseBank(0, SHAPES, reuse=3)
    draws = [bank.draw(step, [0])["second"].V for step in range(6)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    assert torch.equal(draws[3], draws[5]) and not torch.equal(draws[0], draws[3])


@pytest.mark.parametrize("rank", [1, 4])
def test_entries_of_a_perturbation_have_mean_zero_and_variance_one(rank):
    dense = NoiseBank(0, {"w": (6, 7)}, rank=rank).draw(0, range(4000))["w"].dense()
    assert dense.shape == (4000, 6, 7)
    assert dense.mean(dim=0).abs().max() < 0.1
    assert (dense.square().mean(dim=0) - 1).abs().max() < 0.25  # rank 1 has heavy tails: E E^4 = 9
    flat = dense.flatten(1)
    covariance = flat.T @ flat / len(flat)
    assert (covariance - torch.eye(42)).abs().max() < 0.25, "entries are uncorrelated"


def test_dense_is_the_written_out_sum():
    factors = Factors(torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    expected = sum(factors.U[1, :, k, None] * factors.V[1, None, :, k] for k in range(4)) / 2.0
    torch.testing.assert_close(factors.dense()[1], expected)


@pytest.mark.parametrize("field", ["rank", "reuse"])
def test_noise_options_below_one_are_errors(field):
    with pytest.raises(ValueError, match=f"noise_{field} must be at least 1.*got 0"):
        NoiseBank(0, SHAPES, **{field: 0})


# --- members ---


def test_antithetic_members_come_in_pairs():
    population = Population(6)
    assert population.num_directions == 3
    assert population.directions(range(6)) == [0, 0, 1, 1, 2, 2]
    assert population.signs([0, 1, 4, 5]).tolist() == [1, -1, 1, -1]


def test_independent_members_have_directions_of_their_own():
    population = Population(5, antithetic=False)
    assert population.num_directions == 5
    assert population.directions([3, 1]) == [3, 1]
    assert population.signs([3, 1]).tolist() == [1, 1]


def test_chunks_cover_every_member_once_in_order():
    assert Population(6).chunks(4) == [[0, 1, 2, 3], [4, 5]]
    assert Population(4).chunks(100) == [[0, 1, 2, 3]]


def test_a_pair_is_dropped_whole_and_an_independent_member_alone():
    valid = torch.tensor([True, False, True, True, False, False])
    assert Population(6).drop_incomplete(valid).tolist() == [False, False, True, True, False, False]
    assert Population(6, antithetic=False).drop_incomplete(valid).tolist() == valid.tolist()


def test_sizes_that_cannot_be_a_population_are_errors():
    with pytest.raises(ValueError, match="even because antithetic members come in pairs, got 5; use 6"):
        Population(5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Population(1, antithetic=False)


@pytest.mark.parametrize("antithetic", [False, True])
def test_noise_that_is_too_large_to_be_held_is_drawn_again_by_every_use(monkeypatch, antithetic):
    population = Population(10, antithetic=antithetic)
    bank, fitness = NoiseBank(7, SHAPES, rank=2), torch.randn(10, generator=torch.Generator().manual_seed(1))
    along = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    whole = StepNoise(bank, 3, population.num_directions, micro=1)
    monkeypatch.setattr(noise, "HELD", 2 * bank.size)
    few = StepNoise(bank, 3, population.num_directions, micro=1)
    most, draw = [], bank.draw
    monkeypatch.setattr(bank, "draw", lambda step, of, *rest: most.append(len(of)) or draw(step, of, *rest))
    chosen = torch.tensor([1, 4, 1]) % population.num_directions
    for a, b in ((whole, few), (whole.scaled(4.0), few.scaled(4.0))):
        assert torch.equal(a.select(chosen).flat, b.select(chosen).flat)
    for name in SHAPES:
        ((_, all_of_it),) = whole.blocks()
        parts = [estimate(block[name], fitness, population, part) for part, block in few.blocks()]
        assert len(parts) == math.ceil(population.num_directions / 2)
        torch.testing.assert_close(sum(parts), estimate(all_of_it[name], fitness, population))
    expected = projections(whole.blocks(), along, population)
    torch.testing.assert_close(projections(few.blocks(), along, population), expected, rtol=1e-5, atol=1e-5)
    assert max(most) == 3, "three were chosen; blocks have two"
