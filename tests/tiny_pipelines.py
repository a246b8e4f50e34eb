"""Pipelines for the tests, built in code from tiny random components; no Hub."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from es_trl import assets
from es_trl.pipelines import load_pipeline


PROMPTS = ["a red apple", "two blue cats", "a green frog left of a pink dog"]


def fresh_sprint(dtype=torch.float32):
    """The shipped Sana Sprint model, loaded from its files."""
    return load_pipeline("tiny-sana-sprint", dtype)


def sana(scheduler: str = "flow_match"):
    """Sana: classifier-free guidance, several steps. Text encoder and autoencoder are the shipped ones."""
    torch.manual_seed(0)
    sprint = fresh_sprint()
    # The shipped tokenizer strips Sana's instruction; here it has to have an effect.
    sprint.tokenizer.backend_tokenizer.normalizer = Lowercase()
    own = sprint.transformer.config
    transformer = SanaTransformer2DModel(
        in_channels=own.in_channels,
        out_channels=own.in_channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
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
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    tokenizer, text_encoder = _clip(16)
    return StableDiffusionPipeline(
        vae=_autoencoder(latent_channels=4, channels=(8, 8)),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux():
    """A joint-attention transformer with packed latents and two text encoders."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )
    tokenizer, text_encoder = _clip(16)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(latent_channels=1, channels=(4, 4), shift_factor=0.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(config),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def _clip(width: int):
    tokenizer = AutoTokenizer.from_pretrained(assets.resolve("tiny-pickscore"))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config)


def _autoencoder(latent_channels: int, channels: tuple[int, ...], **kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        norm_num_groups=4,
        **kwargs,
    )
