"""Prompts encoded ahead of the call draw what the stock call with `prompt=...` draws."""

import functools

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import PROMPTS, flux, fresh_sprint, sana, stable_diffusion

from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, PipelineAdapter
from recipes.benchmarks.tiny_models import MODELS
from recipes.benchmarks.toy_pipeline import toy_pipeline


def generators(count: int) -> list[torch.Generator]:
    return [make_generator(0, "latents", i) for i in range(count)]


def draw(adapter, prompts=PROMPTS, **kwargs):
    return adapter.generate(prompts, generators(len(prompts)), output_type="latent", **kwargs)


def stock(pipe, prompts=PROMPTS, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompts, generator=generators(len(prompts)), output_type="latent", **kwargs).images


def native(pipe) -> dict:
    size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {"height": size, "width": size, "use_resolution_binning": False}


def test_one_step_sana_sprint_is_the_stock_call():
    """With the pipeline's own instruction and text length."""
    pipe = fresh_sprint()
    expected = stock(pipe, num_inference_steps=1, intermediate_timesteps=None, guidance_scale=2.0, **native(pipe))
    adapter = PipelineAdapter(pipe, settings=CallSettings(1, guidance_scale=2.0))
    torch.testing.assert_close(draw(adapter), expected, atol=1e-5, rtol=0)


def test_two_step_sana_sprint_is_the_stock_call_with_its_default_timesteps():
    pipe = fresh_sprint()
    expected = stock(pipe, num_inference_steps=2, **native(pipe))
    adapter = PipelineAdapter(pipe, settings=CallSettings(2))
    torch.testing.assert_close(draw(adapter), expected, atol=1e-5, rtol=0)
    one = draw(adapter, num_inference_steps=1)
    assert (one - expected).abs().max() > 0.1
    torch.testing.assert_close(draw(adapter, guidance_scale=4.5), expected, atol=1e-5, rtol=0)  # the call's default
    assert (draw(adapter, guidance_scale=1.0) - expected).abs().max() > 0.01


@pytest.mark.parametrize("scheduler", ["flow_match", "dpm"])
@pytest.mark.parametrize("instruction", [None, []], ids=["its instruction", "no instruction"])
def test_guided_sana_is_the_stock_call(scheduler, instruction):
    """Negative prompt embeddings included; more than one prompt length in the batch."""
    pipe = sana(scheduler)
    text = {} if instruction is None else {"complex_human_instruction": instruction}
    expected = stock(pipe, num_inference_steps=3, guidance_scale=3.0, max_sequence_length=24, **native(pipe), **text)
    settings = CallSettings(3, 3.0, max_sequence_length=24, complex_human_instruction=instruction)
    adapter = PipelineAdapter(pipe, settings=settings)
    torch.testing.assert_close(draw(adapter), expected, atol=1e-5, rtol=0)
    others = {"guidance_scale": 1.0} | text, {"guidance_scale": 3.0, "complex_human_instruction": ["Paint it: "]}
    for other in others:
        differs = stock(pipe, num_inference_steps=3, max_sequence_length=24, **native(pipe), **other)
        assert (differs - expected).abs().max() > 1e-3


def test_an_own_negative_prompt_is_used():
    pipe = sana()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 16}
    plain = stock(pipe, **call, **native(pipe))
    expected = stock(pipe, negative_prompt="two blue cats", **call, **native(pipe))
    assert (plain - expected).abs().max() > 1e-3
    settings = CallSettings(2, 3.0, max_sequence_length=16, extra={"negative_prompt": "two blue cats"})
    torch.testing.assert_close(draw(PipelineAdapter(pipe, settings=settings)), expected, atol=1e-5, rtol=0)


def test_guidance_may_be_switched_on_for_one_call():
    """An evaluation row with another guidance than training's."""
    pipe = sana()
    call = {"num_inference_steps": 2, "max_sequence_length": 16}
    expected = stock(pipe, guidance_scale=3.0, **call, **native(pipe))
    adapter = PipelineAdapter(pipe, settings=CallSettings(2, 1.0, max_sequence_length=16))
    draw(adapter)
    torch.testing.assert_close(draw(adapter, guidance_scale=3.0), expected, atol=1e-5, rtol=0)


def test_pipelines_without_a_cache_get_their_prompts_as_text():
    pipe = stable_diffusion()
    expected = stock(pipe, negative_prompt=["a red apple"] * 3, num_inference_steps=2, guidance_scale=3.0)
    settings = CallSettings(2, 3.0, extra={"negative_prompt": "a red apple"})
    adapter = PipelineAdapter(pipe, settings=settings)
    torch.testing.assert_close(draw(adapter), expected, atol=1e-5, rtol=0)


# --- cache and release ---


def test_each_prompt_is_encoded_once(monkeypatch):
    adapter = PipelineAdapter(fresh_sprint(), settings=CallSettings(1, max_sequence_length=16))
    draw(adapter, PROMPTS[:1])  # finds out what belongs to which prompt
    encoded, original = [], adapter.pipe.encode_prompt

    @functools.wraps(original)
    def spy(prompt=None, **kwargs):
        encoded.extend(prompt)
        return original(prompt, **kwargs)

    monkeypatch.setattr(adapter.pipe, "encode_prompt", spy)
    draw(adapter, PROMPTS[:2] * 2)
    draw(adapter, PROMPTS)
    assert encoded == PROMPTS[1:]


def test_the_text_encoder_can_be_released():
    adapter = PipelineAdapter(sana(), settings=CallSettings(2, 3.0, max_sequence_length=16))
    before = draw(adapter, PROMPTS[:2])
    adapter.prompts.release()
    assert adapter.pipe.text_encoder is None
    assert torch.equal(draw(adapter, PROMPTS[:2]), before)
    with pytest.raises(
        RuntimeError, match="released, and 1 prompts were not encoded before.*release_text_encoder=False"
    ):
        draw(adapter, PROMPTS)


def test_any_class_s_encoders_can_be_released():
    """Several of them, pooled embeddings, negative prompts: nothing is written down per class."""
    for pipe, settings in ((stable_diffusion(), CallSettings(2, 3.0)), (flux(), CallSettings(2, height=16, width=16))):
        adapter = PipelineAdapter(pipe, settings=settings)
        before = draw(adapter, PROMPTS[:2])
        adapter.prompts.release()
        assert not [name for name, part in pipe.components.items() if name.startswith("text_enc") and part is not None]
        assert torch.equal(draw(adapter, PROMPTS[:2]), before)


def test_a_mask_that_is_there_for_some_lengths_only():
    """Qwen-Image has none for texts that are as long as each other."""
    pipe = next(model for model in MODELS if model.name == "QwenImagePipeline").pipeline()
    adapter = PipelineAdapter(pipe, settings=CallSettings(1, height=32, width=32, max_sequence_length=16))
    expected = stock(pipe, num_inference_steps=1, height=32, width=32, max_sequence_length=16)
    torch.testing.assert_close(draw(adapter), expected, atol=1e-5, rtol=0)
    adapter.prompts.release()
    torch.testing.assert_close(draw(adapter), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(adapter, PROMPTS[:1] * 2)[:1], expected[:1], atol=1e-4, rtol=0)


def test_what_encodes_no_prompts_ahead_cannot_be_released():
    adapter = PipelineAdapter(toy_pipeline(), LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="release_text_encoder=True is not possible with ToyPipeline.*encode_prompt"):
        adapter.prompts.release()


def test_prompts_of_any_length_share_a_batch():
    adapter = PipelineAdapter(fresh_sprint(), settings=CallSettings(1, max_sequence_length=16))
    mixed = ["cat", "a green frog left of a pink dog on a blue background", ""]
    together = draw(adapter, mixed)
    for i, prompt in enumerate(mixed):
        alone = adapter.generate([prompt], generators(3)[i : i + 1], output_type="latent")
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
