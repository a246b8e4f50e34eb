"""The fused forward on whole pipelines: what is drawn together is what each member draws alone."""

import pytest
import torch
from diffusers import SanaSprintPipeline
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from peft import LoraConfig
from tiny_pipelines import PROMPTS, flux, fresh_sprint, sana, stable_diffusion
from tiny_runs import brightness

from es_trl import assets
from es_trl.es import NoiseBank, Population, PopulationForward, make_generator
from es_trl.pipelines import CallSettings, PipelineAdapter, verify_population_forward


CONV_LORA = LoraConfig(
    r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "conv_shortcut", "time_emb_proj"]
)
FLUX_LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0", "add_k_proj", "proj_mlp", "norm.linear"])
SHORT = {"max_sequence_length": 16}

CASES = {
    "sana sprint, 1 step": (fresh_sprint, CallSettings(1, **SHORT), None),
    "sana sprint, 2 steps": (fresh_sprint, CallSettings(2, guidance_scale=2.0, **SHORT), None),
    "sana, flow matching, guided": (sana, CallSettings(3, guidance_scale=3.0, **SHORT), None),
    "sana, dpm solver, guided": (lambda: sana("dpm"), CallSettings(3, guidance_scale=3.0, **SHORT), None),
    "sana, unguided": (sana, CallSettings(2, guidance_scale=1.0, **SHORT), None),
    "unet with conv lora, guided": (stable_diffusion, CallSettings(2, guidance_scale=4.0), CONV_LORA),
    "flux": (flux, CallSettings(2, height=16, width=16, **SHORT), FLUX_LORA),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_merged_weights(case):
    build, settings, lora = CASES[case]
    check = verify_population_forward(build(), PROMPTS[:2], settings=settings, lora_config=lora, sigma=0.3)
    assert check.fused, check.reason
    assert check.spread > 1e-2, "members differ"
    assert check.max_difference <= 1e-4 * max(1.0, check.spread)
    assert check.ok


@pytest.mark.parametrize("space", ["lora_b", "lora_xs", "weight"])
@pytest.mark.parametrize("case", ["sana sprint, 2 steps", "sana, flow matching, guided"])
def test_fused_equals_merged_weights_in_every_space(case, space):
    build, settings, _ = CASES[case]
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"])
    check = verify_population_forward(
        build(), PROMPTS[:2], settings=settings, lora_config=lora, sigma=0.1, es_space=space
    )
    assert check.ok and check.spread > 1e-2
    assert check.max_difference <= 1e-4 * max(1.0, check.spread)


@pytest.mark.parametrize("space", ["lora", "lora_b"])
def test_fused_equals_merged_weights_for_convolutions(space):
    """Depthwise convolutions included: peft splits their `lora_B` into groups."""
    pipe = sana()
    groups = pipe.transformer.transformer_blocks[0].ff.conv_depth.groups
    lora = LoraConfig(r=groups, lora_alpha=groups, target_modules=["to_k", "conv_inverted", "conv_depth"])
    settings = CallSettings(2, guidance_scale=3.0, **SHORT)
    check = verify_population_forward(pipe, PROMPTS[:2], settings=settings, lora_config=lora, es_space=space)
    assert check.ok, check


@pytest.mark.parametrize("build", [fresh_sprint, stable_diffusion, lambda: flattening_sprint()])
def test_verify_leaves_the_pipeline_as_it_was(build):
    """So that the natural next line, a trainer on this very pipeline, works and trains the only adapter."""
    pipe, before = build(), build()
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    verify_population_forward(pipe, PROMPTS[:1], settings=CallSettings(1, **SHORT if denoiser != "unet" else {}))
    kinds = [(name, type(module)) for name, module in getattr(pipe, denoiser).named_modules()]
    assert kinds == [(name, type(module)) for name, module in getattr(before, denoiser).named_modules()]
    assert not getattr(getattr(pipe, denoiser), "peft_config", None)
    adapter = PipelineAdapter(pipe)
    assert adapter.frozen_adapters == []


def test_verify_leaves_a_lora_that_was_there(tmp_path):
    first = PipelineAdapter(fresh_sprint(), settings=CallSettings(1, **SHORT))
    first.save_lora(tmp_path)
    pipe = fresh_sprint()
    pipe.load_lora_weights(str(tmp_path), adapter_name="mine")
    assert verify_population_forward(pipe, PROMPTS[:1], settings=CallSettings(1, **SHORT)).ok
    assert PipelineAdapter(pipe).frozen_adapters == ["mine"]


def test_verify_sees_a_wrong_forward(monkeypatch):
    """The check would be worth nothing if it agreed with everything."""
    prepare = PopulationForward._prepare
    monkeypatch.setattr(
        PopulationForward, "_prepare", lambda self, factors, signs: prepare(self, factors, 1.1 * signs)
    )
    check = verify_population_forward(fresh_sprint(), PROMPTS[:1], settings=CallSettings(1, **SHORT))
    assert check.fused and not check.ok


@torch.no_grad()
@pytest.mark.parametrize("space", ["lora", "lora_xs"])
def test_a_member_is_the_lora_that_its_noise_says(tmp_path, space):
    """Member by member: theta + s sigma E computed here, saved, loaded by a stock pipeline, drawn by its own call."""
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_out.0"])
    adapter = PipelineAdapter(fresh_sprint(), config, space, CallSettings(1, **SHORT), seed=3)
    population = Population(4)
    shapes = {name: tuple(value.shape) for name, value in adapter.theta.items()}
    factors = NoiseBank(3, shapes, rank=2).draw(5, range(2))
    chosen = {name: value.select(torch.tensor([0, 0, 1, 1])) for name, value in factors.items()}
    prompts = PROMPTS[:2]
    generators = [make_generator(0, "test", i) for i in range(2)]
    states = [generator.get_state() for generator in generators]
    with adapter.members(chosen, population.signs(range(4)), 0.2, rows=2):
        fused = adapter.generate(prompts * 4, [_generator(states[i % 2]) for i in range(8)], output_type="latent")

    for member, sign in enumerate([1, -1, 1, -1]):
        for name, theta in adapter.theta.items():
            E = chosen[name].U[member] @ chosen[name].V[member].T / 2**0.5
            theta.add_(sign * 0.2 * E)
        adapter.save_lora(tmp_path / str(member))
        for name, theta in adapter.theta.items():
            E = chosen[name].U[member] @ chosen[name].V[member].T / 2**0.5
            theta.sub_(sign * 0.2 * E)
        stock = SanaSprintPipeline.from_pretrained(assets.resolve("tiny-sana-sprint"), dtype=torch.float32)
        stock.load_lora_weights(str(tmp_path / str(member)), use_safetensors=True)
        stock.set_progress_bar_config(disable=True)
        size = stock.transformer.config.sample_size * stock.vae_scale_factor
        drawn = stock(
            prompts,
            num_inference_steps=1,
            intermediate_timesteps=None,
            height=size,
            width=size,
            use_resolution_binning=False,
            max_sequence_length=16,
            generator=[_generator(state) for state in states],
            output_type="latent",
        ).images
        torch.testing.assert_close(fused[2 * member : 2 * member + 2], drawn, atol=2e-5, rtol=0)
    assert (fused[0] - fused[2]).abs().max() > 1e-2, "members differ"


class _FlatteningProcessor(SanaLinearAttnProcessor2_0):
    """As some models do: all rows' tokens in one long row before the projections."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        projection = attn.to_q

        class Flat(torch.nn.Module):
            def forward(self, x):
                return projection(x.flatten(0, 1)[None])[0].view(*x.shape[:-1], -1)

        attn.to_q = Flat()
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        finally:
            attn.to_q = projection


def flattening_sprint():
    """A Sana Sprint whose first block cannot be shared by several members."""
    pipe = fresh_sprint()
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.set_processor(_FlatteningProcessor())
    return pipe


def test_rows_that_cannot_be_mapped_are_reported():
    check = verify_population_forward(flattening_sprint(), PROMPTS[:2], settings=CallSettings(1, **SHORT))
    assert not check.fused and not check.ok
    assert "rows cannot be told apart by member" in check.reason and "attn1.to_q" in check.reason


def test_the_rollout_falls_back_to_one_by_one_with_the_same_scores(caplog):
    from es_trl.rewards import RewardSet
    from es_trl.trainer.rollout import PopulationRollout, PromptBatch

    def scores(pipe):
        adapter = PipelineAdapter(pipe, None, "lora_xs", CallSettings(1, **SHORT), seed=1)
        population = Population(4)
        shapes = {name: tuple(value.shape) for name, value in adapter.theta.items()}
        factors = NoiseBank(1, shapes).draw(0, range(2))
        rollout = PopulationRollout(adapter, RewardSet(brightness), population, 0.3, members_per_forward=4, seed=0)
        batch = PromptBatch.from_rows([{"prompt": p} for p in PROMPTS[:2]], images_per_prompt=2)
        return [rollout.scores(batch, factors, step)[0] for step in (0, 1)]

    together, alone = scores(fresh_sprint()), scores(flattening_sprint())
    for a, b in zip(together, alone, strict=True):
        assert a.shape == (4, 4, 1) and a.std() > 1
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    messages = [record.getMessage() for record in caplog.records if "one after the other" in record.getMessage()]
    assert len(messages) == 1 and "attn1.to_q" in messages[0]


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
