"""The mathematics of evolution strategies: keys, noise, members, the fused population forward, fitness, estimate."""

from .estimator import direction_weights, estimate, gradient, pair_snr
from .fitness import Fitness, compute_fitness
from .keys import make_generator, make_seed
from .members import Population
from .noise import Factors, NoiseBank, Perturbations, StepNoise
from .population import PopulationForward, PopulationShapeError, Site
from .slopes import Slope, Turn, projections, slope
from .update import MeanUpdate, first_step, mean_step, travel_left


__all__ = [
    "Factors",
    "Fitness",
    "MeanUpdate",
    "NoiseBank",
    "Perturbations",
    "Population",
    "PopulationForward",
    "PopulationShapeError",
    "Site",
    "Slope",
    "StepNoise",
    "Turn",
    "compute_fitness",
    "direction_weights",
    "estimate",
    "first_step",
    "gradient",
    "make_generator",
    "make_seed",
    "mean_step",
    "pair_snr",
    "projections",
    "slope",
    "travel_left",
]
