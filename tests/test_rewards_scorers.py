"""The shipped rewards give the numbers their documentation promises."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel

from es_trl import assets
from es_trl.rewards import (
    ClipAesthetic,
    ClipScorer,
    ClipText,
    NoArtifacts,
    PickScore,
    RewardSet,
    jpeg_compressibility,
    jpeg_incompressibility,
)
from es_trl.rewards.clip_aesthetic import POSITIVE_TEXTS
from es_trl.rewards.no_artifacts import NEGATIVE_TEXTS


LONG = "a green tree left of two red cats " * 12  # more than any context; where it is cut shows in the features
PROMPTS = ["two red cats", "a blue dog left of a cake", LONG, "two red cats", "a frog"]


def noise_images(count=5, size=(64, 64), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(pixels).resize(size).convert(mode) for pixels in small]


def plain_cosine(checkpoint, prompts, images):
    """Cosines through `CLIPModel.forward`, a different way through transformers than ours."""
    folder = assets.resolve(checkpoint)
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    inputs = AutoProcessor.from_pretrained(folder)(
        text=prompts, images=images, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = model(**inputs)
        scale = model.logit_scale.exp().item()
    return (output.logits_per_image / scale).double().numpy(), scale


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer("tiny-pickscore")


@pytest.mark.parametrize("checkpoint", ["tiny-pickscore", "tiny-clip-heldout"])
def test_pickscore_is_scale_times_cosine_of_transformers(checkpoint):
    images = noise_images()
    cosine, scale = plain_cosine(checkpoint, PROMPTS, images)
    scores = PickScore(checkpoint)(prompts=PROMPTS, images=images)
    np.testing.assert_allclose(scores, scale * np.diag(cosine), atol=1e-4)
    assert np.std(scores) > 0.01
    np.testing.assert_array_equal(RewardSet(checkpoint)(PROMPTS, images)[:, 0], scores)


def test_clip_similarities_follow_their_formulas():
    images = noise_images()
    texts = [*PROMPTS, *POSITIVE_TEXTS, *NEGATIVE_TEXTS]
    cosine, _ = plain_cosine("tiny-pickscore", texts, images)
    n, positive = len(PROMPTS), len(PROMPTS) + len(POSITIVE_TEXTS)
    expected = {
        ClipText: (1 + np.diag(cosine[:, :n])) / 2,
        ClipAesthetic: (1 + cosine[:, n:positive].mean(axis=1)) / 2,
        NoArtifacts: 1 - (1 + cosine[:, positive:].mean(axis=1)) / 2,
    }
    for reward, values in expected.items():
        np.testing.assert_allclose(reward("tiny-pickscore")(prompts=PROMPTS, images=images), values, atol=1e-5)


def test_features_have_unit_norm_and_keep_the_order(scorer):
    images = noise_images(40)  # more than one chunk
    features = scorer.image_features(images)
    assert features.shape == (40, 128) and features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(scorer.image_features(images[::-1]), features.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.text_features(PROMPTS).norm(dim=-1), torch.ones(len(PROMPTS)))


def test_images_of_any_size_and_mode_are_taken(scorer):
    images = [
        noise_images(1, mode="L")[0],
        noise_images(1, mode="RGBA")[0],
        noise_images(1, size=(200, 120))[0],
        noise_images(1, size=(40, 64))[0],
    ]
    together = scorer.image_features(images)
    for row, image in zip(together, images, strict=True):
        torch.testing.assert_close(scorer.image_features([image])[0], row, atol=1e-5, rtol=0)


def test_each_text_is_encoded_once(scorer, monkeypatch):
    encoded = []
    encode = scorer.model.get_text_features

    def counting(**inputs):
        encoded.append(len(inputs["input_ids"]))
        return encode(**inputs)

    monkeypatch.setattr(scorer.model, "get_text_features", counting)
    texts = ["a pink star", "two gray pizzas", "a pink star"]
    first = scorer.text_features(texts)
    assert sum(encoded) == 2
    torch.testing.assert_close(scorer.text_features(texts), first, atol=0, rtol=0)
    assert sum(encoded) == 2


def test_text_features_do_not_depend_on_company_and_cache_is_bounded(scorer, monkeypatch):
    alone = ClipScorer("tiny-pickscore").text_features(["a frog"])[0]
    monkeypatch.setattr("es_trl.rewards.clip_features.MAX_CACHED_TEXTS", 2)
    fresh = ClipScorer("tiny-pickscore")
    together = fresh.text_features(["a green tree on a black background", "two red cats", "a frog"])[2]
    assert torch.equal(alone, together)
    assert len(fresh._texts) == 2


def test_text_longer_than_the_context_is_cut(scorer):
    torch.testing.assert_close(scorer.text_features(["red " * 500]), scorer.text_features(["red " * 600]))


def test_rewards_of_one_checkpoint_share_the_model_and_the_image_features(monkeypatch):
    rewards = RewardSet(["clip_text:tiny-pickscore", "no_artifacts:tiny-pickscore", "tiny-pickscore"]).load()
    scorers = {id(call.func.scorer) for call in rewards._calls}
    assert len(scorers) == 1
    shared = rewards._calls[0].func.scorer
    seen = []
    encode = shared.model.get_image_features
    monkeypatch.setattr(
        shared.model, "get_image_features", lambda **kw: seen.append(len(kw["pixel_values"])) or encode(**kw)
    )
    images = noise_images()
    first = rewards(PROMPTS, images)
    assert sum(seen) == len(images)
    images[0].paste((255, 0, 0), (0, 0, 64, 64))  # the same object with other pixels must be scored anew
    second = rewards(PROMPTS, images)
    assert sum(seen) == 2 * len(images)
    assert (first[0] != second[0]).all()
    np.testing.assert_allclose(first[1:], second[1:], atol=1e-4)


def test_half_precision_is_used_and_keeps_the_scale(scorer):
    half = ClipScorer("tiny-pickscore", dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.logit_scale == scorer.logit_scale
    images = noise_images()
    features = half.image_features(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, scorer.image_features(images), atol=0.03, rtol=0)
    rewards = RewardSet("tiny-pickscore", dtype=torch.bfloat16).load()
    assert rewards._calls[0].func.scorer.dtype == torch.bfloat16


def test_jpeg_rewards_are_kilobytes_at_quality_95():
    images = [*noise_images(3, size=(96, 64)), Image.new("RGB", (96, 64), "red"), noise_images(1, mode="RGBA")[0]]
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert jpeg_incompressibility(prompts=[""] * 5, images=images) == sizes
    assert jpeg_compressibility(prompts=[""] * 5, images=images) == [-size for size in sizes]
    assert sizes[0] > 2 * sizes[3]


def copy_of_checkpoint(folder):
    shutil.copytree(assets.resolve("tiny-pickscore"), folder)
    return folder


def test_local_folder_is_loaded(tmp_path, scorer):
    folder = copy_of_checkpoint(tmp_path / "my-clip")
    images = noise_images()
    rewards = RewardSet(str(folder))
    assert rewards.names == ["my-clip"]
    np.testing.assert_array_equal(rewards(PROMPTS, images), RewardSet("tiny-pickscore")(PROMPTS, images))


@pytest.mark.parametrize("file", ["model.safetensors", "processor_config.json", "tokenizer.json"])
def test_incomplete_folder_is_refused(tmp_path, file):
    folder = copy_of_checkpoint(tmp_path / "clip")
    # Pickled weights under the usual name are there, but never read.
    (folder / file).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded.*It needs config.json, model.safetensors, the tokenizer"):
        ClipScorer(str(folder))


def test_truncated_weights_are_refused(tmp_path):
    folder = copy_of_checkpoint(tmp_path / "clip")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        ClipScorer(str(folder))


def test_another_kind_of_model_is_refused(tmp_path):
    folder = copy_of_checkpoint(tmp_path / "clip")
    (folder / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="'siglip' model: give a CLIP checkpoint"):
        ClipScorer(str(folder))


def test_checkpoint_with_missing_weights_is_refused(tmp_path):
    folder = copy_of_checkpoint(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights .visual_projection.weight.*score noise"):
        ClipScorer(str(folder))


def test_hub_id_offline_names_id_reason_and_fix(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rewards = RewardSet("clip_text:someone/some-clip")
    with pytest.raises(OSError, match="'someone/some-clip' cannot be loaded: HF_HUB_OFFLINE is set.*hf auth login"):
        rewards.load()


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, es_trl.rewards, es_trl.data, es_trl.rewards.reward_set as r; "
        "r.RewardSet(['pickscore', 'jpeg_compressibility']); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
