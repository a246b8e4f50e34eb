"""PipelineAdapter: what is saved is what was drawn; the base is always within reach; what cannot work is refused."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, SanaSprintPipeline, UNet2DModel
from peft import LoraConfig
from safetensors import safe_open
from tiny_pipelines import PROMPTS, fresh_sprint, sana, stable_diffusion

from es_trl import assets
from es_trl.es import make_generator
from es_trl.pipelines import LORA_WEIGHTS_NAME, SPACES, CallSettings, PipelineAdapter, check_pipeline, load_pipeline


SETTINGS = CallSettings(1, max_sequence_length=16)
LORA = LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_out.0"])


def adapter_of(space="lora", pipe=None, config=LORA, settings=SETTINGS, moved=True) -> PipelineAdapter:
    adapter = PipelineAdapter(pipe or fresh_sprint(), config, space, settings, seed=3)
    if moved:
        move(adapter)
    return adapter


@torch.no_grad()
def move(adapter: PipelineAdapter, scale: float = 0.2) -> None:
    generator = make_generator(0, "test")
    for theta in adapter.theta.values():
        theta.add_(scale * torch.randn(theta.shape, generator=generator))


def generators(count: int = 3) -> list[torch.Generator]:
    return [make_generator(0, "latents", i) for i in range(count)]


def draw(adapter: PipelineAdapter, prompts=PROMPTS, output_type: str = "latent") -> torch.Tensor:
    """Latents, unless a test wants to see the pictures: the autoencoder takes most of the time and adds nothing."""
    return adapter.generate(prompts, generators(len(prompts)), output_type=output_type).float()


def draw_stock(pipe, prompts=PROMPTS, output_type: str = "latent", **kwargs) -> torch.Tensor:
    """The pipeline's own call, as a user who never heard of es_trl writes it."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompts, generator=generators(len(prompts)), output_type=output_type, **kwargs).images.float()


SPRINT_CALL = {
    "num_inference_steps": 1,
    "intermediate_timesteps": None,
    "height": 64,
    "width": 64,
    "use_resolution_binning": False,
    "max_sequence_length": 16,
}


def stock_sprint(directory=None, dtype=torch.float32):
    pipe = SanaSprintPipeline.from_pretrained(assets.resolve("tiny-sana-sprint"), dtype=dtype)
    if directory is not None:
        pipe.load_lora_weights(str(directory), use_safetensors=True)
    return pipe


# --- files ---


@pytest.mark.parametrize("space", SPACES)
def test_a_saved_lora_draws_the_same_picture_in_a_fresh_stock_pipeline(tmp_path, space):
    adapter = adapter_of(space)
    trained = draw(adapter, output_type="pt")
    adapter.save_lora(tmp_path)
    loaded = draw_stock(stock_sprint(tmp_path), output_type="pt", **SPRINT_CALL)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)
    with adapter.adapter_disabled():
        assert (trained - draw(adapter, output_type="pt")).abs().max() > 0.05, "the adapter does something"

    with safe_open(tmp_path / LORA_WEIGHTS_NAME, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == 4, "2.5 is in B"
    assert all(name.startswith("transformer.") and "lora" in name for name in names)


def test_half_precision_pipelines_save_full_precision_adapters(tmp_path):
    # A scale that is no power of two is rounded elsewhere in the file (in B) than in training (behind B).
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA.target_modules)
    adapter = adapter_of("lora_xs", fresh_sprint(torch.bfloat16), config)
    assert all(theta.dtype == torch.float32 for theta in adapter.theta.values())
    assert {p.dtype for p in adapter.denoiser.parameters()} == {torch.bfloat16}
    trained = draw(adapter)
    adapter.save_lora(tmp_path)
    with safe_open(tmp_path / LORA_WEIGHTS_NAME, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    loaded = draw_stock(stock_sprint(tmp_path, torch.bfloat16), **SPRINT_CALL)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("space", ["lora", "lora_b"])
def test_a_saved_convolution_lora_draws_the_same_picture(tmp_path, space):
    settings = CallSettings(2, guidance_scale=3.0, max_sequence_length=None)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1", "conv_shortcut"])
    adapter = adapter_of(space, stable_diffusion(), config, settings)
    trained = draw(adapter, PROMPTS[:2])
    adapter.save_lora(tmp_path)
    stock = stable_diffusion()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    base = draw_stock(stock, PROMPTS[:2], **call)
    stock.load_lora_weights(str(tmp_path), use_safetensors=True)
    torch.testing.assert_close(draw_stock(stock, PROMPTS[:2], **call), trained, atol=1e-5, rtol=0)
    assert (base - trained).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["to_q"]),
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 9}
        ),
        LoraConfig(r=2, lora_alpha=2, target_modules=r".*attn2\.to_k"),
        LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights="gaussian"),
    ],
    ids=["rslora", "patterns", "regular expression", "gaussian"],
)
@pytest.mark.parametrize("space", ["lora", "weight"])
def test_peft_options_survive_the_file(tmp_path, config, space):
    adapter = adapter_of(space, config=config)
    trained = draw(adapter)
    adapter.save_lora(tmp_path)
    torch.testing.assert_close(draw_stock(stock_sprint(tmp_path), **SPRINT_CALL), trained, atol=2e-5, rtol=0)


@torch.no_grad()
def test_weight_space_says_what_its_export_keeps():
    adapter = adapter_of("weight", moved=False)
    assert adapter.space.energy_kept() == 1.0, "nothing has moved"
    for theta in adapter.theta.values():
        theta.add_(torch.randn(theta.shape[0], 3) @ torch.randn(3, theta.shape[1]))
    assert adapter.space.energy_kept() == pytest.approx(1.0, abs=1e-4), "rank 3 fits into rank 4"
    for name, layer in adapter.space.layers.items():
        A, B = adapter.space.export(name, layer)
        torch.testing.assert_close(2.5 * B @ A, adapter.theta[f"{name}.weight"].detach(), atol=1e-3, rtol=0)
    for theta in adapter.theta.values():
        theta.copy_(torch.randn(theta.shape))
    assert 0.01 < adapter.space.energy_kept() < 0.3


@torch.no_grad()
def test_the_core_of_lora_xs_stands_between_the_top_singular_vectors():
    """With the identity as core the adapter adds the frozen weight's own best rank-4 approximation."""
    adapter = adapter_of("lora_xs", moved=False)
    for name, layer in adapter.space.layers.items():
        adapter.theta[f"{name}.core"].copy_(torch.eye(4))
        A, B = adapter.space.export(name, layer)
        U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
        torch.testing.assert_close(B @ A, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-4, rtol=1e-4)


def test_the_state_restores_bitwise(tmp_path):
    for space in SPACES:
        adapter, other = adapter_of(space), adapter_of(space, moved=False)
        state = {name: value.clone() for name, value in adapter.state_dict().items()}
        other.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
        assert torch.equal(draw(other), draw(adapter))


def test_the_state_of_another_adapter_is_refused():
    adapter = adapter_of("lora_xs")
    with pytest.raises(ValueError, match="names differ.*es_space, lora_target_modules and the base model"):
        adapter_of("lora").load_state_dict(adapter.state_dict())
    smaller = adapter_of("lora_xs", config=LoraConfig(r=2, lora_alpha=2, target_modules=LORA.target_modules))
    with pytest.raises(ValueError, match=r"is \(4, 4\) there and \(2, 2\) here; lora_rank"):
        smaller.load_state_dict(adapter.state_dict())


# --- drawing ---


@pytest.mark.parametrize("steps", [1, 2])
def test_a_picture_does_not_depend_on_its_batch(steps):
    adapter = adapter_of(settings=CallSettings(steps, max_sequence_length=16))
    together = draw(adapter)
    for i, prompt in enumerate(PROMPTS):
        alone = adapter.generate([prompt], generators()[i : i + 1], output_type="latent")
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    backwards = adapter.generate(PROMPTS[::-1], generators()[::-1], output_type="latent").flip(0)
    torch.testing.assert_close(backwards, together, atol=1e-5, rtol=0)


def test_several_pictures_of_a_prompt_are_told_apart_by_their_generators():
    """Prompts repeated in any order: picture i belongs to prompt i and generator i."""
    adapter = adapter_of()
    a, b = PROMPTS[:2]
    images = adapter.generate(
        [a, b, a, a], [make_generator(0, "latents", i) for i in (0, 1, 2, 0)], output_type="latent"
    )
    reference = draw(adapter, [a, b])
    torch.testing.assert_close(images[:2], reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(images[3], reference[0], atol=1e-5, rtol=0)
    assert (images[2] - images[0]).abs().max() > 0.05, "the same prompt, other latents"


def test_pictures_come_in_order_and_as_asked():
    adapter = adapter_of()
    images = adapter.generate(PROMPTS, generators())
    assert len(images) == 3 and images[0].size == (64, 64)
    with pytest.raises(ValueError, match="one generator per prompt, got 1 for 3"):
        adapter.generate(PROMPTS, generators(1))


@pytest.mark.parametrize("space", SPACES)
def test_the_base_is_within_reach(space):
    base = draw_stock(stock_sprint(), **SPRINT_CALL)
    adapter = adapter_of(space, moved=False)
    assert torch.equal(draw(adapter), base), "training starts at the base"
    move(adapter)
    with adapter.adapter_scale(0.0):
        assert torch.equal(draw(adapter), base)
    trained = draw(adapter)
    with adapter.adapter_disabled():
        assert torch.equal(draw(adapter), base)
    with adapter.adapter_scale(0.5):
        half = draw(adapter)
    with pytest.raises(KeyboardInterrupt), adapter.adapter_disabled():
        raise KeyboardInterrupt
    assert torch.equal(draw(adapter), trained)
    assert 0.02 < (half - base).abs().mean() / (trained - base).abs().mean() < 0.98


@pytest.mark.parametrize("space", ["lora", "weight"])
def test_moving_theta_while_the_scale_is_changed_is_safe(space):
    """`write_back` runs inside the context; it must export theta, not theta over the momentary scale."""
    adapter, reference = adapter_of(space, moved=False), adapter_of(space)
    with adapter.adapter_scale(0.25):
        move(adapter)
        drawn = draw(adapter)
    torch.testing.assert_close(draw(adapter), draw(reference), atol=1e-5, rtol=0)
    with reference.adapter_scale(0.25):
        torch.testing.assert_close(draw(reference), drawn, atol=1e-5, rtol=0)


def test_the_pipeline_follows_a_change_that_leaves_length_and_maximum():
    adapter = adapter_of("lora_b")
    before = draw(adapter)
    with torch.no_grad():
        for theta in adapter.theta.values():
            smaller = theta.abs() < theta.abs().max() / 2
            theta[smaller] *= -1
    assert not torch.equal(draw(adapter), before)


@pytest.mark.parametrize(
    "build",
    [
        lambda theta: torch.optim.SGD(theta, lr=0.1, momentum=0.9),
        lambda theta: torch.optim.SGD(theta, lr=0.1, fused=True),
        lambda theta: torch.optim.AdamW(theta, lr=0.1, foreach=True),
        lambda theta: torch.optim.AdamW(theta, lr=0.1, fused=True),
    ],
    ids=["sgd", "sgd fused", "adamw foreach", "adamw fused"],
)
def test_the_pipeline_follows_every_kind_of_optimizer_step(build):
    """Pictures are drawn with the theta of now; fused kernels must not slip past the check for changes."""
    adapter = adapter_of("lora_b")
    before = draw(adapter)
    optimizer = build(list(adapter.theta.values()))
    for theta in adapter.theta.values():
        theta.grad = torch.ones_like(theta)
    optimizer.step()
    assert (draw(adapter) - before).abs().max() > 0.01


def test_a_time_of_ones_own_is_for_two_steps_only():
    """An evaluation draws one, two and four steps with the settings of one run."""
    settings = CallSettings(2, 2.0, max_sequence_length=16, extra={"intermediate_timesteps": 1.1})
    adapter = PipelineAdapter(fresh_sprint(), settings=settings)
    times = {}
    for steps in (1, 2, 4):
        adapter.generate(PROMPTS[:1], [make_generator(0, "t")], num_inference_steps=steps, output_type="latent")
        times[steps] = adapter.pipe.scheduler.timesteps.tolist()
    assert times[2] == pytest.approx([1.5708, 1.1, 0.0])
    assert (len(times[1]), len(times[4])) == (2, 5)


def test_describe_is_plain_data():
    description = adapter_of("lora_xs", settings=CallSettings(2, 2.0, max_sequence_length=16)).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["num_inference_steps"] == 2 and description["guidance_scale"] == 2.0
    assert description["height"] == description["width"] == 64 and description["max_sequence_length"] == 16
    assert description["es_space"] == "lora_xs" and description["lora_rank"] == 4 and description["lora_alpha"] == 10
    assert description["lora_target_modules"] == ["to_out.0", "to_q"]


# --- what is refused ---


def test_a_pipeline_without_lora_loader_is_refused():
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(ValueError, match="DDPMPipeline has no LoRA loader.*Choose a class with one"):
        PipelineAdapter(DDPMPipeline(unet, DDIMScheduler()))
    with pytest.raises(ValueError, match="AutoencoderKL has no LoRA loader"):
        check_pipeline(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


def test_a_pipeline_that_carries_an_adapter_is_refused():
    pipe = fresh_sprint()
    adapter_of(pipe=pipe)
    with pytest.raises(ValueError, match="already carries an adapter called 'default'.*unload_lora_weights"):
        adapter_of(pipe=pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout must be 0 .*got 0.1"),
        ({"bias": "all"}, "peft_config.bias must be 'none', got 'all'"),
        ({"use_dora": True}, "peft_config.use_dora must be False, got True"),
        ({"modules_to_save": ["proj_out"]}, "peft_config.modules_to_save must be None"),
        ({"lora_bias": True}, "peft_config.lora_bias must be False, got True"),
        ({"init_lora_weights": "pissa"}, "peft_config.init_lora_weights.*'pissa'"),
        ({"target_modules": ["to_qq"]}, "LoRA could not be put on the transformer.*lora_target_modules"),
        ({"target_modules": ["norm_out"]}, "LoRA could not be put on the transformer.*lora_target_modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_lora_configs_that_would_not_do_what_they_say_are_refused(options, message):
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]} | options
    with pytest.raises(ValueError, match=message):
        adapter_of(config=LoraConfig(**options))


def test_spaces_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="es_space must be one of lora, lora_b, lora_xs, weight; got 'xs'"):
        adapter_of("xs")
    large = LoraConfig(r=1000, lora_alpha=8, target_modules=["to_q"])
    for space in ("lora_xs", "weight"):
        with pytest.raises(ValueError, match="lora_rank 1000 exceeds the smaller side of .*to_q.*lower lora_rank"):
            adapter_of(space, config=large)
    convolution = LoraConfig(r=4, lora_alpha=4, target_modules=["conv_inverted"])
    for space in ("lora_xs", "weight"):
        with pytest.raises(ValueError, match=f'es_space="{space}" works on Linear layers only'):
            adapter_of(space, sana(), convolution)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CallSettings(1, extra={"negative_prompt_2": "x"}), "SanaSprintPipeline takes no negative_prompt_2"),
        (CallSettings(1, extra={"num_images_per_prompt": 2}), "pipeline_kwargs must not set num_images_per_prompt"),
        (CallSettings(1, extra={"generator": None}), "pipeline_kwargs must not set generator"),
        (CallSettings(1, extra={"height": 32}), "pipeline_kwargs must not set height"),
    ],
    ids=["unknown", "images per prompt", "generator", "a field of its own"],
)
def test_settings_that_the_pipeline_call_cannot_take_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        adapter_of(settings=settings)


def test_settings_of_another_pipeline_are_refused():
    settings = CallSettings(2, complex_human_instruction=["say"])
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no complex_human_instruction; remove it"):
        adapter_of(pipe=stable_diffusion(), settings=settings)


def test_models_that_do_not_load_say_what_can(tmp_path):
    with pytest.raises(ValueError, match="No diffusers pipeline could be loaded .*model_index.json.*Give a folder"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="There is no model 'tiny-sana'"):
        load_pipeline("tiny-sana")
