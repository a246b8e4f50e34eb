"""Runs of seconds for the trainer's tests: the shipped model, few members, and rewards that cost nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from es_trl import ESConfig, ESTrainer


SMALL = {"height": 32, "width": 32}  # half the cost of the shipped model's own 64, for what does not depend on it
WHOLE = {"height": None, "width": None}
PROMPTS = ["a red apple", "two blue cats", "a green frog", "a pink dog", "three yellow stars", "a brown chair"]


def redness(images, **_):
    """Red minus green and blue, averaged over the picture."""
    means = [np.asarray(image.convert("RGB"), dtype=np.float64).mean(axis=(0, 1)) for image in images]
    return [mean[0] - mean[1:].mean() for mean in means]


def brightness(images, **_):
    return [float(np.asarray(image.convert("L"), dtype=np.float64).mean()) for image in images]


def tiny_config(output_dir: Path | str, **overrides) -> ESConfig:
    """Four members on two prompts, three steps; nothing written unless a test asks for it."""
    quiet = {"sample_steps": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    small = {"max_steps": 3, "population_size": 4, "prompts_per_step": 2, "prompts_per_member": None, "sigma": 0.1,
             "lora_rank": 2, "members_per_forward": 4} | SMALL  # fmt: skip
    return ESConfig(output_dir=str(output_dir), max_sequence_length=16, use_cpu=True, **(small | quiet | overrides))


def tiny_trainer(
    output_dir: Path | str, reward_funcs=redness, model="tiny-sana-sprint", self_check=None, **options
) -> ESTrainer:
    """
    Keywords that are not the trainer's go to the config. `self_check`: whether the run begins by drawing two members
    together and alone, which is a third of it; models of a test's own do.
    """
    fields = {field.name for field in dataclasses.fields(ESConfig)}
    config = {name: options.pop(name) for name in list(options) if name in fields}
    options = {"train_dataset": PROMPTS} | options
    if model != "tiny-sana-sprint":
        config = WHOLE | config
    trainer = ESTrainer(model, reward_funcs, args=tiny_config(output_dir, **config), **options)
    if not (model != "tiny-sana-sprint" if self_check is None else self_check):
        trainer.rollout._checked = True
    return trainer


def theta_of(trainer: ESTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.adapter.theta.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
