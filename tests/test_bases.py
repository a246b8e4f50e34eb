"""Bases as people have them, quantised by any library, cast, placed by hand: members and basis are the layer's own."""

import json

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from tiny_pipelines import fresh_sprint
from tiny_policies import tiny_policy
from tiny_runs import tiny_trainer
from torch import nn

import es_trl
from es_trl.es import make_generator
from es_trl.pipelines import (
    SPACES,
    CallSettings,
    DenoisingModel,
    DifferentiableForward,
    LoadedAdapters,
    PipelineAdapter,
    verify_population_forward,
)
from es_trl.pipelines.base_layers import compute_dtype, dense_weight
from recipes.benchmarks.storages import STORAGES, bnb_int8, fp8_casting, quantised_sprint, torchao_int8


CALL = CallSettings(1, 2.0, height=32, width=32, max_sequence_length=16)
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"])
PROMPTS = ["a red apple", "two blue cats"]
DIFFERENT = tuple(space for space in SPACES if space != "lora_b")  # that is `lora` with half of its sites


def generators():
    return [make_generator(0, "bases", i) for i in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
def test_a_base_in_any_storage_trains_exactly_and_its_file_loads(storage, tmp_path):
    # bitsandbytes' 8 bit rounds activations as well, to 1 in 127: the last bit of one decides about the next.
    rounding = 0.06 if storage is bnb_int8 else 1e-4
    trained, moved = {}, {}
    for space in DIFFERENT:
        adapter = PipelineAdapter(quantised_sprint(storage), LORA, space, CALL)
        check = verify_population_forward(adapter, PROMPTS, sigma=0.05)
        assert check.ok and check.limit == (0.1 if storage is bnb_int8 else 1e-3), space
        assert check.fused and check.max_difference < rounding * check.spread, (space, check)
        generator = make_generator(0, "test")
        for theta in adapter.theta.values():
            theta.add_(0.1 * torch.randn(theta.shape, generator=generator))
        trained[space] = adapter.generate(PROMPTS, generators(), output_type="latent")
        with adapter.adapter_disabled():
            base = adapter.generate(PROMPTS, generators(), output_type="latent")
        moved[space] = float((trained[space] - base).abs().max())
        assert moved[space] > 0.1, space
        adapter.save_lora(tmp_path / space)
    loaded = LoadedAdapters(quantised_sprint(storage), {space: str(tmp_path / space) for space in DIFFERENT}, CALL)
    for space in DIFFERENT:
        with loaded.chosen(space):
            drawn = loaded.generate(PROMPTS, generators(), output_type="latent")
        assert (drawn - trained[space]).abs().max() < rounding * moved[space], space


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
def test_the_matrix_of_a_layer_is_what_it_computes_with(storage):
    pipe = quantised_sprint(storage)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    original = fresh_sprint().transformer.transformer_blocks[0].attn1.to_q.weight
    W = dense_weight(layer, torch.float32)
    assert W.shape == original.shape and W.dtype == torch.float32
    x = torch.randn(8, layer.in_features, generator=make_generator(0, "x"))
    y = layer(x) - (0 if layer.bias is None else layer.bias)
    # bitsandbytes' 8 bit also rounds what goes in, to 1 in 127 of the largest entry of a row
    torch.testing.assert_close(x @ W.T, y.float(), atol=0.05, rtol=0.02)
    assert (W - original).norm() < 0.3 * original.norm(), "and it is the model's, to its bits"
    assert compute_dtype(pipe.transformer) == torch.float32


@torch.no_grad()
def test_a_format_that_nobody_knows_is_asked_by_the_identity():
    class Packed(nn.Linear):
        def __init__(self, W: torch.Tensor):
            super().__init__(W.shape[1], W.shape[0])
            self.hidden = W
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x @ self.hidden.T + self.bias

    W = torch.randn(5, 3000)
    torch.testing.assert_close(dense_weight(Packed(W), torch.float32), W, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_lora_modules_have_the_compute_dtype(storage):
    pipe = quantised_sprint(storage)
    adapter = PipelineAdapter(pipe, LORA, "lora", CALL)
    dtypes = {
        module.weight.dtype for layer in adapter.space.layers.values() for module in adapter.space.modules(layer)
    }
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("storage", [fp8_casting, torchao_int8])
def test_gradients_flow_through_a_packed_base(storage):
    """As of the same matrices written out; weights that are cast in the forward are fp8 again before the backward."""
    found, start = [], None
    for written_out in (False, True):
        pipe = quantised_sprint(storage)
        if written_out:
            packed, pipe = pipe.transformer, fresh_sprint()
            with torch.no_grad():
                for name, layer in pipe.transformer.named_modules():
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(dense_weight(packed.get_submodule(name), torch.float32))
                    elif isinstance(layer, nn.Conv2d):
                        layer.weight.copy_(packed.get_submodule(name).weight.float())
                    if getattr(layer, "bias", None) is not None:
                        layer.bias.copy_(packed.get_submodule(name).bias.float())
        adapter = PipelineAdapter(pipe, LORA, "lora", CALL)
        if written_out:
            adapter.load_state_dict(start)  # LoRA's random start has the base's storage for a moment
        start = start or adapter.state_dict()
        model = DenoisingModel(adapter)
        z, eps = torch.randn(2, 2, *model.latent_shape, generator=make_generator(0, "z"))
        with DifferentiableForward(adapter).enabled():
            model.error(z, eps, torch.tensor([0.6, 0.6]), PROMPTS).sum().backward()
        found.append(torch.cat([theta.grad.flatten() for theta in adapter.theta.values()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(*found, atol=1e-3 * float(found[1].abs().max()), rtol=1e-3)


@pytest.mark.skipif(
    diffusers.__version__.startswith("0.40."), reason="diffusers 0.40: group offloading needs an accelerator"
)
def test_a_pipeline_that_its_user_placed_is_not_moved(monkeypatch):
    adapter = PipelineAdapter(fresh_sprint(), LORA, "lora", CALL)
    before = np.asarray(adapter.generate(PROMPTS[:1], generators()[:1])[0])
    cpu = torch.device("cpu")
    adapter.pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    monkeypatch.setattr(adapter.pipe, "to", lambda *_: pytest.fail("moved"))
    adapter.to("cpu")
    assert np.array_equal(np.asarray(adapter.generate(PROMPTS[:1], generators()[:1])[0]), before)
    assert verify_population_forward(adapter, PROMPTS).ok


@torch.no_grad()
@pytest.mark.parametrize("space", DIFFERENT)
def test_a_base_whose_weights_come_layer_by_layer_trains_exactly(space, tmp_path):
    """Sequential offload leaves weights without data between forwards, and peft makes LoRA where it finds them."""
    pipe = fresh_sprint()
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    adapter = PipelineAdapter(pipe, LORA, space, CALL)
    assert verify_population_forward(adapter, PROMPTS, sigma=0.05).ok
    generator = make_generator(0, "test")
    for theta in adapter.theta.values():
        theta.add_(0.1 * torch.randn(theta.shape, generator=generator))
    trained = adapter.generate(PROMPTS, generators(), output_type="latent")
    adapter.save_lora(tmp_path)
    loaded = LoadedAdapters(fresh_sprint(), {"it": str(tmp_path)}, CALL)
    base = loaded.generate(PROMPTS, generators(), output_type="latent")
    with loaded.chosen("it"):
        drawn = loaded.generate(PROMPTS, generators(), output_type="latent")
    assert (drawn - trained).abs().max() < 1e-4 * (trained - base).abs().max()


def test_recomputing_cast_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_activations=True does not work with weights that are cast"):
        tiny_policy(tmp_path, "grpo", model=quantised_sprint(fp8_casting), checkpoint_activations=True)


INT8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}


def test_a_model_by_name_is_quantised_by_the_config(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, num_inference_steps=1, quantization_config=json.dumps(INT8))
    weight = trainer.adapter.denoiser.transformer_blocks[0].attn1.to_q.get_base_layer().weight
    assert type(weight).__module__.startswith("torchao")
    assert type(trainer.adapter.pipe.vae.decoder.conv_in.weight) is nn.Parameter, "only the denoiser"
    trainer.train()
    trainer.save_model()
    result = es_trl.evaluate(
        "tiny-sana-sprint", PROMPTS, "jpeg_compressibility", adapters=str(tmp_path), steps=[1], resamples=100
    )
    described = json.loads((tmp_path / "es_config.json").read_text())["config"]["quantization_config"]
    assert described == INT8 and [row.name for row in result.rows] == ["base@1", "adapter@1"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_in_4bit": True}, "quantization_config must be a mapping of quant_backend, quant_kwargs"),
        ({"quant_backend": "int8"}, "quant_backend must be one of .*bitsandbytes_4bit.*torchao; got 'int8'"),
        (
            {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8"}},
            "must be one of .*Int8WeightOnlyConfig",
        ),
        ({"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int3"}}, "quant_kwargs .* do not fit quanto"),
    ],
)
def test_a_quantisation_that_does_not_exist_is_refused_before_a_model_loads(config, message, tmp_path, monkeypatch):
    monkeypatch.setattr("es_trl.trainer.inputs.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, quantization_config=config)


def test_a_loaded_pipeline_is_quantised_by_its_user(tmp_path):
    with pytest.raises(ValueError, match="quantization_config needs model as a string"):
        tiny_trainer(tmp_path, model=fresh_sprint(), quantization_config=INT8)
