"""The published formulas of the rewards, written out with the plainest calls there are, to hold ours against."""

import gzip
import math
import os
from functools import cache

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as T
from transformers import AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer


CLIP_NORMALISE = T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HEAD_LAYERS = (0, 2, 4, 6, 7)  # of LAION's head as it is published; between them the training had dropout


def clip_processor() -> CLIPProcessor:
    """OpenAI's: the vocabulary comes with open_clip, the picture's 224 pixels are transformers' defaults."""
    path = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], model_max_length=77)
    return CLIPProcessor(CLIPImageProcessor(), tokenizer)


class Clip:
    """A CLIP of transformers by its parts: pooled output, projection, norm; all prompts in one padded batch."""

    def __init__(self, folder: str):
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def image_features(self, images) -> torch.Tensor:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        features = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return features / features.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def text_features(self, prompts) -> torch.Tensor:
        tokens = self.processor(
            text=prompts, padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        )
        features = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return features / features.norm(dim=-1, keepdim=True)

    @property
    def context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def pickscore(self, prompts, images) -> list[float]:
        """The model card of PickScore_v1: `logit_scale.exp() * (text_embs @ image_embs.T)`."""
        scores = self.model.logit_scale.exp() * (self.text_features(prompts) @ self.image_features(images).T)
        return scores.diagonal().tolist()

    def similarity(self, prompts, images) -> list[float]:
        """`(1 + cos) / 2` of each picture with its own prompt."""
        return ((1 + (self.text_features(prompts) * self.image_features(images)).sum(-1)) / 2).tolist()

    def mean_similarity(self, texts, images) -> list[float]:
        """`(1 + cos) / 2`, the mean over fixed texts."""
        return ((1 + self.image_features(images) @ self.text_features(list(texts)).T) / 2).mean(dim=1).tolist()

    def aesthetic(self, head: dict[str, torch.Tensor], images) -> list[float]:
        """LAION's head on the unit-norm features, in double precision."""
        double = {name: value.double() for name, value in head.items()}
        return linear_layers(double, "layers", self.image_features(images).double())


def linear_layers(weights: dict[str, torch.Tensor], prefix: str, x: torch.Tensor) -> list[float]:
    """The five layers of LAION's and of ImageReward's head in a row, `(B, D)` to B numbers."""
    for i in HEAD_LAYERS:
        x = F.linear(x, weights[f"{prefix}.{i}.weight"], weights[f"{prefix}.{i}.bias"])
    return x[:, 0].tolist()


def padded_square(image: Image.Image, side: int) -> torch.Tensor:
    """HPSv2's picture: the longer side resized to `side`, black around the rest, normalised. (3, side, side)."""
    pixels = T.ToTensor()(image)
    scale = side / max(image.size)
    size = (round(image.height * scale), round(image.width * scale))
    small = T.Resize(size, T.InterpolationMode.BICUBIC)(pixels)
    canvas = torch.zeros(3, side, side)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    canvas[:, top : top + size[0], left : left + size[1]] = small
    return CLIP_NORMALISE(canvas)


@torch.no_grad()
def hpsv2(model: open_clip.CLIP, prompts, images) -> list[float]:
    """open_clip's forward, which gives unit-norm features: the cosine of each picture with its own prompt."""
    pixels = torch.stack([padded_square(image, model.visual.image_size[0]) for image in images])
    image_features, text_features, _ = model(pixels, open_clip.tokenize(list(prompts)))
    return (image_features @ text_features.T).diagonal().tolist()


@torch.no_grad()
def image_reward(weights: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor, heads: tuple[int, int]):
    """
    ImageReward of one picture and one prompt, from the architecture in the papers of BLIP and ImageReward.

    Args:
        weights (`dict`): under the names of the published file.
        pixels (`torch.Tensor`): (3, S, S), normalised.
        ids (`torch.Tensor`): the prompt's tokens without padding, (L,).
        heads (`tuple[int, int]`): attention heads of the picture's and of the prompt's encoder.
    """

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    patch = weights[v + "patch_embed.proj.weight"]
    patches = F.conv2d(pixels[None], patch, weights[v + "patch_embed.proj.bias"], stride=patch.shape[-1])
    x = torch.cat([weights[v + "cls_token"][0], patches[0].flatten(1).T]) + weights[v + "pos_embed"][0]
    for i in range(_depth(weights, v + "blocks.")):
        b = f"{v}blocks.{i}."
        qkv = linear(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(b + "attn.proj", _attend(*qkv, heads[0]))
        x = x + linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    image = norm(v + "norm", x, 1e-6)

    words, places = (weights[f"{t}embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    x = norm(t + "embeddings.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
    for i in range(_depth(weights, t + "encoder.layer.")):
        layer = f"{t}encoder.layer.{i}."
        for kind in ("attention", "crossattention"):
            a, source = f"{layer}{kind}.", x if kind == "attention" else image
            q, k, value = linear(a + "self.query", x), linear(a + "self.key", source), linear(a + "self.value", source)
            x = norm(a + "output.LayerNorm", x + linear(a + "output.dense", _attend(q, k, value, heads[1])), 1e-12)
        wide = F.gelu(linear(layer + "intermediate.dense", x))
        x = norm(layer + "output.LayerNorm", x + linear(layer + "output.dense", wide), 1e-12)
    (raw,) = linear_layers(weights, "mlp.layers", x[:1])
    return (raw - 0.16717362830052426) / 1.0333394966054072


def blip_picture(image: Image.Image, side: int) -> torch.Tensor:
    """Shorter side resized to `side`, centre cut out, normalised. (3, side, side)."""
    crop = T.Compose([T.Resize(side, T.InterpolationMode.BICUBIC), T.CenterCrop(side), T.ToTensor(), CLIP_NORMALISE])
    return crop(image)


def image_reward_weights(vision: dict[str, int], text: dict[str, int]) -> dict[str, torch.Tensor]:
    """
    Random weights, seed 0, under the names of the published file; large enough that each shows in the score.

    Args:
        vision (`dict`): `width`, `depth`, `mlp`, `patch` and `side` of the picture's encoder.
        text (`dict`): `width`, `depth`, `mlp`, `words` and `places` of the prompt's.
    """

    def linear(name, a, b):
        return {f"{name}.weight": (b, a), f"{name}.bias": (b,)}

    def norm(name, a):
        return {f"{name}.weight": (a,), f"{name}.bias": (a,)}

    width, patch = vision["width"], vision["patch"]
    eye = {"cls_token": (1, 1, width), "pos_embed": (1, (vision["side"] // patch) ** 2 + 1, width)}
    eye |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    eye |= norm("norm", width)
    for i in range(vision["depth"]):
        b = f"blocks.{i}"
        eye |= norm(f"{b}.norm1", width) | norm(f"{b}.norm2", width)
        eye |= linear(f"{b}.attn.qkv", width, 3 * width) | linear(f"{b}.attn.proj", width, width)
        eye |= linear(f"{b}.mlp.fc1", width, vision["mlp"]) | linear(f"{b}.mlp.fc2", vision["mlp"], width)
    d = text["width"]
    reader = {"word_embeddings.weight": (text["words"], d), "position_embeddings.weight": (text["places"], d)}
    reader = {f"embeddings.{name}": shape for name, shape in (reader | norm("LayerNorm", d)).items()}
    for i in range(text["depth"]):
        layer = f"encoder.layer.{i}"
        for kind, source in (("attention", d), ("crossattention", width)):
            for part, a in (("query", d), ("key", source), ("value", source)):
                reader |= linear(f"{layer}.{kind}.self.{part}", a, d)
            reader |= linear(f"{layer}.{kind}.output.dense", d, d) | norm(f"{layer}.{kind}.output.LayerNorm", d)
        reader |= linear(f"{layer}.intermediate.dense", d, text["mlp"])
        reader |= linear(f"{layer}.output.dense", text["mlp"], d) | norm(f"{layer}.output.LayerNorm", d)
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in eye.items()}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in reader.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * _spread(shape) + ("orm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(text["places"])[None]
    weights["blip.vision_proj.weight"] = torch.randn(4, width, generator=generator)  # in the file, and not used
    return weights | {f"mlp.{name}": value for name, value in head_weights(d).items()}


def head_weights(width: int) -> dict[str, torch.Tensor]:
    """Random weights, seed 0, of LAION's head under its published names."""
    generator, weights, sizes = torch.Generator().manual_seed(0), {}, (width, 1024, 128, 64, 16, 1)
    for i, a, b in zip(HEAD_LAYERS, sizes[:-1], sizes[1:], strict=True):
        weights[f"layers.{i}.weight"] = torch.randn(b, a, generator=generator) * _spread((b, a))
        weights[f"layers.{i}.bias"] = torch.randn(b, generator=generator) * 0.3
    return weights


def _spread(shape: tuple[int, ...]) -> float:
    """Keeps sums of many terms of the size of one."""
    return (shape[1] * math.prod(shape[2:])) ** -0.5 if len(shape) in (2, 4) else 0.3


def _depth(weights: dict, prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))


def _attend(q, k, v, heads: int) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)


def text_score(read: str, wanted: str) -> float:
    """Flow-GRPO's OCR score, with the edit distance straight from its recursive definition."""
    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (read[i - 1] != wanted[j - 1])
        )

    return 1.0 if wanted in read else max(0.0, 1 - distance(len(read), len(wanted)) / len(wanted))
