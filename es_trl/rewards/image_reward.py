"""ImageReward (https://huggingface.co/papers/2304.05977): BLIP that reads the prompt while looking at the picture."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from es_trl import assets

from ..pictures import rgb
from .aesthetic import linear_head, numbered
from .checkpoints import fill, find_file, read_json, read_tensors, why_unreachable
from .clip_features import as_torch_dtype
from .hpsv2 import CLIP_MEAN, CLIP_STD


if TYPE_CHECKING:
    import torch
    from PIL import Image


WEIGHTS = ("model.safetensors", "ImageReward.pt")
CONFIG = "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores on the authors' validation prompts
MAX_TEXT_TOKENS = 35
HEAD_WIDTH = 64  # per attention head, in BLIP's image encoders of every size

# names of the published file -> names of transformers' BLIP
RENAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class ImageReward:
    """
    `(head(t) - 0.167174) / 1.033339`: `t` is BLIP's text encoder (12 layers with cross-attention to a ViT-L/16 at
    224) at the first token of the prompt, cut to 35 tokens; the head is five linear layers. About -2 to 2, 0 on
    average over the authors' validation prompts.

    The model is transformers' BLIP with the published weights; the authors' package is not needed.

    Args:
        checkpoint (`str`, *optional*, defaults to `"zai-org/ImageReward"`):
            A Hub id or folder with `ImageReward.pt` and `med_config.json`. A folder may hold `model.safetensors`
            instead of the former (same names inside), and the tokenizer of `google-bert/bert-base-uncased`
            (`tokenizer.json` or `vocab.txt`).
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`), dtype (*optional*, defaults to `float32`):
            Where and in what BLIP runs. The head is always float32.
        batch_size (`int`, *optional*, defaults to `16`):
            Images per forward pass.

    Raises:
        `ValueError`: a file is missing, is damaged or belongs to another model.
        `OSError`: the Hub cannot be reached and the files are not in the local cache.
    """

    default_checkpoint = "zai-org/ImageReward"
    __name__ = "image_reward"
    rises_with_steps = True

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None, batch_size: int = 16):
        import torch

        checkpoint = checkpoint or self.default_checkpoint
        path = find_file(checkpoint, WEIGHTS, self.__name__)
        text_config = read_json(find_file(checkpoint, CONFIG, self.__name__), self.__name__)
        self.tokenizer = _tokenizer(checkpoint)
        self.device, self.dtype, self.batch_size = torch.device(device), as_torch_dtype(dtype), batch_size
        tensors = read_tensors(path, self.__name__)
        vision, text, head = _parts(tensors, path)
        models = _models(vision, text_config, path)
        fill(models[0], vision, path, self.__name__)
        fill(models[1], text, path, self.__name__)
        self.vision, self.text = (m.to(self.device, self.dtype).eval().requires_grad_(False) for m in models)
        self.head = linear_head(self.text.config.hidden_size)
        fill(self.head, numbered(head), path, self.__name__)
        self.head = self.head.to(self.device).eval().requires_grad_(False)
        self.image_size = self.vision.config.image_size

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        import torch

        parts = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
        with torch.no_grad():
            return [score for part in parts for score in self._score(list(prompts[part]), images[part])]

    def _score(self, prompts: list[str], images: list[Image.Image]) -> list[float]:
        import torch

        pixels = torch.stack([self.pixels(image) for image in images]).to(self.device, self.dtype)
        patches = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
        ).to(self.device)
        output = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=self.device),
        )
        raw = self.head(output.last_hidden_state[:, 0].float())[:, 0]
        return ((raw - MEAN) / STD).tolist()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """`image` as BLIP sees it, `(3, 224, 224)` float32: shorter side resized (bicubic), centre cut out."""
        from torchvision.transforms import functional as F

        picture = F.resize(rgb(image), self.image_size, F.InterpolationMode.BICUBIC)
        return F.normalize(F.to_tensor(F.center_crop(picture, self.image_size)), CLIP_MEAN, CLIP_STD)


def _parts(tensors: dict, path: str) -> tuple[dict, dict, dict]:
    """The file's tensors as those of the image encoder, of the text encoder, and of the head."""
    parts = []
    for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."):
        part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if not part:
            raise ValueError(f"reward 'image_reward': {path!r} has no weights {prefix}*: it is no ImageReward file")
        parts.append(part)
    vision = {}
    for name, value in parts[0].items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        vision[name] = value
    return vision, parts[1], parts[2]


def _models(vision: dict, text_config: dict, path: str):
    """The two encoders with sizes read off the weights, still without weights of their own."""
    from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    try:
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        patches = vision["embeddings.position_embedding"].shape[1] - 1
        depth = 1 + max(int(name.split(".")[2]) for name in vision if name.startswith("encoder.layers."))
        vision_config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth,
            num_attention_heads=width // HEAD_WIDTH,
            image_size=round(patches**0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"reward 'image_reward': {path!r} is no ImageReward file: {error!r} is missing") from error
    # transformers builds the cross-attention only into a decoder; without is_decoder at the call it reads both ways
    keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    keys += ["max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"]
    settings = {key: text_config[key] for key in keys if key in text_config}
    settings |= {"encoder_hidden_size": width, "is_decoder": True, "use_cache": False}
    config = BlipTextConfig(bos_token_id=None, eos_token_id=None, sep_token_id=None, **settings)
    return BlipVisionModel(vision_config), BlipTextModel(config, add_pooling_layer=False)


def _tokenizer(checkpoint: str):
    """BERT's, from the checkpoint's folder where that has one. The two tokens that BLIP adds are not used here."""
    from transformers import BertTokenizer

    folder = os.path.expanduser(assets.resolve(checkpoint))
    own = any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "vocab.txt"))
    source = folder if own else TOKENIZER
    unreachable = None if own else why_unreachable(source)
    try:
        return BertTokenizer.from_pretrained(source, local_files_only=own or unreachable is not None)
    except (OSError, ValueError) as error:
        reason = unreachable or " ".join(str(error).split())
        raise OSError(
            f"reward 'image_reward': the tokenizer {source!r} cannot be loaded: {reason}, and it is not in the local "
            f"cache. Connect once, or put its tokenizer.json beside ImageReward.pt"
        ) from error
