"""The trained reward rises and a held-out one falls: said, counted, and if asked for the end of the run."""

import logging

import numpy as np
import pytest
import torch
from tiny_runs import PROMPTS, brightness, tiny_trainer

from es_trl.run.early_warning import EarlyWarningCallback


def move(trainer, amount=0.3):
    """Moves theta as training does: far enough that every picture changes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.adapter.theta.values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


class Distance:
    """How far each picture is from the first one it saw of its prompt, times `factor`: nought for the base."""

    def __init__(self, name, factor):
        self.__name__, self.factor, self.first = name, factor, {}

    def __call__(self, prompts, images, **_):
        values = []
        for prompt, image in zip(prompts, images, strict=True):
            pixels = np.asarray(image.convert("L"), dtype=np.float64)
            values.append(self.factor * np.abs(pixels - self.first.setdefault(prompt, pixels)).mean())
        return values


class Level:
    """A value that the test sets: all prompts differ alike, so there is no interval, and yet no doubt."""

    def __init__(self, name):
        self.__name__, self.value = name, 0.0

    def __call__(self, images, **_):
        return [self.value] * len(images)


def watched_trainer(folder, factor, **options):
    """Its reward rises when theta moves; the held-out one does so times `factor`."""
    return tiny_trainer(
        folder,
        Distance("trained", 1.0),
        eval_dataset=PROMPTS * 2,
        eval_reward_funcs=[Distance("watched", factor)],
        **options,
    )


@pytest.mark.parametrize(("factor", "warned"), [(-1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_hacked_reward_is_said_and_a_healthy_one_is_not(tmp_path, factor, warned, caplog):
    trainer = watched_trainer(tmp_path, factor)
    with caplog.at_level(logging.WARNING, logger="es_trl"):
        trainer.evaluate()
        assert trainer.state.log_history[-1]["eval_early_warning"] == 0.0, "the base is not hacked"
        move(trainer)
        metrics = trainer.evaluate()
    assert metrics["eval_early_warning"] == trainer.state.log_history[-1]["eval_early_warning"] == warned
    assert ("Early warning" in caplog.text and "watched" in caplog.text) == bool(warned)
    assert not trainer.control.should_training_stop


def test_stop_ends_the_training(tmp_path):
    """The base is the reference though nobody asked for its evaluation; theta has moved before the first one."""
    trainer = watched_trainer(tmp_path, -1.0, early_warning="stop", eval_strategy="steps", eval_steps=1, max_steps=3)
    trainer.evaluate()  # the functions see the base first
    move(trainer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_fall_from_the_best_evaluation_counts(tmp_path):
    """The held-out reward rises first; what is lost since then is seen though it is still above the base."""
    reward, watched = Level("trained"), Level("watched")
    trainer = tiny_trainer(tmp_path, reward, eval_dataset=PROMPTS * 2, eval_reward_funcs=[watched])
    for reward.value, watched.value, expected in ((0, 0, 0.0), (1, 10, 0.0), (2, 5, 1.0), (1.5, 11, 0.0)):
        assert trainer.evaluate()["eval_early_warning"] == expected


def test_a_lower_diversity_warns_too(tmp_path):
    """Measured with two images per prompt and a reward built on CLIP; it falls because the best one is set higher."""
    reward = Level("trained")
    trainer = tiny_trainer(
        tmp_path, [reward, "tiny-clip-heldout"], reward_weights=[1.0, 0.0], eval_dataset=PROMPTS * 2,
        eval_images_per_prompt=2,
    )  # fmt: skip
    first = trainer.evaluate()
    assert first["eval_diversity"] > 0 and first["eval_early_warning"] == 0.0
    warning = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyWarningCallback))
    watched = warning.best["diversity"].watched["diversity"]
    watched[:] += 1.0 + np.arange(watched.size).reshape(watched.shape) / 100
    reward.value = 5.0
    assert trainer.evaluate()["eval_early_warning"] == 1.0


def test_other_prompts_are_compared_with_the_base_not_with_the_best(tmp_path):
    """As many of them, so that only their text tells the two evaluations apart."""
    reward, watched = Level("trained"), Level("watched")
    first, other = PROMPTS[:3] * 3, PROMPTS[3:6] * 3
    trainer = tiny_trainer(tmp_path, reward, eval_dataset=first, eval_reward_funcs=[watched])
    for reward.value, watched.value, prompts in ((0, 0, first), (1, 10, first), (2, 5, other)):
        metrics = trainer.evaluate(prompts)
    assert metrics["eval_early_warning"] == 0.0


@pytest.mark.parametrize("options", [{}, {"early_warning": "off", "eval_reward_funcs": [brightness]}])
def test_nothing_held_out_or_off_is_silent(tmp_path, options):
    trainer = tiny_trainer(tmp_path, Level("trained"), eval_dataset=PROMPTS[:2], **options)
    assert "eval_early_warning" not in trainer.evaluate()


def test_an_unknown_choice_is_named(tmp_path):
    with pytest.raises(ValueError, match="early_warning must be one of off, warn, stop; got 'loud'"):
        tiny_trainer(tmp_path, brightness, early_warning="loud")
