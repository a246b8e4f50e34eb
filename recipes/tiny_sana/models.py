"""The five parts of the pipeline and the two scorers: configurations of plain diffusers and transformers classes."""

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast
from world import vocabulary


@dataclass(frozen=True)
class Size:
    """
    Every number that a larger pipeline has larger; the defaults are the shipped one's.

    Args:
        side (`int`): Of a picture, in pixels; a multiple of 64.
        layers, heads (`int`): Of the transformer, which is 32 times `heads` wide.
        channels (`tuple`): Of the autoencoder's four levels, equal for encoder and decoder.
        text_layers, text_heads (`int`): Of the text encoder, which is 32 times `text_heads` wide; an even number.
        scenes (`int`): Drawn to measure the latents' spread; half as many measure the autoencoder.
    """

    side: int = 64
    layers: int = 5
    heads: int = 7
    channels: tuple[int, int, int, int] = (32, 32, 64, 128)
    text_layers: int = 2
    text_heads: int = 4
    scenes: int = 512

    def __post_init__(self) -> None:
        if self.side % 64:
            raise ValueError(f"side must be a multiple of 64, got {self.side}: scenes are drawn in whole pixels.")

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of a picture's latent: 16 channels, an eighth of the side."""
        return 16, self.side // 8, self.side // 8


SHIPPED = Size()
LARGE = Size(side=128, layers=9, heads=20, channels=(64, 64, 128, 256), text_layers=4, text_heads=8)
# By the parameters of the pipeline. The last one only shows that everything runs: a few seconds a stage on a CPU.
SIZES = {
    "6m": SHIPPED,
    "64m": LARGE,
    "rehearsal": replace(LARGE, layers=1, heads=1, channels=(16, 16, 16, 16), text_layers=1, text_heads=2, scenes=16),
}

SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Words to ids, `<bos> words <eos>`, right padding.

    Sana puts an instruction that ends in "User Prompt: " before each prompt. The normalizer removes it, so that the
    pipeline's default call and a call without the instruction give the same tokens.
    """
    vocab = SPECIAL | {word: i for i, word in enumerate(vocabulary(), start=len(SPECIAL))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    strip = normalizers.Replace(Regex(r"^[\s\S]*[Uu]ser [Pp]rompt: "), "")
    tokenizer.normalizer = normalizers.Sequence([strip, normalizers.Lowercase()])
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    special = [("<bos>", SPECIAL["<bos>"]), ("<eos>", SPECIAL["<eos>"])]
    pair = "<bos> $A <eos> $B:1 <eos>:1"
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", pair, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        padding_side="right", model_max_length=max_length,
    )  # fmt: skip


def build_vae(size: Size = SHIPPED) -> AutoencoderDC:
    """Eight-fold compression, 16 channels: (n, 3, 64, 64) <-> (n, 16, 8, 8). No block at full resolution: cheap."""
    return AutoencoderDC(
        in_channels=3, latent_channels=16, attention_head_dim=16,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=size.channels, decoder_block_out_channels=size.channels,
        encoder_layers_per_block=(0, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 2),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()), scaling_factor=1.0,
    )  # fmt: skip


def build_text_encoder(size: Size = SHIPPED) -> Gemma2Model:
    width = 32 * size.text_heads
    return Gemma2Model(
        Gemma2Config(
            vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads, num_key_value_heads=size.text_heads // 2, head_dim=32,
            query_pre_attn_scalar=32, max_position_embeddings=512, sliding_window=512, initializer_range=0.04,
            pad_token_id=0, eos_token_id=1, bos_token_id=2, attn_implementation="eager",
        )
    )  # fmt: skip


def build_transformer(size: Size = SHIPPED) -> SanaTransformer2DModel:
    """A quarter as many image tokens as latents (patches of 2), embedded guidance as in Sana Sprint."""
    heads = size.heads
    return SanaTransformer2DModel(
        in_channels=16, out_channels=16, sample_size=size.latent[-1], patch_size=2, num_layers=size.layers,
        mlp_ratio=2.0, num_attention_heads=heads, attention_head_dim=32, num_cross_attention_heads=heads,
        cross_attention_head_dim=32, cross_attention_dim=32 * heads, caption_channels=32 * size.text_heads,
        guidance_embeds=True, guidance_embeds_scale=0.1, qk_norm="rms_norm_across_heads", interpolation_scale=1.0,
    )  # fmt: skip


def build_clip(width: int, patch: int, heads: int) -> CLIPModel:
    """A contrastive scorer of 64 x 64 pictures, embeddings of 128 numbers, captions of at most 24 tokens."""
    text = {
        "vocab_size": len(SPECIAL) + len(vocabulary()), "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 24, "projection_dim": 128,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": heads,
        "image_size": 64, "patch_size": patch, "projection_dim": 128,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (n, longest prompt)."""
    return dict(tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False))
