"""Sampling steps as Gaussian policies: densities, divergences, and the pipeline's own call as rollout and replay."""

import math

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from tiny_pipelines import PROMPTS, fresh_sprint, sana, stable_diffusion

from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, Gaussian, PipelineAdapter, PolicySampler, PolicySettings
from es_trl.pipelines.policy import flow_sde_transition
from es_trl.pipelines.scheduler_steps import Step, gaussian_of
from recipes.benchmarks.tiny_models import MODELS


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


VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def step_of(scheduler, place: int = 1, **kwargs) -> Step:
    """A step in the middle of four, on random latents."""
    scheduler.set_timesteps(4, **({"intermediate_timesteps": None} if isinstance(scheduler, SCMScheduler) else {}))
    sample, output = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    time = scheduler.timesteps[place]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(sample, time)
    return Step(scheduler, scheduler.step, output, time, sample, kwargs=kwargs)


def alphas(scheduler) -> tuple[float, float]:
    """alpha_bar now and next, by the definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, 0)
    return tuple(float(bars[int(scheduler.timesteps[i])]) for i in (1, 2))


def scm(step):
    s, t = (float(step.scheduler.timesteps[i]) for i in (1, 2))
    clean = math.cos(s) * step.sample - math.sin(s) * step.model_output
    return math.cos(t) * clean, math.sin(t) * 0.5


def ddim(step):
    """arXiv 2010.02502, Eq. 12 and 16, eta = 0.7."""
    now, following = alphas(step.scheduler)
    sigma = 0.7 * math.sqrt((1 - following) / (1 - now) * (1 - now / following))
    clean = (step.sample - math.sqrt(1 - now) * step.model_output) / math.sqrt(now)
    return math.sqrt(following) * clean + math.sqrt(1 - following - sigma**2) * step.model_output, sigma


def ddim_of_velocity(step):
    now, following = alphas(step.scheduler)
    sigma = 0.7 * math.sqrt((1 - following) / (1 - now) * (1 - now / following))
    clean = math.sqrt(now) * step.sample - math.sqrt(1 - now) * step.model_output
    noise = math.sqrt(now) * step.model_output + math.sqrt(1 - now) * step.sample
    return math.sqrt(following) * clean + math.sqrt(1 - following - sigma**2) * noise, sigma


def ddpm(step):
    """arXiv 2006.11239, Eq. 6 and 7: the posterior of the forward process."""
    now, following = alphas(step.scheduler)
    ratio = now / following
    clean = (step.sample - math.sqrt(1 - now) * step.model_output) / math.sqrt(now)
    mean = math.sqrt(following) * (1 - ratio) * clean + math.sqrt(ratio) * (1 - following) * step.sample
    return mean / (1 - now), math.sqrt((1 - following) / (1 - now) * (1 - ratio))


def ancestral(step):
    """Noise levels sqrt((1 - alpha_bar) / alpha_bar); down to the level that the new noise leaves room for."""
    now, following = (math.sqrt((1 - bar) / bar) for bar in alphas(step.scheduler))
    up = math.sqrt(following**2 * (now**2 - following**2) / now**2)
    return step.sample + step.model_output * (math.sqrt(following**2 - up**2) - now), up


def lcm(step):
    """arXiv 2310.04378: the consistency function with its boundary, then noised again."""
    now, following = alphas(step.scheduler)
    scaled = 10.0 * float(step.timestep)
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    clean = (step.sample - math.sqrt(1 - now) * step.model_output) / math.sqrt(now)
    return math.sqrt(following) * (out * clean + skip * step.sample), math.sqrt(1 - following)


def flow_again(step):
    now, following = (float(step.scheduler.sigmas[i]) for i in (1, 2))
    return (1 - following) * (step.sample - now * step.model_output), following


STEPS = {
    "consistency (TrigFlow)": (lambda: SCMScheduler(), {}, scm),
    "DDIM, eta of the rollout": (lambda: DDIMScheduler(**VP, clip_sample=False), {}, ddim),
    "DDIM, eta of the call": (lambda: DDIMScheduler(**VP, clip_sample=False), {"eta": 0.7}, ddim),
    "DDIM of a v-prediction": (
        lambda: DDIMScheduler(**VP, clip_sample=False, prediction_type="v_prediction"), {}, ddim_of_velocity,
    ),
    "DDPM": (lambda: DDPMScheduler(**VP, clip_sample=False), {}, ddpm),
    "Euler ancestral": (lambda: EulerAncestralDiscreteScheduler(**VP, steps_offset=1), {}, ancestral),
    "LCM": (lambda: LCMScheduler(**VP, clip_sample=False), {}, lcm),
    "flow, noised again": (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}, flow_again),
    "flow LCM": (lambda: FlowMatchLCMScheduler(), {}, flow_again),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_formula_of_its_paper(name):
    make, kwargs, formula = STEPS[name]
    step = step_of(make(), **kwargs)
    before = {k: v for k, v in vars(step.scheduler).items() if k != "is_scale_input_called"}
    gaussian = gaussian_of(step, noise_level=0.3 if kwargs else 0.7)
    mean, std = formula(step)
    x = mean + 1.3 * std
    torch.testing.assert_close(gaussian.mean, mean, atol=2e-5, rtol=1e-5)
    assert gaussian.std.item() == pytest.approx(std, rel=1e-5)
    direct = torch.distributions.Normal(mean.double(), std).log_prob(x.double()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian.log_prob(x).double(), direct, atol=1e-4, rtol=0)
    assert all(vars(step.scheduler)[k] is v for k, v in before.items()), "the scheduler has not moved"
    noise = torch.randn(step.sample.shape, generator=torch.Generator().manual_seed(3))
    if name != "DDIM, eta of the rollout" and "v-prediction" not in name:
        own = step.function(
            step.model_output, step.timestep, step.sample, **kwargs, generator=torch.Generator().manual_seed(3)
        )
        torch.testing.assert_close(gaussian.sample(noise), own.prev_sample, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def test_a_rollout_of_a_sampler_with_noise_of_its_own_is_the_stock_pipelines(scheduler):
    adapter = diffusion(scheduler)
    own = generators()
    images, trajectory = sampler_of(adapter, 4).rollout(PROMPTS, own, own, output_type="pt")
    torch.testing.assert_close(images, adapter.generate(PROMPTS, generators(), output_type="pt"), atol=1e-4, rtol=0)
    assert trajectory.steps == [0, 1, 2]


def diffusion(scheduler=DDIMScheduler, **config):
    """Stable Diffusion with a scheduler made from its own."""
    pipe = stable_diffusion()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    return moved(PipelineAdapter(pipe, settings=CallSettings(num_inference_steps=4, guidance_scale=3.0)))


@pytest.fixture(scope="module")
def ddim_unet():
    return diffusion()


@pytest.fixture(scope="module")
def ddpm_unet():
    return diffusion(DDPMScheduler)


@pytest.fixture(scope="module")
def ancestral_unet():
    return diffusion(EulerAncestralDiscreteScheduler, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def lcm_unet():
    return diffusion(LCMScheduler)


@pytest.fixture(scope="module")
def tcd_unet():
    return diffusion(TCDScheduler)


@pytest.fixture(scope="module")
def pndm_unet():
    """A deterministic sampler that remembers: its rollouts are DDIM's."""
    return diffusion(PNDMScheduler, skip_prk_steps=True)


# --- replays ---

CASES = {
    "sprint, 2 steps": ("sprint", 2, {}, None),
    "sprint, 3 steps of its own times": ("sprint", 3, {"intermediate_times": [1.1, 0.5]}, None),
    "sprint, 1 step with output noise": ("sprint", 1, {"output_noise": 0.1}, None),
    "flow": ("flow", 4, {}, None),
    "flow, window": ("flow", 5, {}, [2, 3]),
    "flow, output noise": ("flow", 1, {"output_noise": 0.1}, None),
    "DDIM": ("ddim_unet", 4, {"noise_level": 1.0}, None),
    "DDIM, window": ("ddim_unet", 5, {}, [2, 3]),
    "DDPM": ("ddpm_unet", 4, {}, None),
    "Euler ancestral": ("ancestral_unet", 4, {}, None),
    "Euler ancestral, window": ("ancestral_unet", 5, {}, [1, 2]),
    "LCM": ("lcm_unet", 4, {"output_noise": 0.1}, None),
    "TCD": ("tcd_unet", 4, {}, None),
    "PNDM": ("pndm_unet", 4, {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_replayed_ratios_are_one_before_the_first_update(request, name):
    fixture, steps, settings, trained = CASES[name]
    adapter = request.getfixturevalue(fixture)
    sampler = sampler_of(adapter, steps, **settings)
    _, trajectory = sampler.rollout(PROMPTS, generators(), generators("n"), trained, output_type="latent")
    seen = []

    def visit(index, gaussian, state, rows=slice(None), limit=1e-6):
        seen.append(index)
        assert gaussian.mean.requires_grad
        ratio = torch.exp(gaussian.log_prob(state) - trajectory.log_probs[index][rows])
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=limit, rtol=0)

    sampler.replay(trajectory, generators(), visit)
    assert seen == trajectory.steps == (trained or sampler.stochastic_steps)
    # Other rows in the batch change rounding only.
    sampler.replay(trajectory.rows(slice(1, 2)), generators()[1:2], lambda *a: visit(*a, slice(1, 2), 5e-6))
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
    with pytest.raises(ValueError, match="intermediate_times is for consistency models"):
        sampler_of(flow, 2, intermediate_times=[0.5])


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_sampler_without_density_lends_its_noise_levels_to_one_that_has(scheduler, caplog):
    adapter = diffusion(scheduler)
    own = adapter.pipe.scheduler
    sampler = sampler_of(adapter, 3)
    assert isinstance(sampler.scheduler, DDIMScheduler)
    assert f"Rollouts draw with DDIMScheduler, made from the pipeline's {scheduler.__name__}" in caplog.text
    sampler.rollout(PROMPTS, generators(), generators("n"), output_type="latent")
    assert adapter.pipe.scheduler is own and "step" not in vars(sampler.scheduler)


def test_a_flow_with_a_higher_order_solver_draws_rollouts_by_euler():
    adapter = PipelineAdapter(sana("dpm"), settings=CallSettings(num_inference_steps=4, max_sequence_length=16))
    scheduler = sampler_of(adapter, 4).scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.shift == 3.0


def test_schedulers_without_gaussian_steps_are_refused_with_the_way_out():
    adapter = diffusion()
    adapter.pipe.scheduler = CogVideoXDPMScheduler()
    with pytest.raises(ValueError, match="CogVideoXDPMScheduler, whose step takes other things.*or use ESTrainer"):
        sampler_of(adapter)


# --- pipelines whose calls cannot be a policy's ---


@pytest.mark.parametrize("name", ["SanaImageToVideoPipeline", "SkyReelsV2DiffusionForcingPipeline"])
def test_a_call_that_cannot_be_is_one_sentence(name):
    """One takes no lists of pictures, the other steps with copies of its scheduler, frame by frame."""
    model = next(model for model in MODELS if model.name == name)
    sampler = sampler_of(PipelineAdapter(model.pipeline(), settings=model.settings()), steps=3)
    for rows, way in ((2, "images_per_backward of 1, or use ESTrainer"), (1, "Use ESTrainer")):
        columns = {column: values[:rows] for column, values in model.columns.items()}
        drawn = PROMPTS[:rows], generators()[:rows], generators("noise")[:rows]
        with pytest.raises(ValueError, match=rf"{name} with .* cannot draw {rows} picture.s. in one call .*{way}"):
            sampler.rollout(*drawn, columns=columns)
