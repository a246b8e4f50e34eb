"""LoRA files of any program: applied whole and at their own strength, or refused with what is left out."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_pipelines import flux, fresh_sprint, stable_diffusion

import es_trl
from es_trl.evaluation import find_adapters
from es_trl.hub import find_adapter
from es_trl.pipelines import LORA_WEIGHTS_NAME, CallSettings, LoadedAdapters


CALL = CallSettings(1, 2.0, height=32, width=32, max_sequence_length=16)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def pairs_of(pipe, rank=4, targets=ATTENTION, **config) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors by layer, of some ranks, for the pipeline's denoiser."""
    denoiser = getattr(pipe, pipe._lora_loadable_modules[0])
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **config))
    names = get_peft_model_state_dict(denoiser)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in names.items()}
    layers = [name.removesuffix(".lora_A.weight") for name in names if "lora_A" in name]
    pipe.unload_lora_weights()
    return {layer: tuple(tensors[f"{layer}.lora_{part}.weight"] for part in "AB") for layer in layers}


def diffusers_names(pairs, prefix="transformer"):
    return {
        f"{prefix}.{layer}.lora_{p}.weight": t
        for layer, pair in pairs.items()
        for p, t in zip("AB", pair, strict=True)
    }


def weights(pipe) -> dict[str, torch.Tensor]:
    """What the denoiser computes with, its adapters merged."""
    denoiser = getattr(pipe, pipe._lora_loadable_modules[0])
    pipe.fuse_lora(components=[pipe._lora_loadable_modules[0]])
    state = {name.replace(".base_layer", ""): value.clone() for name, value in denoiser.state_dict().items()}
    return {name: value for name, value in state.items() if "lora_" not in name}


def assert_applied(build, path, pairs, scales) -> None:
    """The file, loaded, is `scale B A` on every layer, and nothing else."""
    base, pipe = weights_of(build()), build()
    loaded = LoadedAdapters(pipe, {"it": str(path)}, CallSettings(num_inference_steps=1))
    with loaded.chosen("it"):
        merged = weights(pipe)
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        if layer in pairs:
            A, B = pairs[layer]
            value = value + scales[layer] * (B.flatten(1) @ A.flatten(1)).view_as(value)
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)


def weights_of(pipe):
    return dict(getattr(pipe, pipe._lora_loadable_modules[0]).state_dict())


# --- whole, and at its own strength ---


def mixed(pairs):
    """Pairs of several ranks, each with an alpha of its own."""
    ranks = [1 + i % 4 for i in range(len(pairs))]
    alphas = [0.5 + i % 3 for i in range(len(pairs))]
    cut = {layer: (A[:r], B[:, :r]) for (layer, (A, B)), r in zip(pairs.items(), ranks, strict=True)}
    return cut, {layer: alpha / r for layer, r, alpha in zip(pairs, ranks, alphas, strict=True)}


def kohya_names(pairs, scales, prefix):
    tensors = {}
    for layer, (A, B) in pairs.items():
        name = prefix + layer.replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = A.contiguous(), B.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(scales[layer] * len(A))
    return tensors


@pytest.mark.parametrize("build", [fresh_sprint, stable_diffusion, flux])
def test_kohyas_mixed_ranks_and_alphas_are_applied_exactly(build, tmp_path):
    pairs, scales = mixed(pairs_of(build()))
    prefix = "lora_unet_" if build is stable_diffusion else "lora_transformer_"
    save_file(kohya_names(pairs, scales, prefix), tmp_path / "mine.safetensors")
    assert_applied(build, tmp_path / "mine.safetensors", pairs, scales)


def test_flux_in_kohyas_own_names_is_applied_exactly(tmp_path):
    """Their q, k and v are one matrix; diffusers' converter parts it."""
    generator = torch.Generator().manual_seed(0)
    pairs, scales, tensors = {}, {}, {}
    for part, names in {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}.items():
        A, B = torch.randn(4, 32, generator=generator), torch.randn(96, 4, generator=generator)
        tensors |= kohya_names(
            {f"double_blocks.0.{part}_attn.qkv": (A, B)}, {f"double_blocks.0.{part}_attn.qkv": 0.5}, "lora_unet_"
        )
        for name, rows in zip(names, B.chunk(3), strict=True):
            pairs[f"transformer_blocks.0.attn.{name}"] = (A, rows)
            scales[f"transformer_blocks.0.attn.{name}"] = 0.5
    save_file(tensors, tmp_path / "mine.safetensors")
    assert_applied(flux, tmp_path / "mine.safetensors", pairs, scales)


@pytest.mark.parametrize("alpha", [4, 6])
def test_a_folder_of_peft_has_its_strength_in_its_config(alpha, tmp_path):
    pairs = pairs_of(fresh_sprint())
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=ATTENTION, alpha_pattern={"attn1.to_q": 2})
    config.save_pretrained(tmp_path)
    save_file(diffusers_names(pairs, "base_model.model"), tmp_path / "adapter_model.safetensors")
    scales = {layer: 0.5 if layer.endswith("attn1.to_q") else alpha / 4 for layer in pairs}
    path = find_adapter(tmp_path)
    assert_applied(fresh_sprint, path, pairs, scales)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json.*alpha is not known"):
        LoadedAdapters(fresh_sprint(), {"it": path}, CALL)


def test_comfyuis_prefix_before_the_models_own_names(tmp_path):
    pairs, scales = mixed(pairs_of(fresh_sprint()))
    tensors = diffusers_names(pairs, "diffusion_model")
    tensors |= {
        f"diffusion_model.{layer}.alpha": torch.tensor(scales[layer] * len(A)) for layer, (A, _) in pairs.items()
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "x.safetensors")
    assert_applied(fresh_sprint, tmp_path / "x.safetensors", pairs, scales)


# --- a part only ---


def foreign(tensors):
    few = [name for name in tensors if "transformer_blocks.0." in name]
    return {n: tensors[n] for n in few} | {
        n.replace("s.0.", f"s.{i}."): tensors[n].clone() for n in few for i in (50, 51)
    }


def without_one_B(tensors):
    return {name: value for name, value in tensors.items() if "blocks.1.attn1.to_v.lora_B" not in name}


def with_text_encoder(tensors):
    extra = {
        "text_encoder.layers.0.q.lora_A.weight": torch.ones(4, 8),
        "text_encoder.layers.0.q.lora_B.weight": torch.ones(8, 4),
    }
    return tensors | extra


def with_dora(tensors):
    return tensors | {"transformer.transformer_blocks.0.attn1.to_q.dora_scale": torch.ones(8)}


def deeper_twin(tensors):
    """A layer of the model's own, twice, under a name it does not have."""
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    return tensors | {name.format(part).replace("to_q", "to_z"): tensors[name.format(part)].clone() for part in "AB"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (foreign, r"transformer_blocks\.5[01]\."),
        (without_one_B, r"blocks\.1\.attn1\.to_v\.lora_A"),
        (with_text_encoder, r"text_encoder\.layers\.0\.q"),
        (with_dora, "dora_scale"),
        (deeper_twin, r"attn1\.to_z"),
    ],
)
def test_what_is_left_out_is_named_and_has_to_be_allowed(change, named, tmp_path, caplog):
    save_file(change(diffusers_names(pairs_of(fresh_sprint()))), tmp_path / LORA_WEIGHTS_NAME)
    arguments = ["tiny-sana-sprint", ["a cat"], "jpeg_compressibility"]
    keywords = {"adapters": str(tmp_path), "steps": [1], "settings": CALL, "resamples": 100}
    with pytest.raises(ValueError, match=f"takes only a part of it, without .*{named}.*allow_partial"):
        es_trl.evaluate(*arguments, **keywords)
    result = es_trl.evaluate(*arguments, **keywords, allow_partial=True)
    assert [row.name for row in result.rows] == ["base@1", "adapter@1"]
    assert "takes only a part of it" in caplog.text


def test_the_text_encoder_is_left_alone(tmp_path):
    """diffusers would put these on Stable Diffusion's text encoder, and prompts are encoded once for all rows."""
    tensors = diffusers_names(pairs_of(stable_diffusion()), "unet")
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        tensors | {name.format("A"): torch.ones(4, 16), name.format("B"): torch.ones(16, 4)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ValueError, match=r"without text_encoder\.text_model"):
        LoadedAdapters(stable_diffusion(), {"it": str(tmp_path / "a.safetensors")})
    pipe = stable_diffusion()
    LoadedAdapters(pipe, {"it": str(tmp_path / "a.safetensors")}, allow_partial=True)
    assert not [name for name, _ in pipe.text_encoder.named_modules() if "lora" in name]


def test_an_adapter_without_effect_says_so(tmp_path, caplog):
    tensors = diffusers_names(pairs_of(fresh_sprint()))
    save_file({n: v * 0 if "lora_B" in n else v for n, v in tensors.items()}, tmp_path / LORA_WEIGHTS_NAME)
    LoadedAdapters(fresh_sprint(), {"it": str(tmp_path)}, CALL)
    assert "changes nothing: all its B are 0" in caplog.text


def test_entries_that_are_not_numbers_are_refused(tmp_path):
    tensors = diffusers_names(pairs_of(fresh_sprint()))
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / LORA_WEIGHTS_NAME)
    with pytest.raises(ValueError, match="not finite in transformer"):
        LoadedAdapters(fresh_sprint(), {"it": str(tmp_path)}, CALL)


# --- found by name ---


def test_adapters_are_found_under_any_name(tmp_path):
    path = tmp_path / "one" / "my_style.safetensors"
    path.parent.mkdir()
    save_file(diffusers_names(pairs_of(fresh_sprint())), path)
    assert find_adapter(path) == str(path)
    other = tmp_path / "two" / "adapter_model.safetensors"
    other.parent.mkdir()
    tensors = load_file(path)
    save_file({name: 2 * value for name, value in tensors.items()}, other)
    assert [found.label for found in find_adapters([str(path), str(other.parent)])] == ["my_style", "two"]
    for name, message in [
        (path.parent, "it has my_style.safetensors: give the file itself"),
        (tmp_path / "one" / "other.safetensors", "neither a folder nor a file"),
        ("some/other.safetensors", "neither a folder nor a file"),
        (tmp_path, "holds no pytorch_lora_weights.safetensors and no adapter_model.safetensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_adapters(str(name))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no \.safetensors one"):
        find_adapters(str(tmp_path / "weights.bin"))
    shutil.copytree(other.parent, tmp_path / "base")
    with pytest.raises(ValueError, match=r"a row of the table is called so: name it, mine="):
        find_adapters([str(path), str(tmp_path / "base")])


def test_the_metadata_of_diffusers_is_heeded(tmp_path):
    pairs = pairs_of(fresh_sprint())
    config = LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, use_rslora=True).to_dict()
    config = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    header = {"lora_adapter_metadata": json.dumps(config, default=str)}
    save_file(diffusers_names(pairs), tmp_path / LORA_WEIGHTS_NAME, metadata=header)
    assert_applied(fresh_sprint, tmp_path / LORA_WEIGHTS_NAME, pairs, dict.fromkeys(pairs, 3.0))
