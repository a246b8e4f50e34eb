"""LoRAs that people have already: one stays on the model while another is trained; a run may start from one."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_export import by_the_rule
from test_lora_files import diffusers_names, kohya_names, mixed, pairs_of
from tiny_pipelines import flux, fresh_sprint
from tiny_runs import theta_of, tiny_trainer

import es_trl
from es_trl.cli import main
from es_trl.es import make_generator
from es_trl.pipelines import (
    LORA_WEIGHTS_NAME,
    CallSettings,
    LoadedAdapters,
    PipelineAdapter,
    verify_population_forward,
)


CALL = CallSettings(1, 2.0, height=32, width=32, max_sequence_length=16)
PROMPTS = ["a red apple", "two blue cats"]
FEW = ["attn1.to_q", "attn2.to_out.0"]


def draw(adapter):
    generators = [make_generator(0, "existing", i) for i in range(2)]
    return adapter.generate(PROMPTS, generators, output_type="latent")


def move(adapter):
    generator = make_generator(0, "test")
    with torch.no_grad():
        for theta in adapter.theta.values():
            theta.add_(0.1 * torch.randn(theta.shape, generator=generator))


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """Somebody's LoRA for some of the layers, in kohya's names, with mixed ranks and alphas."""
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    pairs, scales = mixed(pairs_of(fresh_sprint(), targets=FEW))
    save_file(kohya_names(pairs, scales, "lora_unet_"), path)
    return path, pairs, scales


@pytest.mark.parametrize("space", ["lora", "lora_xs", "weight"])
def test_a_loaded_lora_stays_and_belongs_to_the_base(space, style, tmp_path):
    loaded = LoadedAdapters(fresh_sprint(), {"style": str(style[0])}, CALL)
    with loaded.chosen("style"):
        styled = draw(loaded)
    assert (styled - draw(loaded)).abs().max() > 0.05

    pipe = fresh_sprint()
    pipe.load_lora_weights(diffusers_lora(style), adapter_name="mine")
    adapter = PipelineAdapter(pipe, es_space=space, settings=CALL)
    assert adapter.frozen_adapters == ["mine"]
    torch.testing.assert_close(draw(adapter), styled, atol=1e-5, rtol=0)
    assert verify_population_forward(adapter, PROMPTS).ok
    move(adapter)
    trained = draw(adapter)
    assert (trained - styled).abs().max() > 0.02
    with adapter.adapter_disabled():
        torch.testing.assert_close(draw(adapter), styled, atol=1e-5, rtol=0)
    with adapter.adapter_scale(0.0):
        torch.testing.assert_close(draw(adapter), styled, atol=1e-5, rtol=0)

    adapter.save_lora(tmp_path)
    assert len(load_file(tmp_path / LORA_WEIGHTS_NAME)) == 2 * 40, "the trained one alone"
    stock = fresh_sprint()
    stock.load_lora_weights(diffusers_lora(style), adapter_name="mine")
    both = LoadedAdapters(stock, {"trained": str(tmp_path)}, CALL)
    torch.testing.assert_close(draw(both), styled, atol=1e-5, rtol=0)
    with both.chosen("trained"):
        torch.testing.assert_close(draw(both), trained, atol=1e-4, rtol=0)
    both.unload()
    torch.testing.assert_close(draw(both), styled, atol=1e-5, rtol=0)


def diffusers_lora(style):
    _, pairs, scales = style
    return diffusers_names({layer: (A.contiguous(), scales[layer] * B) for layer, (A, B) in pairs.items()})


@pytest.mark.parametrize("space", ["lora", "lora_b", "weight"])
def test_a_run_starts_from_a_foreign_lora(space, style, tmp_path):
    path, pairs, scales = style
    loaded = LoadedAdapters(fresh_sprint(), {"style": str(path)}, CALL)
    with loaded.chosen("style"):
        styled = draw(loaded)
    trainer = tiny_trainer(
        tmp_path, max_steps=1, init_adapter=str(path), es_space=space, num_inference_steps=1, guidance_scale=2.0
    )
    assert trainer.adapter.space.layers.keys() == pairs.keys()
    torch.testing.assert_close(draw(trainer.adapter), styled, atol=1e-5, rtol=0)
    trainer.save_model()
    saved = load_file(tmp_path / LORA_WEIGHTS_NAME)
    for layer, (A, B) in pairs.items():
        found = saved[f"transformer.{layer}.lora_B.weight"] @ saved[f"transformer.{layer}.lora_A.weight"]
        assert saved[f"transformer.{layer}.lora_A.weight"].shape == A.shape
        torch.testing.assert_close(found, scales[layer] * B @ A, atol=1e-6, rtol=1e-5)


def test_a_config_names_them_and_the_card_loads_them(style, tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=1, frozen_adapters=[f"{style[0]}=0.5"], num_inference_steps=1, guidance_scale=2.0
    )
    loaded = LoadedAdapters(fresh_sprint(), {"style": str(style[0])}, CALL)
    with loaded.chosen("style", 0.5):
        styled = draw(loaded)
    torch.testing.assert_close(draw(trainer.adapter), styled, atol=1e-5, rtol=0)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert 'pipe.load_lora_weights("style.safetensors", adapter_name="frozen_0")' in card.replace("'", '"')
    assert 'pipe.set_adapters(["frozen_0", "trained"], [0.5, 1.0])' in card.replace("'", '"')
    saved = json.loads((tmp_path / "es_config.json").read_text())["config"]
    assert saved["frozen_adapters"] == [f"{style[0]}=0.5"]
    result = es_trl.evaluate(
        "tiny-sana-sprint", PROMPTS, bright, adapters=str(tmp_path), steps=[1], settings=CALL, resamples=100, seed=3
    )
    pipe = fresh_sprint()
    plain = es_trl.evaluate(pipe, PROMPTS, bright, steps=[1], settings=CALL, resamples=100, seed=3)
    assert not np.allclose(result.scores["base@1"], plain.scores["base@1"]), "the base has the frozen LoRA too"


def bright(images, **_):
    return [float(np.asarray(image, dtype=float).mean()) for image in images]


def test_what_cannot_work_is_said_before_a_model_loads(style, tmp_path, monkeypatch):
    monkeypatch.setattr("es_trl.trainer.inputs.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    for options, message in [
        ({"init_adapter": "no/such.safetensors"}, "neither a folder nor a file"),
        ({"frozen_adapters": ["no/such.safetensors"]}, "frozen_adapters: .*neither a folder nor a file"),
        ({"frozen_adapters": [f"{style[0]}=much"]}, "could not convert"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_trainer(tmp_path, **options)


def test_a_run_goes_on_from_a_run_in_the_default_space_and_refuses_what_is_outside(style, tmp_path):
    first = tiny_trainer(tmp_path / "first", max_steps=1)
    assert first.args.es_space == "lora_xs"
    first.train()
    first.save_model()
    second = tiny_trainer(tmp_path / "second", max_steps=1, seed=5, init_adapter=str(tmp_path / "first"))
    for name, value in theta_of(first).items():
        assert value.norm() > 0
        torch.testing.assert_close(theta_of(second)[name], value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(draw(second.adapter), draw(first.adapter), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="init_adapter: the LoRA on .* no combination .*'lora', 'lora_b' or 'weight'"):
        tiny_trainer(tmp_path / "third", init_adapter=str(style[0]), es_space="lora_xs")


def test_a_foreign_lora_continued_exported_and_merged_draws_what_was_trained(tmp_path, capsys):
    """Kohya's names at half strength, ES, ComfyUI's names, merged by the loaders' rule: equal to the picture."""
    parts = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for part in parts:
        name = f"lora_unet_double_blocks_0_{part}_attn_qkv"
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(8, 32, generator=generator)
        tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(96, 8, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "foreign.safetensors")
    flux().save_pretrained(tmp_path / "base")
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.5}
    options = {"init_adapter": str(tmp_path / "foreign.safetensors"), "reward_funcs": bright, **size}
    options |= {"es_space": "lora", "update": "optimizer", "learning_rate": 0.3}
    trainer = tiny_trainer(tmp_path / "run", model=str(tmp_path / "base"), **options)
    foreign = draw(trainer.adapter)
    trainer.train()
    trainer.save_model()
    trained = draw(trainer.adapter)
    with trainer.adapter.adapter_disabled():
        base = draw(trainer.adapter)
    moved = float((trained - foreign).abs().max())
    assert moved > 1e-2 < (foreign - base).abs().max()

    given = ["export", str(tmp_path / "run"), "--format", "comfyui", "--model", str(tmp_path / "base")]
    assert main([*given, "--output", str(tmp_path / "comfy.safetensors")]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    changes = by_the_rule(load_file(tmp_path / "comfy.safetensors"))
    assert changes.keys() == {f"diffusion_model.double_blocks.0.{part}_attn.qkv" for part in parts}
    with torch.no_grad():
        for part, names in parts.items():
            joined = changes[f"diffusion_model.double_blocks.0.{part}_attn.qkv"]
            for name, rows in zip(names, joined.chunk(3), strict=True):
                getattr(pipe.transformer.transformer_blocks[0].attn, name).weight += rows
    pipe.set_progress_bar_config(disable=True)
    generators = [make_generator(0, "existing", i) for i in range(2)]
    merged = pipe(PROMPTS, generator=generators, output_type="latent", max_sequence_length=16, **size).images
    assert (merged - trained).abs().max() < 1e-4 * moved
