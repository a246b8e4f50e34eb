"""Exported LoRAs: by other programs' rule (a pair by name, scale = alpha / rank, else 1) they are what was trained."""

import json
import re

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import flux, fresh_sprint, stable_diffusion

from es_trl.cli import main
from es_trl.es import make_generator
from es_trl.pipelines import LORA_WEIGHTS_NAME, SPACES, CallSettings, PipelineAdapter
from es_trl.pipelines.lora_export import FAMILIES, export_tensors
from es_trl.pipelines.lora_files import LoraPair


def probe(width: int) -> torch.Tensor:
    """Two directions, where writing out dW takes too long."""
    return torch.randn(width, 2, generator=make_generator(0, "probe", width))


def by_the_rule(tensors, of=None) -> dict[str, torch.Tensor]:
    """dW by the file's name of a layer, as a loader that knows nothing else computes it; or its products `of(n)`."""
    found = {}
    for key in tensors:
        match = re.fullmatch(r"(.+)\.lora_(?:A|down)\.weight", key)
        if match:
            A = tensors[key]
            B = tensors[key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")]
            alpha = tensors.get(f"{match[1]}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / len(A)
            A = A.flatten(1)
            found[match[1]] = scale * B.flatten(1) @ (A if of is None else A @ of(A.shape[1]))
    return found


def trained_adapter(build=fresh_sprint, space="lora", targets=("to_q", "to_out.0"), **config) -> PipelineAdapter:
    options = {"r": 4, "lora_alpha": 10, "target_modules": list(targets)} | config
    adapter = PipelineAdapter(build(), LoraConfig(**options), space, CallSettings(1), seed=3)
    generator = make_generator(0, "test")
    with torch.no_grad():
        for theta in adapter.theta.values():
            theta.add_(0.2 * torch.randn(theta.shape, generator=generator))
    return adapter


def merged_change(adapter) -> dict[str, torch.Tensor]:
    """What `fuse_lora` adds to each layer, by layer."""
    adapter.write_back()
    layers = {name: layer.get_base_layer() for name, layer in adapter.space.layers.items()}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    adapter.pipe.fuse_lora(components=[adapter.denoiser_name])
    return {name: (layer.weight - before[name]).flatten(1) for name, layer in layers.items()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4, msg=name)


OPTIONS = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_out.0": 3}},
}


@pytest.mark.parametrize(
    ("space", "options"), [*((space, "alpha") for space in SPACES), ("lora", "rslora"), ("weight", "patterns")]
)
def test_the_saved_file_has_its_strength_without_metadata(space, options, tmp_path):
    adapter = trained_adapter(space=space, **OPTIONS[options])
    adapter.save_lora(tmp_path)
    found = by_the_rule(load_file(tmp_path / LORA_WEIGHTS_NAME))
    assert_same({name.removeprefix("transformer."): dW for name, dW in found.items()}, merged_change(adapter))
    with safe_open(tmp_path / LORA_WEIGHTS_NAME, "pt") as file:
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    assert written["transformer.lora_alpha"] == written["transformer.r"] == 4
    assert written["transformer.alpha_pattern"] == written["transformer.rank_pattern"]


@pytest.mark.parametrize("space", ["lora", "lora_b"])
@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_a_unets_names_are_kohyas(format, space, tmp_path, capsys):
    adapter = trained_adapter(stable_diffusion, space, ("to_q", "to_out.0", "conv1"))
    adapter.pipe.save_pretrained(tmp_path / "base")
    adapter.save_lora(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", format, "--model", str(tmp_path / "base")]) == 0
    path = capsys.readouterr().out.strip()
    assert path == str(tmp_path / "run" / "export" / f"run-{format}.safetensors")
    expected = merged_change(adapter)
    assert_same(by_the_rule(load_file(path)), {"lora_unet_" + n.replace(".", "_"): dW for n, dW in expected.items()})
    alphas = {float(value) for name, value in load_file(path).items() if name.endswith(".alpha")}
    assert alphas == {4.0}


# --- transformers: the exported file, converted back by diffusers, is what was trained ---

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
DENOISERS = {
    "FluxTransformer2DModel": (
        diffusers.FluxPipeline,
        {"num_layers": 1, "num_single_layers": 1},  # diffusers' converter knows the true widths only
        r".*transformer_blocks.*(to_q|to_v|to_out\.0|add_k_proj|to_add_out|net\.2|proj_mlp|proj_out)",
    ),
    "Flux2Transformer2DModel": (
        diffusers.Flux2Pipeline,
        {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32,
         "axes_dims_rope": (4, 4, 4, 4), **HEADS},
        r".*transformer_blocks.*(to_q|to_k|add_v_proj|to_add_out|to_qkv_mlp_proj|attn\.to_out|linear_in|to_out\.0)",
    ),
    "ZImageTransformer2DModel": (
        diffusers.ZImagePipeline,
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 16, "axes_dims": (4, 4, 8), "axes_lens": (32, 32, 32)},
        r".*(layers|refiner)\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
    ),
    "QwenImageTransformer2DModel": (
        diffusers.QwenImagePipeline,
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
         **HEADS},
        r".*transformer_blocks.*(to_q|add_k_proj|to_out\.0|to_add_out)",
    ),
    "Krea2Transformer2DModel": (
        diffusers.Krea2Pipeline,
        {"in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "num_key_value_heads": 2, "axes_dims_rope": (4, 4, 8), "intermediate_size": 32},
        r"transformer_blocks.*(to_q|to_v|to_out\.0|ff\.up)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "program"), [(kind, p) for kind, f in FAMILIES.items() for p in f.programs])
def test_a_transformers_names_are_what_diffusers_knows_as_theirs(kind, program):
    if (kind, program) == ("QwenImageTransformer2DModel", "kohya") and diffusers.__version__.startswith("0.40."):
        pytest.skip("diffusers 0.40: its reader of Qwen-Image files in kohya's names fails on their alphas")
    pipeline_class, config, pattern = DENOISERS[kind]
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind)(**config)
    generator = make_generator(0, "export")
    pairs = []
    for layer, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(pattern, layer):
            rank = 1 + len(pairs) % 3
            A = torch.randn(rank, module.in_features, generator=generator)
            pairs.append(
                LoraPair(layer, A, torch.randn(module.out_features, rank, generator=generator), ("", ""), layer)
            )
    assert len(pairs) > 5
    tensors = export_tensors(denoiser, pairs, program)
    prefix = "lora_unet_" if program == "kohya" else "diffusion_model."
    assert all(name.startswith(prefix) for name in tensors)
    # A joined matrix's file says nothing of parts that have no LoRA but that their rows are zero.
    folded = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    assert all(float(tensors[n]) == len(tensors[f"{n.removesuffix('.alpha')}.{down}.weight"])
               for n in tensors.keys() - folded.keys() for down in ("lora_A", "lora_down")
               if f"{n.removesuffix('.alpha')}.{down}.weight" in tensors)  # fmt: skip
    back = pipeline_class.lora_state_dict(dict(folded))
    back = back[0] if isinstance(back, tuple) else back
    found = {name.removeprefix("transformer."): dW for name, dW in by_the_rule(back, probe).items()}
    expected = {pair.layer: pair.B @ (pair.A @ probe(pair.A.shape[1])) for pair in pairs}
    found = {name: dW for name, dW in found.items() if name in expected or dW.abs().max() > 0}
    assert_same(found, expected)


def test_joined_matrices_end_to_end(tmp_path, capsys):
    """A whole run: Flux in ComfyUI's names, by the loaders' rule, against what fuse_lora does to q, k and v."""
    adapter = trained_adapter(flux, "lora", ("to_q", "to_v", "add_k_proj"))
    adapter.pipe.save_pretrained(tmp_path / "base")
    adapter.save_lora(tmp_path)
    given = ["export", str(tmp_path), "--format", "comfyui", "--model", str(tmp_path / "base")]
    assert main([*given, "--output", str(tmp_path / "flux.safetensors")]) == 0
    found = by_the_rule(load_file(tmp_path / "flux.safetensors"))
    change = merged_change(adapter)
    q, v = (change[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_v"))
    joined = torch.cat([q, torch.zeros_like(q), v])
    torch.testing.assert_close(found["diffusion_model.double_blocks.0.img_attn.qkv"], joined, atol=1e-6, rtol=1e-5)
    assert len(found) == 3 and found["diffusion_model.single_blocks.0.linear1"].shape[0] == 7 * 32


def test_merged_draws_what_the_adapter_draws(tmp_path, capsys):
    adapter = trained_adapter()
    adapter.save_lora(tmp_path / "run")
    (tmp_path / "run" / "es_config.json").write_text('{"base_model": "tiny-sana-sprint", "config": {}}')
    assert main(["export", str(tmp_path / "run"), "--format", "merged"]) == 0
    folder = capsys.readouterr().out.strip()
    merged = diffusers.DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
    base = fresh_sprint().transformer.state_dict()
    change = merged_change(adapter)
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        torch.testing.assert_close(
            merged[name], value + change[layer] if layer in change else value, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_a_program_without_the_model_is_a_clear_no(format, tmp_path, capsys):
    trained_adapter().save_lora(tmp_path)
    assert main(["export", str(tmp_path), "--format", format, "--model", "tiny-sana-sprint"]) == 2
    error = capsys.readouterr().err
    assert f"{format} has no SanaTransformer2DModel" in error and "export to 'diffusers'" in error
    assert main(["export", str(tmp_path), "--format", "diffusers"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "diffusers", "--model", "tiny-sana-sprint"]) == 0
    path = capsys.readouterr().out.strip()
    assert_same(by_the_rule(load_file(path)), by_the_rule(load_file(tmp_path / LORA_WEIGHTS_NAME)))
