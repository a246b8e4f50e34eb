"""Rewards with networks of their own against plain re-calculations, on small random checkpoints of their formats."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torchvision import transforms as T

from es_trl.rewards import Aesthetic, ClipScorer, HPSv2, ImageReward, Ocr, Pairwise, RewardSet
from es_trl.rewards.ocr import edit_distance, quoted, text_score


PROMPTS = ["a red cat", "two blue dogs on the table", "a frog " * 90, "apple"]
CLIP_NORMALISE = T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def noise_images(sizes=((60, 40), (64, 64), (32, 32), (33, 128))):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def random_weights(module: nn.Module, seed=0) -> nn.Module:
    """Large enough that every part of the network shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.3))
    return module.eval()


def published_head(width: int) -> nn.Sequential:
    """LAION's head as it is published: dropout between the layers, so the layers are 0, 2, 4, 6 and 7."""
    linear, out = nn.Linear, nn.Dropout
    return random_weights(
        nn.Sequential(
            linear(width, 1024), out(), linear(1024, 128), out(), linear(128, 64), out(), linear(64, 16), linear(16, 1)
        )
    )


def prefixed(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


# --- aesthetic ---


@pytest.fixture
def head_folder(tmp_path):
    torch.save(prefixed("layers.", published_head(128)), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    return tmp_path


def test_aesthetic_is_the_head_on_unit_features(head_folder):
    images = noise_images()
    features = ClipScorer("tiny-pickscore").image_features(images)
    expected = published_head(128)(features)[:, 0]
    reward = Aesthetic("tiny-pickscore", head=str(head_folder))
    np.testing.assert_allclose(reward(prompts=PROMPTS, images=images), expected.tolist(), atol=1e-5)
    assert expected.std() > 1e-4


def test_aesthetic_refuses_a_head_of_another_clip_and_one_that_runs_code(tmp_path, head_folder):
    torch.save(prefixed("layers.", published_head(64)), tmp_path / "aesthetic-model.safetensors")
    (tmp_path / "aesthetic-model.safetensors").rename(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(ValueError, match=r"shape \(1024, 64\), not \(1024, 128\): it belongs to another model"):
        Aesthetic("tiny-pickscore", head=str(tmp_path))
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(ValueError, match="holds more than tensors and is not opened"):
        Aesthetic("tiny-pickscore", head=str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("spec", "file"),
    [("hpsv2", "HPS_v2.1_compressed.pt of 'xswu/HPSv2'"), ("image_reward", "ImageReward.pt of 'zai-org/ImageReward'"),
     ("aesthetic", "aesthetic-model.pth of 'trl-lib/ddpo-aesthetic-predictor'")],
)  # fmt: skip
def test_default_checkpoints_offline_are_named_with_the_fix(spec, file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"{file} cannot be loaded: HF_HUB_OFFLINE is set.*hf download.*folder'"):
        RewardSet(spec).load()


# --- hpsv2 ---

HPS_MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def hps_folder(folder, drop=None):
    model = random_weights(open_clip.CLIP(**HPS_MODEL))
    weights = {name: value for name, value in model.state_dict().items() if name != drop}
    torch.save({"state_dict": weights, "epoch": 1}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": HPS_MODEL}))
    return model


def test_hpsv2_is_the_cosine_on_padded_pictures(tmp_path):
    """Compared with the authors' package once by hand (see docs/rewards.md); here with open_clip's own forward."""
    model, images = hps_folder(tmp_path), noise_images()
    expected = []
    for prompt, image in zip(PROMPTS, images, strict=True):
        pixels = T.ToTensor()(image)
        scale = 32 / max(image.size)
        small = T.Resize((round(image.height * scale), round(image.width * scale)), T.InterpolationMode.BICUBIC)(
            pixels
        )
        canvas = torch.zeros(3, 32, 32)
        top, left = (32 - small.shape[1]) // 2, (32 - small.shape[2]) // 2
        canvas[:, top : top + small.shape[1], left : left + small.shape[2]] = small
        with torch.no_grad():
            output = model(CLIP_NORMALISE(canvas)[None], open_clip.tokenize([prompt]))
        expected.append(float(output[0] @ output[1].T))
    rewards = RewardSet(f"hpsv2:{tmp_path}")
    np.testing.assert_allclose(rewards(PROMPTS, images)[:, 0], expected, atol=1e-6)
    assert rewards.names == ["hpsv2"] and np.std(expected) > 0.01


def test_hpsv2_refuses_a_checkpoint_with_holes(tmp_path):
    hps_folder(tmp_path, drop="visual.proj")
    with pytest.raises(ValueError, match=r"lacks 1 weights \(visual.proj, ...\): it would score noise"):
        HPSv2(str(tmp_path))
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="HPS_v2.1_compressed.pt' cannot be read|holds more than tensors"):
        HPSv2(str(tmp_path))


# --- image_reward ---

WIDTH, TEXT_WIDTH, HEADS, TEXT_HEADS, DEPTH, PATCH, SIDE = 128, 64, 2, 4, 2, 16, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red cat two blue dogs on the table frog apple".split()]
TEXT_CONFIG = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 96, "num_hidden_layers": DEPTH, "num_attention_heads": TEXT_HEADS,
    "vocab_size": len(WORDS), "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "pad_token_id": 0, "encoder_width": 768, "model_type": "bert", "architectures": ["BertModel"],
}  # fmt: skip


def image_reward_weights() -> dict[str, torch.Tensor]:
    """Under the names of the published file."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}

    def linear(name, a, b):
        return {f"{name}.weight": (b, a), f"{name}.bias": (b,)}

    def norm(name, a):
        return {f"{name}.weight": (a,), f"{name}.bias": (a,)}

    shapes |= norm("norm", WIDTH)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH)
        shapes |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", WIDTH, 256) | linear(f"{block}.mlp.fc2", 256, WIDTH)
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text = {"word_embeddings.weight": (len(WORDS), TEXT_WIDTH), "position_embeddings.weight": (64, TEXT_WIDTH)}
    text = {f"embeddings.{n}": s for n, s in (text | norm("LayerNorm", TEXT_WIDTH)).items()}
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        for kind, source in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            for part, a in (("query", TEXT_WIDTH), ("key", source), ("value", source)):
                text |= linear(f"{layer}.{kind}.self.{part}", a, TEXT_WIDTH)
            text |= linear(f"{layer}.{kind}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            text |= norm(f"{layer}.{kind}.output.LayerNorm", TEXT_WIDTH)
        text |= linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 96) | linear(f"{layer}.output.dense", 96, TEXT_WIDTH)
        text |= norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.3) + ("orm" in name)
        for name, shape in shapes.items()
    }
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    weights["blip.vision_proj.weight"] = torch.randn(4, WIDTH, generator=generator)  # not used, but in the file
    return weights | prefixed("mlp.layers.", published_head(TEXT_WIDTH))


def attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(0, 1).flatten(1)


def blip_by_hand(w: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """ImageReward for one picture (3, S, S) and one text (L,), written out from the paper's architecture."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    v = "blip.visual_encoder."
    patches = F.conv2d(pixels[None], w[v + "patch_embed.proj.weight"], w[v + "patch_embed.proj.bias"], PATCH)
    x = torch.cat([w[v + "cls_token"][0], patches[0].flatten(1).T]) + w[v + "pos_embed"][0]
    for i in range(DEPTH):
        b = f"{v}blocks.{i}."
        x = x + linear(
            b + "attn.proj", attend(*linear(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1), HEADS)
        )
        x = x + linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    image = norm(v + "norm", x, 1e-6)

    t = "blip.text_encoder."
    words, places = (w[f"{t}embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    x = norm(t + "embeddings.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
    hidden = torch.where(mask.bool(), 0.0, -torch.inf)
    for i in range(DEPTH):
        layer = f"{t}encoder.layer.{i}."
        for kind, source, bias in (("attention", None, hidden), ("crossattention", image, None)):
            a = f"{layer}{kind}."
            other = x if source is None else source
            q, k, value = linear(a + "self.query", x), linear(a + "self.key", other), linear(a + "self.value", other)
            seen = attend(q, k, value, TEXT_HEADS, bias)
            x = norm(a + "output.LayerNorm", x + linear(a + "output.dense", seen), 1e-12)
        wide = F.gelu(linear(layer + "intermediate.dense", x))
        x = norm(layer + "output.LayerNorm", x + linear(layer + "output.dense", wide), 1e-12)
    for i in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{i}", x)
    return float((x[0, 0] - 0.16717362830052426) / 1.0333394966054072)


@pytest.fixture
def image_reward_folder(tmp_path):
    torch.save(image_reward_weights(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(TEXT_CONFIG))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def test_image_reward_is_blip_and_the_head_written_out(image_reward_folder):
    """Compared with the authors' code once by hand (see docs/rewards.md); here with the architecture written out."""
    weights, images = image_reward_weights(), noise_images()
    crop = T.Compose([T.Resize(SIDE, T.InterpolationMode.BICUBIC), T.CenterCrop(SIDE), T.ToTensor(), CLIP_NORMALISE])
    expected = []
    for prompt, image in zip(PROMPTS, images, strict=True):
        ids = [2, *[WORDS.index(word) for word in prompt.split()][:33], 3]
        mask = torch.tensor([1] * len(ids) + [0] * (35 - len(ids)))
        ids = torch.tensor(ids + [0] * (35 - len(ids)))
        with torch.no_grad():
            expected.append(blip_by_hand(weights, crop(image), ids, mask))
    scores = RewardSet(f"image_reward:{image_reward_folder}")(PROMPTS, images)[:, 0]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.std(expected) > 1e-3


def test_image_reward_refuses_other_files(image_reward_folder):
    torch.save({"blip.visual_encoder.cls_token": torch.zeros(1, 1, WIDTH)}, image_reward_folder / "ImageReward.pt")
    with pytest.raises(ValueError, match="has no weights blip.text_encoder.*no ImageReward file"):
        ImageReward(str(image_reward_folder))
    weights = image_reward_weights()
    weights["blip.visual_encoder.norm.bias"][3] = math.nan
    torch.save(weights, image_reward_folder / "ImageReward.pt")
    with pytest.raises(ValueError, match="post_layernorm.bias.*is not finite"):
        ImageReward(str(image_reward_folder))
    (image_reward_folder / "med_config.json").unlink()
    with pytest.raises(ValueError, match="has no med_config.json"):
        ImageReward(str(image_reward_folder))


# --- ocr ---


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("open", "0pen", 1)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("OPEN 24 hours", "open 24", 1.0),
        ("OPFN24", "open 24", 5 / 6),
        ("", "open", 0.0),
        ("something else entirely", "open", 0.0),
        ("op", "o p e n", 0.5),
    ],
)
def test_text_score(read, wanted, score):
    assert text_score(read, wanted) == pytest.approx(score)


def test_wanted_text_is_the_first_in_quotes():
    assert quoted('a sign "open" above a door "closed"') == "open"
    assert quoted("a sign \u201copen\u201d") == "open"
    assert quoted("it's a cat's sign") is None


def test_ocr_reads_rendered_text():
    def sign(text):
        image = Image.new("RGB", (224, 96), "white")
        ImageDraw.Draw(image).text((16, 24), text, fill="black", font=ImageFont.load_default(40))
        return image

    ocr = Ocr()
    prompts = ['a sign that says "OPEN 24"', 'a sign that says "OPEN 24"', "a cat"]
    scores = RewardSet(ocr)(prompts, [sign("Open 24"), sign("CLOSED"), sign("OPEN 24")])[:, 0]
    assert scores[0] == 1.0 and scores[1] < 0.5 and math.isnan(scores[2])
    assert ocr(prompts=["a cat"], images=[sign("Open 24")], text=["open"]) == [1.0]


# --- pairwise ---


def test_pairwise_is_the_mean_win_probability_within_the_group():
    images = noise_images()
    scores = RewardSet("tiny-pickscore")(["a red cat"] * 4, images)[:, 0]
    win = 1 / (1 + np.exp(-(scores[:, None] - scores[None]) / 0.5))
    expected = (win.sum(axis=1) - 0.5) / 3
    pairwise = Pairwise("tiny-pickscore", temperature=0.5)
    np.testing.assert_allclose(pairwise(["a red cat"] * 4, images), expected, atol=1e-9)
    assert np.mean(expected) == pytest.approx(0.5) and np.std(expected) > 0.01
    groups = RewardSet(pairwise)(["a red cat"] * 4, images, groups=[0, 1, 0, 2])[:, 0]
    np.testing.assert_allclose(groups, [win[0, 2], math.nan, win[2, 0], math.nan], atol=1e-9)
