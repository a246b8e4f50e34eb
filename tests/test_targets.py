"""Default targets of true-size models, without weights: every attention projection, whatever it is called."""

import logging
import re

import diffusers
import pytest
import torch
from tiny_pipelines import fresh_sprint, stable_diffusion

from es_trl.pipelines import PipelineAdapter
from es_trl.pipelines.targets import coverage, resolve_targets
from recipes.autoregressive_es import PixelWriter


JOINT = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"]
PLAIN = ["to_k", "to_out.0", "to_q", "to_v"]
DEFAULTS = {
    "SanaTransformer2DModel": (PLAIN, 160),
    "FluxTransformer2DModel": (JOINT, 266),
    "SD3Transformer2DModel": (JOINT, 143),
    "QwenImageTransformer2DModel": (JOINT, 480),
    "UNet2DConditionModel": (PLAIN, 128),
    "PRXTransformer2DModel": (["img_qkv_proj", "to_out.0", "txt_kv_proj"], 48),
    "Krea2Transformer2DModel": (["to_gate", *PLAIN], 160),
    "Flux2Transformer2DModel": ({"attn.to_qkv_mlp_proj", "attn.to_out", "attn.to_out.0", "attn.add_q_proj"}, 160),
    "Kandinsky5Transformer3DModel": ({"self_attention.to_query", "cross_attention.out_layer"}, 264),
}


def empty(kind):
    with torch.device("meta"):
        return getattr(diffusers, kind)()


@pytest.mark.parametrize("kind", DEFAULTS)
def test_all_attention_projections_get_lora(kind):
    model = empty(kind)
    expected, count = DEFAULTS[kind]
    targets = resolve_targets(model, None)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    taken = [name for name in layers if any(name == t or name.endswith(f".{t}") for t in targets)]
    assert len(taken) == count
    if isinstance(expected, set):  # short names would mean other layers as well, so whole ones are given
        assert expected <= {re.sub(r".*blocks\.\d+\.", "", name) for name in targets} and len(targets) == count
    else:
        assert targets == expected
    assert not any("norm" in name or "ff" in name.split(".") for name in taken)


def test_feed_forward_is_an_option():
    model = empty("FluxTransformer2DModel")
    found = resolve_targets(model, ["feed_forward"])
    assert {"transformer_blocks.0.ff.net.2", "single_transformer_blocks.3.proj_mlp"} <= set(found)
    assert "single_transformer_blocks.3.proj_out" in found and "proj_out" not in found
    assert resolve_targets(empty("UNet2DConditionModel"), ["attention", "feed_forward", "conv_in"]) == [
        *PLAIN, "net.2", "proj", "conv_in"
    ]  # fmt: skip
    assert resolve_targets(model, r".*\.proj_mlp") == r".*\.proj_mlp"
    with pytest.raises(ValueError, match="SanaTransformer2DModel has no Linear layers that are feed_forward"):
        resolve_targets(fresh_sprint().transformer, ["feed_forward"])


def test_what_has_no_lora_is_said(caplog):
    caplog.set_level(logging.INFO, "es_trl")
    adapter = PipelineAdapter(stable_diffusion())
    assert adapter.describe()["lora_target_modules"] == PLAIN
    text = coverage(adapter.denoiser, adapter.space.layers)
    assert re.fullmatch(r"LoRA on 32 of \d+ layers; none in conv_in, time_embedding, .*", text), text
    assert text in caplog.text


def test_a_block_that_has_its_projections_itself_is_an_attention_module():
    """The autoregressive recipe's model: no class of it is called attention, and its MLPs are left out."""
    targets = resolve_targets(PixelWriter(), None)
    assert targets == ["to_k", "to_out.0", "to_q", "to_v"]
