"""The five parts of the pipeline and the two scorers: configurations of plain diffusers and transformers classes."""

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast
from world import vocabulary


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


def build_vae() -> AutoencoderDC:
    """Eight-fold compression, 16 channels: (n, 3, 64, 64) <-> (n, 16, 8, 8). No block at full resolution: cheap."""
    return AutoencoderDC(
        in_channels=3, latent_channels=16, attention_head_dim=16,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 32, 64, 128), decoder_block_out_channels=(32, 32, 64, 128),
        encoder_layers_per_block=(0, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 2),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()), scaling_factor=1.0,
    )  # fmt: skip


def build_text_encoder() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=512,
            sliding_window=512, initializer_range=0.04, pad_token_id=0, eos_token_id=1, bos_token_id=2,
            attn_implementation="eager",
        )
    )  # fmt: skip


def build_transformer() -> SanaTransformer2DModel:
    """16 image tokens (8 x 8 latents in patches of 2), width 224, 5 layers, embedded guidance as in Sana Sprint."""
    return SanaTransformer2DModel(
        in_channels=16, out_channels=16, sample_size=8, patch_size=2, num_layers=5, mlp_ratio=2.0,
        num_attention_heads=7, attention_head_dim=32, num_cross_attention_heads=7, cross_attention_head_dim=32,
        cross_attention_dim=224, caption_channels=128, guidance_embeds=True, guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads", interpolation_scale=1.0,
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
