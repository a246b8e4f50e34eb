"""Pipelines for the tests, built in code from tiny random components; no Hub."""

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
)
from tokenizers.normalizers import Lowercase

from es_trl.pipelines import load_pipeline
from recipes.benchmarks import tiny_models


PROMPTS = ["a red apple", "two blue cats", "a green frog left of a pink dog"]


def fresh_sprint(dtype=torch.float32):
    """The shipped Sana Sprint model, loaded from its files."""
    return load_pipeline("tiny-sana-sprint", dtype)


def sana(scheduler: str = "flow_match", layers: int = 2):
    """Sana: classifier-free guidance, several steps. Text encoder and autoencoder are the shipped ones."""
    sprint = fresh_sprint()
    torch.manual_seed(0)  # after it: only the first one in a process is read from disk, which draws numbers
    # The shipped tokenizer strips Sana's instruction; here it has to have an effect.
    sprint.tokenizer.backend_tokenizer.normalizer = Lowercase()
    own = sprint.transformer.config
    transformer = SanaTransformer2DModel(
        in_channels=own.in_channels,
        out_channels=own.in_channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=own.caption_channels,
        mlp_ratio=2.0,
        sample_size=4,
        patch_size=1,
        norm_elementwise_affine=False,
    )
    if scheduler == "flow_match":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
        )
    return SanaPipeline(sprint.tokenizer, sprint.text_encoder, sprint.vae, transformer, scheduler)


def stable_diffusion():
    """A UNet with classifier-free guidance."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(**tiny_models.sd(unet=tiny_models.unet(sample_size=8)))


def flux():
    """A joint-attention transformer with packed latents and two text encoders."""
    torch.manual_seed(0)
    return FluxPipeline(**tiny_models.flux())
