"""Gradients reach theta and nothing else, and the denoising error is that of the pipeline's own prediction."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import PROMPTS, flux, fresh_sprint, sana, stable_diffusion

from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, DenoisingModel, DifferentiableForward, PipelineAdapter


def adapter_on(pipe, space="lora", **settings) -> PipelineAdapter:
    """Theta away from its start, where half of the gradients are zero."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    short = {} if hasattr(pipe, "unet") else {"max_sequence_length": 16}
    adapter = PipelineAdapter(pipe, config, space, CallSettings(**short | settings))
    torch.manual_seed(1)
    for parameter in adapter.theta.values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return adapter


def noisy_latents(model: DenoisingModel, count: int = 3):
    torch.manual_seed(2)
    latents, noise = torch.randn(2, count, *model.latent_shape)
    return latents, noise, torch.tensor([0.3, 0.783, 1.0])[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_sees_what_the_pipeline_draws_with(dtype):
    adapter = adapter_on(fresh_sprint(dtype), "lora_xs")
    model, forward = DenoisingModel(adapter), DifferentiableForward(adapter)
    latents, noise, levels = noisy_latents(model)
    adapter.write_back()
    with torch.no_grad():
        plain = model.predict(latents, levels, PROMPTS)
        with forward.enabled():
            differentiable = model.predict(latents, levels, PROMPTS)
            with adapter.adapter_disabled():
                base = model.predict(latents, levels, PROMPTS)
        with adapter.adapter_disabled():
            assert torch.equal(base, model.predict(latents, levels, PROMPTS))
    assert torch.equal(plain, differentiable)
    assert (plain - base).abs().max() > 0.01
    assert not any("forward" in vars(module) for module in adapter.denoiser.modules()), "nothing is left behind"


@pytest.mark.parametrize("space", ["lora", "lora_b", "lora_xs"])
def test_gradient_is_the_slope(space):
    """Along a random direction, against a central difference; and nothing frozen gets a gradient."""
    adapter = adapter_on(fresh_sprint(), space)
    model, forward = DenoisingModel(adapter), DifferentiableForward(adapter)
    latents, noise, levels = noisy_latents(model)

    def loss() -> torch.Tensor:
        with forward.enabled():
            return model.error(latents, noise, levels, PROMPTS).sum()

    loss().backward()
    for module in (adapter.denoiser, adapter.pipe.vae):
        assert all(parameter.grad is None for parameter in module.parameters())
    direction = {name: torch.randn_like(value) for name, value in adapter.theta.items()}
    slope = sum(float((adapter.theta[name].grad * way).sum()) for name, way in direction.items())
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for name, way in direction.items():
                adapter.theta[name] += step * way
            values.append(float(loss()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)
    assert all(value.grad.any() for value in adapter.theta.values())


def test_a_convolution_has_gradients_too():
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["conv1", "to_q"], init_lora_weights=False)
    adapter = PipelineAdapter(stable_diffusion(), config)
    forward = DifferentiableForward(adapter)
    with forward.enabled():
        output = adapter.denoiser(torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 5, 16)).sample
        output.square().sum().backward()
    assert all(value.grad.any() for value in adapter.theta.values())


def test_switching_the_adapter_off_and_on_changes_no_bit():
    """A run that has asked the base something continues as one that has not: resuming is bit-identical."""
    adapter = adapter_on(fresh_sprint(), guidance_scale=2.0, num_inference_steps=1)

    def draw() -> torch.Tensor:
        return adapter.generate(PROMPTS, [make_generator(0, "latents", i) for i in range(3)], output_type="latent")

    first = draw()
    with adapter.adapter_disabled():
        assert not torch.equal(draw(), first)
    assert torch.equal(draw(), first)
    with adapter.adapter_scale(0.5):
        assert not torch.equal(draw(), first)
    assert torch.equal(draw(), first)


def test_weight_space_is_refused():
    with pytest.raises(ValueError, match="es_space='weight'.*lora_xs"):
        DifferentiableForward(adapter_on(fresh_sprint(), "weight"))


# ---- the denoising model ----


def test_the_prediction_at_pure_noise_is_the_one_step_picture():
    adapter = adapter_on(fresh_sprint(), num_inference_steps=1, guidance_scale=3.0)
    model = DenoisingModel(adapter)
    generators = [make_generator(0, "latents", i) for i in range(3)]
    drawn = adapter.generate(PROMPTS, generators, output_type="latent")
    noise = torch.stack([torch.randn(model.latent_shape, generator=make_generator(0, "latents", i)) for i in range(3)])
    with torch.no_grad():
        predicted = -model.predict(noise, torch.ones(3), PROMPTS)
    assert (predicted - drawn).abs().max() < 2e-4  # the scheduler's pi / 2 is rounded to 1.57080


def test_error_of_sana_sprint_is_that_of_trigflow():
    """`|| F - (cos t eps - sin t z) ||^2`, with F combined as in the pipeline's `__call__`."""
    adapter = adapter_on(fresh_sprint(), guidance_scale=2.0)
    model = DenoisingModel(adapter)
    z, eps, levels = noisy_latents(model)
    t = torch.atan2(levels, 1 - levels)[:, None, None, None]
    tau = t.sin() / (t.sin() + t.cos())
    x_t = t.cos() * z + t.sin() * eps
    norm = (tau**2 + (1 - tau) ** 2).sqrt()
    with torch.no_grad():
        x = x_t * norm
        embeds, mask = adapter.pipe.encode_prompt(PROMPTS, max_sequence_length=16)
        scale = torch.full((3,), 2.0 * adapter.denoiser.config.guidance_embeds_scale)
        v = adapter.denoiser(
            x, encoder_hidden_states=embeds, encoder_attention_mask=mask, guidance=scale, timestep=tau.flatten()
        ).sample
        F = ((1 - 2 * tau) * x + (1 - 2 * tau + 2 * tau**2) * v) / norm
        direct = (F - (t.cos() * eps - t.sin() * z)).square().mean(dim=(1, 2, 3))
        assert torch.allclose(model.error(z, eps, levels, PROMPTS), direct, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_error_of_a_diffusion_model_is_that_of_its_prediction_type(prediction_type, scheduler):
    """Against the UNet called by hand, rows at times of their own; the sampler makes no difference."""
    pipe = stable_diffusion()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    adapter = adapter_on(pipe, guidance_scale=7.5)
    model = DenoisingModel(adapter)
    z, eps, levels = noisy_latents(model)
    bars = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    t = (levels * 999).round().long()
    a = bars[t][:, None, None, None]
    embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    with torch.no_grad():
        predicted = adapter.denoiser(a.sqrt() * z + (1 - a).sqrt() * eps, t, embeds).sample
        target = {"epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * z, "sample": z}[prediction_type]
        direct = (predicted - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(model.error(z, eps, levels, PROMPTS), direct, rtol=1e-4, atol=1e-5)
        together = model.predict(z, levels, PROMPTS)
        model._takes_rows = False
        torch.testing.assert_close(model.predict(z, levels, PROMPTS), together, rtol=1e-4, atol=1e-5)


def test_error_of_a_packed_flow_model():
    """Flux works on packed latents and has its guidance as an input: against its transformer called by hand."""
    adapter = adapter_on(flux(), guidance_scale=3.5, height=32, width=32)
    model, pipe = DenoisingModel(adapter), adapter.pipe
    assert model.latent_shape == (64, 4), "a place per row"
    z, eps, levels = noisy_latents(model)
    embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=16)
    ids = pipe._prepare_latent_image_ids(3, 8, 8, "cpu", torch.float32)
    with torch.no_grad():
        s = levels[:, None, None]
        v = adapter.denoiser(
            hidden_states=(1 - s) * z + s * eps, encoder_hidden_states=embeds, pooled_projections=pooled,
            timestep=levels, txt_ids=text_ids, img_ids=ids, guidance=None,
        ).sample  # fmt: skip
        direct = (v - (eps - z)).square().mean(dim=(1, 2))
        torch.testing.assert_close(model.error(z, eps, levels, PROMPTS), direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [flux, stable_diffusion])
def test_latents_of_pictures_are_those_of_the_loop(build):
    """Decoded by the pipeline itself, the latents of a picture are the autoencoder's own reconstruction of it."""
    adapter = adapter_on(build(), height=32, width=32, num_inference_steps=2, guidance_scale=1.0)
    model, pipe = DenoisingModel(adapter), adapter.pipe
    image = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    latents = model.encode([image])
    assert latents.shape == (1, *model.latent_shape)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess([image])
        raw = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(model._decoder_input(latents), raw, rtol=1e-4, atol=1e-5)


def test_sana_is_called_as_the_pipeline_calls_it():
    """One Euler step of the pipeline without guidance is `x - s v`."""
    adapter = adapter_on(sana(), num_inference_steps=1, guidance_scale=1.0)
    model = DenoisingModel(adapter)
    drawn = adapter.generate(PROMPTS, [make_generator(0, "latents", i) for i in range(3)], output_type="latent")
    noise = torch.stack([torch.randn(model.latent_shape, generator=make_generator(0, "latents", i)) for i in range(3)])
    with torch.no_grad():
        predicted = noise - model.predict(noise, torch.ones(3), PROMPTS)
        error = model.error(drawn, noise, torch.ones(3), PROMPTS)
    assert torch.allclose(predicted, drawn, atol=1e-4)
    assert error.max() < 1e-6, "drawn and noise are the two ends of a path that the model predicts exactly"


def test_pictures_to_latents_and_back():
    """What was recorded while drawing decodes to the pictures; encoding a picture is close to it."""
    adapter = adapter_on(fresh_sprint(), guidance_scale=2.0, num_inference_steps=1)
    model = DenoisingModel(adapter)
    with model.recording_latents() as recorded:
        images = adapter.generate(PROMPTS, [make_generator(0, "latents", i) for i in range(3)])
    # Before the first batch pictures are drawn alone, to see that a batch and its longer prompts change nothing.
    *alone, latents = recorded
    assert len(latents) == 3 and {len(one) for one in alone} == {1}
    torch.testing.assert_close(alone[-1][0], latents[-1], atol=1e-4, rtol=0)
    assert latents.shape == (3, *model.latent_shape)
    vae = adapter.pipe.vae
    decoded = adapter.pipe.image_processor.postprocess(vae.decode(latents / vae.config.scaling_factor)[0].detach())
    assert np.array_equal(np.asarray(decoded[1]), np.asarray(images[1]))
    adapter.generate(PROMPTS[:1], [make_generator(0, "latents", 0)])
    assert len(recorded) == len(alone) + 1, "outside nothing is recorded"
    large = [image.resize((200, 130)) for image in images]
    encoded = model.encode([*images, *large])
    assert encoded.shape == (6, *model.latent_shape)
    correlation = torch.corrcoef(torch.stack([encoded[:3].flatten(), latents.flatten()]))[0, 1]
    assert correlation > 0.8  # the adapter is random, and so are its pictures


def test_another_kind_of_model_is_refused():
    adapter = PipelineAdapter(stable_diffusion())
    adapter.pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler, which is neither.*Use ESTrainer"):
        DenoisingModel(adapter)
