"""A pipeline of a few hundred weights that draws 8 x 8 pictures at once, for runs of thousands of steps."""

import zlib

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import nn


WIDTH, TOKENS = 12, 16  # 16 tokens of 12 numbers are the 8 x 8 x 3 values of a picture


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """One residual layer."""

    @register_to_config
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.to_out(torch.tanh(self.to_q(hidden_states)))


class ToyPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Noise plus a vector that is a function of the prompt, through the transformer, is the picture."""

    _lora_loadable_modules = ["transformer"]

    def __init__(self, transformer: ToyTransformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=1, generator=None, output_type="pil"):
        noise = torch.stack([torch.randn(TOKENS, WIDTH, generator=g) for g in generator])
        text = torch.stack([_vector(p) for p in prompt])[:, None]
        values = torch.sigmoid(self.transformer(hidden_states=noise + text))
        pixels = (values.view(-1, 8, 8, 3) * 255).round().byte().numpy()
        return ImagePipelineOutput(images=[Image.fromarray(np.ascontiguousarray(array)) for array in pixels])


def _vector(prompt: str) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))


def toy_pipeline() -> ToyPipeline:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = ToyTransformer()
    pipe = ToyPipeline(transformer)
    pipe.register_to_config(_name_or_path="toy")
    return pipe


def redness(images, **_):
    """Red minus green and blue, averaged over the picture."""
    means = [np.asarray(image, dtype=np.float64).mean(axis=(0, 1)) for image in images]
    return [mean[0] - mean[1:].mean() for mean in means]
