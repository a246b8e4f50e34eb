"""The mathematics of evolution strategies: keys, noise, members, the fused population forward, fitness, estimate."""

from .estimator import direction_weights, estimate, gradient, pair_snr
from .fitness import Fitness, compute_fitness
from .keys import make_generator, make_seed
from .members import Population
from .noise import Factors, NoiseBank
from .population import PopulationForward, PopulationShapeError, Site


__all__ = [
    "Factors",
    "Fitness",
    "NoiseBank",
    "Population",
    "PopulationForward",
    "PopulationShapeError",
    "Site",
    "compute_fitness",
    "direction_weights",
    "estimate",
    "gradient",
    "make_generator",
    "make_seed",
    "pair_snr",
]
