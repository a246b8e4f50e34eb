"""
Builds a Sana Sprint 1.6B of the true shape with random weights, to prove that the recipe runs where the real model
cannot be downloaded. It draws noise, so it proves nothing about learning.

    python recipes/benchmarks/build_random_sana_sprint.py /tmp/random_sana

Transformer 1.61 B and autoencoder 312 M parameters are the real configurations; the text encoder has the real width
and two layers instead of 26, and the tokenizer is that of tiny-sana-sprint. bf16, 4.2 GB on disk.
"""

import argparse

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from es_trl import assets


# Configurations of Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers and its autoencoder dc-ae-f32c32-sana.
TRANSFORMER = {
    "in_channels": 32,
    "out_channels": 32,
    "sample_size": 32,
    "patch_size": 1,
    "num_layers": 20,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "guidance_embeds": True,
    "guidance_embeds_scale": 0.1,
    "qk_norm": "rms_norm_across_heads",
    "interpolation_scale": None,
}
TRANSFORMERS = {
    "sana-1.6b": TRANSFORMER,
    # Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers
    "sana-0.6b": TRANSFORMER
    | {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
}
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
CHANNELS = [128, 256, 512, 512, 1024, 1024]
MULTISCALES = [[], [], [], [5], [5], [5]]
AUTOENCODER = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "encoder_block_out_channels": CHANNELS,
    "decoder_block_out_channels": CHANNELS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": MULTISCALES,
    "decoder_qkv_multiscales": MULTISCALES,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
TEXT_ENCODER = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def build(seed: int = 0, model: str = "sana-1.6b") -> SanaSprintPipeline:
    """The pipeline in bf16, every layer with its own default initialisation."""
    tokenizer = AutoTokenizer.from_pretrained(assets.path("tiny-sana-sprint", "tokenizer"))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(seed)
    try:
        return SanaSprintPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **TEXT_ENCODER)).eval(),
            vae=AutoencoderDC(**AUTOENCODER).eval(),
            transformer=SanaTransformer2DModel(**TRANSFORMERS[model]).eval(),
            scheduler=SCMScheduler(),
        )
    finally:
        torch.set_default_dtype(default)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pipe = build(args.seed)
    for name in ("transformer", "vae", "text_encoder"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6:,.1f} M parameters")
    pipe.save_pretrained(args.folder, safe_serialization=True)
    print(f"Saved to {args.folder}")


if __name__ == "__main__":
    main()
