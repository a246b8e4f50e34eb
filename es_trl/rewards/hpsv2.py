"""Human preference score v2.1 (https://huggingface.co/papers/2306.09341): CLIP ViT-H/14 tuned on people's choices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..pictures import rgb
from .checkpoints import fill, find_file, read_json, read_tensors
from .clip_features import TwoTowers


if TYPE_CHECKING:
    import torch
    from PIL import Image


WEIGHTS = ("open_clip_model.safetensors", "HPS_v2.1_compressed.pt")
ARCHITECTURE = "ViT-H-14"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class HPSv2(TwoTowers):
    """
    `cos(image, prompt)`, without the logit scale: about 0.2 to 0.35 for HPS v2.1.

    Pictures are prepared as in the authors' package: to tensors in [0, 1], the longer side resized to 224 (bicubic,
    antialiased), the rest padded with black, then CLIP's normalisation.

    Args:
        checkpoint (`str`, *optional*, defaults to `"xswu/HPSv2"`):
            A Hub id or folder with `HPS_v2.1_compressed.pt`; a folder may hold `open_clip_model.safetensors` instead,
            and an `open_clip_config.json` if the architecture is not ViT-H-14.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`), dtype (*optional*, defaults to `float32`):
            Where and in what the model runs. The authors run it under automatic mixed precision.
        batch_size (`int`, *optional*, defaults to `16`):
            Images per forward pass.

    Raises:
        `ValueError`: a file is missing, is damaged or belongs to another model.
        `OSError`: the Hub cannot be reached and the file is not in the local cache.
    """

    default_checkpoint = "xswu/HPSv2"
    __name__ = "hpsv2"
    rises_with_steps = True

    def __init__(self, checkpoint: str | None = None, device="cpu", dtype=None, batch_size: int = 16):
        import open_clip

        super().__init__(device, dtype, batch_size)
        checkpoint = checkpoint or self.default_checkpoint
        path = find_file(checkpoint, WEIGHTS, self.__name__)
        model = _build(os.path.expanduser(checkpoint))
        fill(model, read_tensors(path, self.__name__), path, self.__name__)
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        size = self.model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)

    def __call__(self, prompts, images, **kwargs) -> list[float]:
        return self.cosine(prompts, images).tolist()

    def across(self, prompts, images):
        """`(B, P)`: the score of every image under every prompt."""
        return self.cosines(prompts, images)

    def encode_images(self, images):
        import torch

        pixels = torch.stack([self.pixels(image) for image in images])
        return self.model.encode_image(pixels.to(device=self.device, dtype=self.dtype))

    def encode_text(self, text):
        return self.model.encode_text(self.tokenizer([text]).to(self.device))

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """`image` as the model sees it, `(3, 224, 224)` float32."""
        from torchvision.transforms import functional as F

        picture = F.to_tensor(rgb(image))
        height, width = picture.shape[1:]
        scale = self.image_size / max(height, width)
        if scale != 1:
            new = [round(height * scale), round(width * scale)]
            picture = F.resize(picture, new, F.InterpolationMode.BICUBIC, antialias=True)
        below, right = self.image_size - picture.shape[1], self.image_size - picture.shape[2]
        picture = F.pad(picture, [right // 2, below // 2, right - right // 2, below - below // 2])
        return F.normalize(picture, CLIP_MEAN, CLIP_STD)


def _build(folder: str):
    """The architecture without memory; its causal mask is no weight and is made here."""
    import open_clip
    import torch

    config = os.path.join(folder, "open_clip_config.json")
    if os.path.isfile(config):
        settings = read_json(config, "hpsv2").get("model_cfg", {})
    else:
        settings = open_clip.get_model_config(ARCHITECTURE)
    try:
        with torch.device("meta"):  # a billion random numbers nobody needs
            model = open_clip.CLIP(**settings)
    except TypeError as error:
        raise ValueError(f"reward 'hpsv2': {config!r} describes no CLIP model of open_clip: {error}") from error
    length = model.context_length
    model.attn_mask = torch.full((length, length), -torch.inf).triu(1)
    return model
