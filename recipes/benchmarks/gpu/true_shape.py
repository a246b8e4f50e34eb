"""
Z-Image, FLUX.2 klein 4B and SDXL of the true shape with random weights: they draw noise, in the true time and memory.

Denoiser and autoencoder have the published configurations; the text encoders the true width and few layers (as prompts
are encoded before training), SDXL's the true depth. `small=True` is the same class, tiny, for rehearsals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import tiny_models
import torch


AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128}  # fmt: skip


def z_image() -> dict:
    transformer = diffusers.ZImageTransformer2DModel()
    with torch.no_grad():  # left empty by their constructor
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    no_convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    scale = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return {
        "transformer": transformer,
        "vae": diffusers.AutoencoderKL(**AUTOENCODER, **scale, **no_convolutions),
        "text_encoder": tiny_models.decoder("Qwen3Model", "Qwen3Config", **QWEN3_4B),
        "tokenizer": tiny_models.tokenizer(template=True),
    }


def flux2_klein() -> dict:
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return {
        "transformer": transformer,
        "vae": diffusers.AutoencoderKLFlux2(),
        "text_encoder": tiny_models.decoder("Qwen3ForCausalLM", "Qwen3Config", layers=3, **QWEN3_4B),
        "tokenizer": tiny_models.tokenizer(template=True),
    }


def sdxl() -> dict:
    unet = tiny_models.unet(
        2048,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        norm_num_groups=32,
    )
    wide = {"num_attention_heads": 20, "intermediate_size": 5120}
    return {
        "unet": unet,
        "tokenizer": tiny_models.tokenizer(),
        "tokenizer_2": tiny_models.tokenizer(),
        "vae": diffusers.AutoencoderKL(**AUTOENCODER, latent_channels=4, scaling_factor=0.13025),
        "text_encoder": tiny_models.clip(768, layers=12, num_attention_heads=12, intermediate_size=3072),
        "text_encoder_2": tiny_models.clip(1280, projection=True, layers=32, **wide),
    }


@dataclass
class Shape:
    """
    A class of pipelines, how it is called, and how many parameters its denoiser has in the true shape.

    Args:
        name (`str`): Pipeline class.
        build (`Callable`): Makes its components of the true shape, but for the scheduler.
        tiny (`Callable`): Makes all of them, tiny.
        parameters (`float`): Of the denoiser, in billions.
        call (`dict`): Settings of a config.
        small (`dict`): What differs where it is tiny.
    """

    name: str
    build: Callable[[], dict]
    tiny: Callable[[], dict]
    parameters: float
    call: dict
    small: dict = field(default_factory=lambda: {"height": 32, "width": 32, "max_sequence_length": 16})

    def pipeline(self, small: bool, device: str = "cpu"):
        torch.manual_seed(0)
        if small:
            return getattr(diffusers, self.name)(**self.tiny())
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                parts = self.build()
        finally:
            torch.set_default_dtype(default)
        return getattr(diffusers, self.name)(**parts, scheduler=self.tiny()["scheduler"])


SIZE = {"height": 1024, "width": 1024}
SHAPES = {
    "Z-Image": Shape(
        "ZImagePipeline",
        z_image,
        tiny_models.z_image,
        6.15,
        SIZE | {"num_inference_steps": 8, "guidance_scale": 0.0},
    ),
    "FLUX.2 klein 4B": Shape(
        "Flux2KleinPipeline",
        flux2_klein,
        tiny_models.flux2,
        3.88,
        SIZE
        | {
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "pipeline_kwargs": {"text_encoder_out_layers": [1, 2, 3]},
        },
    ),
    "SDXL": Shape(
        "StableDiffusionXLPipeline",
        sdxl,
        tiny_models.sdxl,
        2.57,
        SIZE | {"num_inference_steps": 20, "guidance_scale": 5.0},
        {"height": 32, "width": 32},
    ),
}
