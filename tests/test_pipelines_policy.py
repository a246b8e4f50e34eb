"""Sampling steps as Gaussian policies: densities, divergences, and the pipeline's own call as rollout and replay."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import PROMPTS, fresh_sprint, sana, stable_diffusion

from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, Gaussian, PipelineAdapter, PolicySampler, PolicySettings
from es_trl.pipelines.policy import flow_renoise_transition, flow_sde_transition, scm_transition


def generators(tag="latents"):
    return [make_generator(0, tag, i) for i in range(len(PROMPTS))]


def sampler_of(adapter, steps=2, **settings):
    return PolicySampler(adapter, PolicySettings(steps, **settings))


@pytest.fixture(scope="module")
def sprint():
    settings = CallSettings(num_inference_steps=1, guidance_scale=2.0, max_sequence_length=16)
    return moved(PipelineAdapter(fresh_sprint(), settings=settings))


@pytest.fixture(scope="module")
def flow():
    """Classifier-free guidance and several steps."""
    settings = CallSettings(num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16)
    return moved(PipelineAdapter(sana(), settings=settings))


def moved(adapter):
    """Theta away from its start, where the adapter does nothing."""
    with torch.no_grad():
        for i, parameter in enumerate(adapter.theta.values()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=make_generator(1, "move", i)))
    return adapter


# --- densities ---


def test_log_probability_is_the_normal_density_averaged_over_dimensions():
    mean, x = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    gaussian = Gaussian(mean, torch.tensor(0.3))
    direct = torch.distributions.Normal(mean, 0.3).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian.log_prob(x), direct)
    assert torch.equal(gaussian.sample(torch.zeros_like(mean)), mean)
    torch.testing.assert_close(gaussian.sample(x), mean + 0.3 * x)


def test_kl_is_the_mean_log_ratio():
    mean, other = torch.zeros(1, 5), torch.full((1, 5), 0.2)
    here, there = Gaussian(mean, torch.tensor(0.4)), Gaussian(other, torch.tensor(0.4))
    x = here.sample(torch.randn(200_000, 5, generator=torch.Generator().manual_seed(0)))
    draws = here.log_prob(x) - there.log_prob(x)
    assert here.kl(other).item() == pytest.approx(0.2**2 / (2 * 0.4**2))
    assert draws.mean().item() == pytest.approx(here.kl(other).item(), abs=4 * draws.std().item() / 200_000**0.5)


def test_scm_transition_noises_the_prediction():
    sample, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    s, t = torch.tensor(1.57080), torch.tensor(0.8)
    gaussian = scm_transition(output, sample, s, t, 0.5)
    clean = math.cos(1.57080) * sample - math.sin(1.57080) * output
    torch.testing.assert_close(gaussian.mean, math.cos(0.8) * clean)
    assert gaussian.std.item() == pytest.approx(0.5 * math.sin(0.8))


@pytest.mark.parametrize("noise_level", [0.0001, 0.3, 0.7, 1.0])
def test_the_sde_keeps_the_marginals_of_the_flow(noise_level):
    """Data N(1, 0.5^2), whose velocity is known: every noise level has to end in that distribution."""
    mean, spread, number = 1.0, 0.5, 200
    sigmas = torch.linspace(1, 0, number + 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    for i in range(number):
        sigma, following = sigmas[i], sigmas[i + 1]
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        residual = x - (1 - sigma) * mean
        velocity = sigma / variance * residual - (mean + (1 - sigma) * spread**2 / variance * residual)
        gaussian = flow_sde_transition(velocity, x, sigma, following, sigmas[1], noise_level)
        x = (
            gaussian.sample(torch.randn(x.shape, generator=generator))
            if i < number - 1
            else x + velocity * (following - sigma)
        )
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(spread, rel=0.05)


def test_without_noise_the_sde_is_the_euler_step():
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    for sigma, following in ((1.0, 0.8), (0.5, 0.25)):
        step = flow_sde_transition(v, x, torch.tensor(sigma), torch.tensor(following), torch.tensor(0.8), 1e-5)
        torch.testing.assert_close(step.mean, x + v * (following - sigma))
        assert step.std.item() < 1e-4


def test_the_scheduler_that_noises_again_is_a_policy_as_it_is():
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(3)
    x, v = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    stock = scheduler.step(v, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(3))[0]
    gaussian = flow_renoise_transition(v, x, scheduler.sigmas[0], scheduler.sigmas[1])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(gaussian.sample(noise), stock)


# --- rollouts ---


def test_a_consistency_models_rollout_is_the_stock_pipelines(sprint):
    """Its sampler is stochastic already: given the same generators the pictures are the very same."""
    own = generators()
    images, trajectory = sampler_of(sprint).rollout(PROMPTS, own, own, output_type="pt")
    stock = sprint.generate(PROMPTS, generators(), num_inference_steps=2, output_type="pt")
    assert torch.equal(images, stock)
    assert trajectory.steps == [0] and "step" not in vars(sprint.pipe.scheduler)


def test_a_flow_models_rollout_without_noise_is_the_stock_pipelines(flow):
    stock = flow.generate(PROMPTS, generators(), output_type="latent")
    quiet, _ = sampler_of(flow, 4, noise_level=1e-6).rollout(
        PROMPTS, generators(), generators("n"), output_type="latent"
    )
    loud, _ = sampler_of(flow, 4).rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    torch.testing.assert_close(quiet, stock, atol=1e-4, rtol=1e-4)
    assert (loud - stock).abs().max() > 0.1


def test_images_of_a_rollout_do_not_depend_on_their_batch(flow):
    sampler = sampler_of(flow, 4)
    together, _ = sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    alone, _ = sampler.rollout(PROMPTS[1:2], generators()[1:2], generators("n")[1:2], output_type="latent")
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)


def test_intermediate_times_are_followed(sprint):
    sampler = sampler_of(sprint, 3, intermediate_times=[1.1, 0.5])
    sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    assert sprint.pipe.scheduler.timesteps.tolist() == pytest.approx([1.5708, 1.1, 0.5, 0.0])
    assert "set_timesteps" not in vars(sprint.pipe.scheduler)


def test_output_noise_makes_one_step_a_policy(sprint):
    sampler = sampler_of(sprint, 1, output_noise=0.1)
    drawn, trajectory = sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    stock = sprint.generate(PROMPTS, generators(), output_type="latent")
    assert trajectory.steps == [0]
    assert (drawn - stock).std().item() == pytest.approx(0.1, rel=0.1), "latents are given out in units of sigma_data"


# --- replays ---

CASES = {
    "sprint, 2 steps": ("sprint", 2, {}, None),
    "sprint, 3 steps of its own times": ("sprint", 3, {"intermediate_times": [1.1, 0.5]}, None),
    "sprint, 1 step with output noise": ("sprint", 1, {"output_noise": 0.1}, None),
    "flow": ("flow", 4, {}, None),
    "flow, window": ("flow", 5, {}, [2, 3]),
}


@pytest.mark.parametrize("name", CASES)
def test_replayed_ratios_are_one_before_the_first_update(request, name):
    fixture, steps, settings, trained = CASES[name]
    adapter = request.getfixturevalue(fixture)
    sampler = sampler_of(adapter, steps, **settings)
    _, trajectory = sampler.rollout(PROMPTS, generators(), generators("n"), trained, output_type="latent")
    seen = []

    def visit(index, gaussian, state, rows=slice(None)):
        seen.append(index)
        assert gaussian.mean.requires_grad
        ratio = torch.exp(gaussian.log_prob(state) - trajectory.log_probs[index][rows])
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)

    sampler.replay(trajectory, generators(), visit)
    assert seen == trajectory.steps == (trained or sampler.stochastic_steps)
    # Other rows in the batch change rounding only.
    sampler.replay(trajectory.rows(slice(1, 2)), generators()[1:2], lambda *a: visit(*a, rows=slice(1, 2)))
    assert adapter.generate(PROMPTS[:1], generators()[:1], output_type="latent").isfinite().all()


@pytest.mark.parametrize("fixture", ["sprint", "flow"])
def test_a_replay_that_skips_steps_sees_the_same(request, fixture):
    """The window's steps alone, without what lies before them."""
    adapter = request.getfixturevalue(fixture)
    sampler = sampler_of(adapter, 4, **({"intermediate_times": [1.2, 0.9, 0.4]} if fixture == "sprint" else {}))
    _, trajectory = sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    calls = []
    handle = adapter.denoiser.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    try:
        sampler.replay(trajectory, generators(), check(trajectory), grad=False, steps=[2])
    finally:
        handle.remove()
    assert len(calls) == 1, "the steps before cost no forward pass"


def check(trajectory):
    def visit(index, gaussian, state):
        torch.testing.assert_close(gaussian.log_prob(state), trajectory.log_probs[index], atol=1e-6, rtol=0)

    return visit


def test_images_that_start_alike_share_their_first_step(sprint):
    sampler = sampler_of(sprint, 3, intermediate_times=[1.1, 0.5])
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(3)]

    def starts():
        return [make_generator(0, "latents", i // 3) for i in range(6)]

    noise = [make_generator(0, "n", i) for i in range(6)]
    _, trajectory = sampler.rollout(prompts, starts(), noise, output_type="latent")
    rows = []
    handle = sprint.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )
    try:
        sampler.replay(trajectory, starts(), check(trajectory), grad=False, steps=[0], shared=3)
        assert rows == [2], "one row per group"
        sampler.replay(trajectory, starts(), check(trajectory), grad=False, shared=3)
    finally:
        handle.remove()


def test_the_reference_is_the_frozen_base(sprint):
    sampler = sampler_of(sprint)
    _, trajectory = sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    means = {}
    with sprint.adapter_disabled():
        sampler.replay(trajectory, generators(), lambda i, gaussian, _: means.update({i: gaussian.mean}), grad=False)
    base = PipelineAdapter(fresh_sprint(), settings=sprint.settings)
    _, untrained = sampler_of(base).rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    torch.testing.assert_close(means[0], untrained.means[0], atol=1e-5, rtol=0)
    assert (means[0] - trajectory.means[0]).abs().max() > 1e-3


def test_the_gradient_is_that_of_the_density(sprint):
    """Along a random direction in theta, against a central difference."""
    sampler = sampler_of(sprint, 2, intermediate_times=[0.8])
    _, trajectory = sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    target = torch.randn(trajectory.means[0].shape, generator=make_generator(0, "target"))
    direction = {
        name: torch.randn(p.shape, generator=make_generator(0, "direction", i))
        for i, (name, p) in enumerate(sprint.theta.items())
    }

    def value(_index, gaussian, _state):
        found.append(gaussian.log_prob(target).sum())

    found: list = []
    sampler.replay(trajectory, generators(), lambda *a: gaussian_backward(*a, target))
    slope = sum((sprint.theta[name].grad * d).sum().item() for name, d in direction.items())
    for sign in (1, -2):
        with torch.no_grad():
            for name, d in direction.items():
                sprint.theta[name].add_(sign * 1e-3 * d)
        sampler.replay(trajectory, generators(), value)
    with torch.no_grad():
        for name, d in direction.items():
            sprint.theta[name].add_(1e-3 * d)
    for parameter in sprint.theta.values():
        parameter.grad = None
    assert slope == pytest.approx((found[0] - found[1]).item() / 2e-3, rel=0.02)


def gaussian_backward(_index, gaussian, _state, target):
    gaussian.log_prob(target).sum().backward()


# --- what cannot be a policy ---


@pytest.mark.parametrize(
    ("steps", "settings", "message"),
    [
        (1, {}, "sample_num_steps=1 has no likelihood"),
        (3, {"intermediate_times": [0.8]}, "intermediate_times has 1 times for sample_num_steps=3: give 2"),
        (3, {"intermediate_times": [0.8, 0.9]}, "must fall"),
        (2, {"intermediate_times": [1.6]}, "between 0 and 1.5708"),
    ],
)
def test_settings_that_cannot_work(sprint, steps, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(sprint, steps, **settings)


def test_flow_models_refuse_what_is_for_consistency_models(flow):
    with pytest.raises(ValueError, match="output_noise is for consistency models"):
        sampler_of(flow, 4, output_noise=0.1)
    with pytest.raises(ValueError, match="intermediate_times is for consistency models"):
        sampler_of(flow, 2, intermediate_times=[0.5])


def test_other_schedulers_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="DDIMScheduler, whose steps have no density here.*or use ESTrainer"):
        sampler_of(PipelineAdapter(stable_diffusion()))
