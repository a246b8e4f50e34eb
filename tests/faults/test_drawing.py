"""Too little memory (F19) and models whose numbers overflow (F20).

Running out of memory is simulated: CPUs have no such exception, so the pipeline raises CUDA's for a batch too large.
"""

import numpy as np
import pytest
import torch
from tiny_runs import theta_of
from toy_runs import toy_trainer, train


def limited(trainer, rows):
    """The pipeline runs out of memory above `rows` pictures; returns the batch sizes that were tried."""
    generate, tried = trainer.adapter.generate, []

    def generate_or_fail(prompts, generators, **kwargs):
        tried.append(len(prompts))
        if len(prompts) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(prompts, generators, **kwargs)

    trainer.adapter.generate = generate_or_fail
    return tried


def test_f19_fewer_members_at_a_time_and_the_same_population(tmp_path, caplog):
    """8 members of 2 images in batches of 4 pictures: as a run that began with 2 members per forward."""
    options = {"population_size": 8, "save_strategy": "no", "max_steps": 2}
    trainer = toy_trainer(tmp_path / "a", members_per_forward=8, **options)
    tried = limited(trainer, rows=5)
    trainer.train()
    assert set(tried[: tried.index(16)]) == {2, 4}, "the run's check of itself, by two members"
    assert tried[tried.index(16) :] == [16, 8, *[4] * 4, *[4] * 4], "halved twice, then remembered"
    warnings = [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()]
    assert len(warnings) == 2 and "members_per_forward=2" in warnings[1]
    small = train(tmp_path / "b", members_per_forward=2, **options)
    for name, value in theta_of(small).items():
        torch.testing.assert_close(theta_of(trainer)[name], value, atol=1e-5, rtol=1e-4)
    assert trainer.state.log_history[0]["reward"] == pytest.approx(small.state.log_history[0]["reward"], abs=1e-3)


def test_f19_a_single_member_too_large_is_an_error_with_what_to_do(tmp_path):
    trainer = toy_trainer(tmp_path, members_per_forward=2)
    start = theta_of(trainer)
    limited(trainer, rows=1)
    with pytest.raises(RuntimeError, match="single member of 2 images.*prompts_per_step.*dtype.*height, width"):
        trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in theta_of(trainer).items())


@pytest.mark.parametrize(("value", "black"), [(float("nan"), True), (float("inf"), True), (1.0, False)], ids=str)
def test_f20_numbers_that_overflowed_are_not_scored(tmp_path, value, black):
    trainer = toy_trainer(tmp_path, save_strategy="no", max_steps=1)
    layer = trainer.adapter.denoiser.to_out.base_layer
    layer.bias.data[:] = value
    if value == float("inf"):
        layer.bias.data[:6] = -value  # inf - inf
        layer.weight.data[:] = value
    if black:
        with pytest.raises(RuntimeError, match="12 of 12 pictures so far have no score.*ToyTransformer .float32"):
            trainer.train()
    else:
        trainer.train()
        assert np.isfinite(trainer.state.log_history[0]["reward"])
