"""The small model's recipe by size: the shipped one is made bit by bit as it was, a larger one draws and learns."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "es_trl" / "assets" / "tiny-sana-sprint"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's own modules; they are scripts beside each other, not a package."""
    sys.path.insert(0, str(ROOT / "recipes" / "tiny_sana"))
    try:
        import common
        import mix
        import models
        import train_teacher
        import train_vae
        import world

        yield SimpleNamespace(
            common=common, mix=mix, models=models, train_teacher=train_teacher, train_vae=train_vae, world=world
        )
    finally:
        sys.path.remove(str(ROOT / "recipes" / "tiny_sana"))


@pytest.fixture(autouse=True)
def settings_of_this_process():
    """A stage sets them for a process of its own."""
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.cuda.enable_flash_sdp(flash)


# ---- the shipped size is as it was ----


def test_what_ships_has_the_shape_of_the_default_size(recipe):
    parts = {
        "vae": recipe.models.build_vae(),
        "transformer": recipe.models.build_transformer(),
        "text_encoder": recipe.models.build_text_encoder(),
    }
    for name, module in parts.items():
        (path,) = (SHIPPED / name).glob("*.safetensors")
        shipped = {key: value.shape for key, value in load_file(path).items()}
        assert {key: value.shape for key, value in module.state_dict().items()} == shipped


def test_an_autoencoder_step_is_the_one_it_was(recipe, tmp_path, monkeypatch):
    """Against the stage as it was before it knew sizes and devices, written out."""
    from models import build_vae
    from train_vae import reconstruction_loss

    monkeypatch.setattr(recipe.train_vae, "psnr", lambda *_: 0.0)
    recipe.train_vae.main(["--runs", str(tmp_path), "--steps", "1", "--batch-size", "2"])
    recipe.common.setup(11)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-5, betas=(0.9, 0.95), weight_decay=0.0)
    pictures = recipe.common.to_tensor(recipe.world.sample_batch(11, 0, 2)[0])
    latent = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent
    noise = torch.rand(len(latent), 1, 1, 1) * 0.1 * torch.randn_like(latent)
    loss = reconstruction_loss(vae.decode(latent + noise).sample, pictures)
    mean, variance = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
    loss = loss + 0.01 * (mean.square() + (variance.clamp_min(1e-4).log()).square()).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    trained = load_file(tmp_path / "vae.safetensors")
    for name, value in vae.state_dict().items():
        assert torch.equal(trained["model." + name], value), name


def test_pictures_are_those_they_were(recipe):
    """Their brightness, weighted by the place of a pixel, as it was before there were sizes."""
    pictures, _ = recipe.world.sample_batch(5, 0, 6)
    seen = (pictures.mean(3) * np.arange(64 * 64).reshape(64, 64) / 2047.5).mean((1, 2))
    assert seen == pytest.approx([178.26, 190.1, 192.86, 221.34, 209.61, 218.31], abs=0.1)


def test_teacher_batches_are_those_they_were(recipe):
    """Step 1030 of batches of 2: the second of a shard, by the formulas as they were before devices were known."""
    args = SimpleNamespace(batch_size=2, shards=3, shard=2048, seed=33, drop_text=0.5, steps=1031, device="cpu")
    shards = [(torch.randn(2048, 16, 8, 8), [f"{i} {k}" for k in range(2048)]) for i in range(3)]
    ((step, z, noise, s, texts),) = recipe.train_teacher.batches(args, shards, 1030)
    rng = torch.Generator().manual_seed(33 * 1_000_003 + 1030)
    rows = torch.randperm(2048, generator=torch.Generator().manual_seed(1))[12:14].tolist()
    times = torch.sigmoid(0.3 + 1.2 * torch.randn(2, generator=rng))
    times = torch.where(torch.rand(2, generator=rng) < 0.08, torch.ones(2), times)
    dropped = torch.rand(2, generator=rng) < 0.5
    assert step == 1030 and torch.equal(z, shards[1][0][rows]) and torch.equal(s, times)
    assert texts == ["" if drop else f"1 {k}" for k, drop in zip(rows, dropped.tolist(), strict=True)]
    assert torch.equal(noise, torch.randn(2, 16, 8, 8, generator=rng))


def test_a_shard_is_rounded_from_its_second_visit_on(recipe, tmp_path):
    """As it was when the second visit read the file."""
    args = SimpleNamespace(runs=tmp_path, seed=33, shards=2, shard=160, workers=0, device="cpu", size="6m")
    vae = SimpleNamespace(encode=lambda x: SimpleNamespace(latent=x[:, :1, :8, :8] * 1.001))
    latents = recipe.train_teacher.Latents(args, vae, 2.0, first=1)
    first, captions = latents[1]
    again, same = latents[1]
    kept = load_file(tmp_path / "latents" / "0001.safetensors")["latents"]
    assert torch.equal(again, kept.float() * 2) and not torch.equal(first, again) and captions == same
    assert captions == [scene.prompt for scene in recipe.world.sample_batch(33, 1, 160)[1]]
    resumed, _ = recipe.train_teacher.Latents(args, None, 2.0, first=1)[1]
    assert torch.equal(resumed, again)


# ---- pictures and batches ----


def test_larger_pictures_show_the_same_scenes(recipe):
    small, scenes = recipe.world.sample_batch(5, 3, 24)
    large, again = recipe.world.sample_batch(5, 3, 24, side=128)
    assert again == scenes and large.shape == (24, 128, 128, 3)
    halved = large.reshape(24, 64, 2, 64, 2, 3).mean((2, 4))
    apart = np.abs(halved - small).mean((1, 2, 3))
    others = np.abs(halved - small[::-1]).mean((1, 2, 3))
    assert apart.max() < 8 < others.min(), (apart.max(), others.min())
    with pytest.raises(ValueError, match="multiple of 64, got 96"):
        recipe.models.Size(side=96)


def test_scorers_that_ship_score_larger_pictures_alike(recipe):
    """They see 64 pixels of any picture, which is why they may judge models of both sizes."""
    from es_trl.rewards import RewardSet

    prompts = (ROOT / "es_trl/assets/prompts/test.txt").read_text().splitlines()[:48]
    rewards = RewardSet(["tiny-pickscore", "tiny-clip-heldout"], device="cpu")
    small, large = (
        rewards(prompts, [Image.fromarray(picture) for picture in recipe.world.render_prompts(prompts, 3, side)])
        for side in (64, 128)
    )
    assert np.abs(large.mean(0) - small.mean(0)).max() < 0.15 and np.abs(large - small).mean() < 0.5


def test_batches_drawn_ahead_are_the_same(recipe):
    torch.manual_seed(0)
    for workers in (0, 2):
        found = list(recipe.common.stream(7, 3, 6, 4, workers=workers))
        assert [step for step, _, _ in found] == [3, 4, 5]
        for step, pictures, scenes in found:
            drawn, same = recipe.world.sample_batch(7, step, 4)
            assert torch.equal(pictures, recipe.common.to_tensor(drawn)) and scenes == same
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0))), "nothing was drawn"


# ---- stages that are stopped ----


def test_a_stage_stops_in_time_and_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.train_vae, "psnr", lambda *_: 0.0)
    words = ["--runs", str(tmp_path), "--size", "rehearsal", "--steps", "3", "--batch-size", "1"]
    path = tmp_path / "vae.safetensors"
    found = [recipe.common.finished_steps(path)]
    for _ in range(2):
        recipe.train_vae.main([*words, "--seconds", "0"])
        found.append(recipe.common.finished_steps(path))
    recipe.train_vae.main(words)
    assert [*found, recipe.common.finished_steps(path)] == [0, 1, 2, 3]
    with safe_open(path, "pt") as file:
        assert file.get_tensor("optimizer.0.step") == 3, "the moments went on too"


# ---- a larger pipeline ----


def test_the_large_size_has_64_million_parameters(recipe):
    size = recipe.models.SIZES["64m"]
    with torch.device("meta"):
        parts = [getattr(recipe.models, f"build_{part}")(size) for part in ("vae", "text_encoder", "transformer")]
    assert sum(p.numel() for part in parts for p in part.parameters()) / 1e6 == pytest.approx(64.5, abs=0.1)


@pytest.fixture(scope="module")
def exported(recipe, tmp_path_factory):
    """An untrained pipeline of 128 px, thin, written by the recipe."""
    runs, size = tmp_path_factory.mktemp("runs"), recipe.models.SIZES["rehearsal"]
    torch.manual_seed(0)
    for name, module in (("vae", recipe.models.build_vae(size)), ("teacher", recipe.train_teacher.TextToLatent(size))):
        optimizer = torch.optim.AdamW(module.parameters())
        recipe.common.Checkpoint(runs / f"{name}.safetensors", module, optimizer).save(1)
    words = ["--runs", str(runs), "--out", str(runs), "--size", "rehearsal", "--mix", "0", "--only", "pipeline"]
    recipe.mix.main(words)
    return runs / "tiny-sana-sprint"


def test_a_larger_pipeline_draws_128_pixels(exported):
    from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline

    settings = CallSettings(num_inference_steps=1, guidance_scale=2.0, max_sequence_length=16)
    adapter = PipelineAdapter(load_pipeline(str(exported)), settings=settings)
    images = adapter.generate(["a red cat", "two blue dogs"], [torch.Generator().manual_seed(i) for i in range(2)])
    assert [image.size for image in images] == [(128, 128)] * 2
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.parametrize("method", ["ES", "GRPO"])
def test_methods_step_on_a_larger_pipeline(exported, tmp_path, method):
    import es_trl

    trainer_class = getattr(es_trl, f"{method}Trainer")
    small = {"ES": {"population_size": 4, "members_per_forward": 4}, "GRPO": {"num_generations": 2}}[method]
    config = trainer_class.config_class(
        output_dir=str(tmp_path), max_steps=1, prompts_per_step=2, max_sequence_length=16, use_cpu=True,
        guidance_scale=2.0, num_inference_steps=1, report_to="none", sample_steps=0, save_strategy="no", **small,
    )  # fmt: skip
    trainer = trainer_class(str(exported), "tiny-pickscore", config, train_dataset=["a red cat", "two blue dogs"])
    before = {name: value.clone() for name, value in trainer.adapter.theta.items()}
    trainer.train()
    assert trainer.images_drawn == 4
    assert any(not torch.equal(value, before[name]) for name, value in trainer.adapter.theta.items())
