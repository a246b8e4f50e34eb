"""Rewards with networks of their own against plain re-calculations, on small random checkpoints of their formats."""

import io
import json
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from es_trl.rewards import Aesthetic, ClipScorer, HPSv2, ImageReward, Ocr, Pairwise, RewardSet
from es_trl.rewards.checkpoints import read_tensors
from es_trl.rewards.ocr import edit_distance, quoted, text_score
from recipes.benchmarks import reward_references as references


PROMPTS = ["a red cat", "two blue dogs on the table", "a frog " * 90, "apple"]


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


# --- aesthetic ---


@pytest.fixture
def head_folder(tmp_path):
    torch.save(references.head_weights(128), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    return tmp_path


def test_aesthetic_is_the_head_on_unit_features(head_folder):
    images = noise_images()
    features = ClipScorer("tiny-pickscore").image_features(images)
    expected = references.linear_layers(references.head_weights(128), "layers", features)
    reward = Aesthetic("tiny-pickscore", head=str(head_folder))
    np.testing.assert_allclose(reward(prompts=PROMPTS, images=images), expected, atol=1e-5)
    assert np.std(expected) > 1e-4


def test_aesthetic_refuses_a_head_of_another_clip_and_one_that_runs_code(tmp_path, head_folder):
    torch.save(references.head_weights(64), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
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
    expected = references.hpsv2(model, PROMPTS, images)
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
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="reward 'hpsv2': .*open_clip_config.json' cannot be read"):
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
    vision = {"width": WIDTH, "depth": DEPTH, "mlp": 256, "patch": PATCH, "side": SIDE}
    text = {"width": TEXT_WIDTH, "depth": DEPTH, "mlp": 96, "words": len(WORDS), "places": 64}
    return references.image_reward_weights(vision, text)


@pytest.fixture
def image_reward_folder(tmp_path):
    torch.save(image_reward_weights(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(TEXT_CONFIG))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def test_image_reward_is_blip_and_the_head_written_out(image_reward_folder):
    """Compared with the authors' code once by hand (see docs/rewards.md); here with the architecture written out."""
    weights, images = image_reward_weights(), noise_images()
    expected = []
    for prompt, image in zip(PROMPTS, images, strict=True):
        ids = torch.tensor([2, *[WORDS.index(word) for word in prompt.split()][:33], 3])
        pixels = references.blip_picture(image, SIDE)
        expected.append(references.image_reward(weights, pixels, ids, (HEADS, TEXT_HEADS)))
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


@pytest.mark.parametrize(
    "prompt",
    [
        'a sign "" that says "open"',
        'a sign " " above "open", not "shut"',
        'a 5" nail under a sign "open"',
        "ein Schild \u201eopen\u201c",
        "un panneau \u00ab\u00a0open\u00a0\u00bb",
        "ein Schild \u00bbopen\u00ab",
        "szyld \u201eopen\u201d",
        "en skylt \u201dopen\u201d",
        "\u770b\u677f\u300copen\u300d",
        "\u770b\u677f\u300eopen\u300f",
        "\u5199\u7740\u201copen\u201d\u7684\u724c",
        "\u5199\u7740\uff02open\uff02",
        "\u770b\u677f\uff62open\uff63",
        "the dog\u2019s sign \u2018open\u2019",
    ],
    ids=ascii,
)
def test_quotes_of_many_languages_and_empty_ones(prompt):
    assert quoted(prompt) == "open"


def test_an_apostrophe_within_single_quotes_does_not_close_them():
    assert quoted("a sign \u2018don\u2019t\u2019 above") == "don\u2019t"
    assert quoted("the dogs\u2019 and the cats\u2019 sign") is quoted("it's 'open'") is None


def test_ocr_compares_letters_however_they_are_composed_and_ignores_blanks():
    assert text_score("cafe\u0301", "CAF\u00c9") == text_score("CAF\u00c9", "cafe\u0301") == 1.0
    assert text_score("\uff2f\uff30\uff25\uff2e", "open") == text_score("STRASSE", "Stra\u00dfe") == 1.0
    assert text_score("open", " \u200b\u00a0") is None


def test_the_column_of_ocr_takes_numbers_and_nothing_odd(monkeypatch):
    monkeypatch.setattr("es_trl.rewards.ocr._reader", lambda threads: lambda image: "2024")
    ocr, image = Ocr(), Image.new("RGB", (8, 8))
    numbers = [2024, 2024.0, np.int64(2024), "2024", " 20 24 "]
    assert ocr(["p"] * 5, [image] * 5, text=numbers) == [1.0] * 5
    assert ocr(["p"] * 5, [image] * 5, text=["", "  ", "\u200b", None, math.nan]) == [None] * 5
    for odd in (["2024"], True, b"2024"):
        with pytest.raises(ValueError, match="column 'text' of the ocr reward holds a .*give a str"):
            ocr(["p"], [image], text=[odd])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pytorch_files_are_refused_or_hold_tensors_and_run_nothing(tmp_path, zipped):
    """The formats of torch.save, whole and damaged, with and without code in them: tensors or `ValueError`."""
    ran, path, draw = tmp_path / "ran", tmp_path / "head.pt", random.Random(0)
    seeds = []
    for value in ({"layer.weight": torch.ones(3, 4)}, {"state_dict": {"b": torch.ones(3)}}, {"a": Payload(str(ran))}):
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        seeds.append(file.getvalue())
    refused = 0
    for number in range(300):
        data = bytearray(seeds[number % 3])
        for _ in range(draw.randrange(5)):
            at = draw.randrange(len(data))
            data[at : at + draw.choice([0, 1, 30])] = draw.randbytes(draw.choice([0, 1, 6]))
        path.write_bytes(data)
        try:
            found = read_tensors(str(path), "head")
        except ValueError:
            refused += 1
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert 100 < refused < 300 and not ran.exists()


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


def test_ocr_hands_pictures_over_as_the_reader_takes_them(monkeypatch):
    """Blue, green, red: it reads most text in any colour, so only what it is given shows the order."""
    given = []

    class Reader:
        def __init__(self, params):
            pass

        def __call__(self, pixels):
            given.append(pixels)
            return SimpleNamespace(txts=("op", "en"))

    monkeypatch.setattr("rapidocr.RapidOCR", Reader)
    assert Ocr()(prompts=['"open"'], images=[Image.new("RGBA", (3, 2), (10, 20, 30, 255))]) == [1.0]
    assert given[0].shape == (2, 3, 3) and given[0][0, 0].tolist() == [30, 20, 10]


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
