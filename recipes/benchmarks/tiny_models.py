"""Tiny random pipelines of as many diffusers classes as can be built without a download, for the table of models."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import diffusers as d
import torch
import transformers as t
from PIL import Image

from es_trl import assets
from es_trl.pipelines import CallSettings


TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endif %}{% endfor %}"
)


@dataclass
class TinyModel:
    """
    A class and how to call it.

    Args:
        name (`str`): Pipeline class.
        kind (`str`): "text to image", "image input" or "video".
        build (`Callable`): Makes its components.
        call (`dict`): Keywords of the call beside the prompt.
        columns (`dict`): Keywords of the call with one value per row.
        attributes (`dict`): What to set on the pipeline, where its own would draw large pictures.
    """

    name: str
    kind: str
    build: Callable[[], dict]
    call: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)

    def settings(self, steps: int = 2) -> CallSettings:
        """How it is called."""
        named = {name: value for name, value in self.call.items() if name in CallSettings.__dataclass_fields__}
        extra = {name: value for name, value in self.call.items() if name not in named}
        return CallSettings(**{"num_inference_steps": steps} | named, extra=extra)

    def pipeline(self):
        """The pipeline, with the same random weights every time; none are zero, as before training many are."""
        torch.manual_seed(0)
        pipe = getattr(d, self.name)(**self.build())
        if hasattr(pipe, "prompt_template_encode_start_idx"):  # the tokens of a template that this tokenizer has not
            pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
        for name, value in self.attributes.items():
            setattr(pipe, name, value)
        for part in pipe.components.values():
            for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
                if weight.ndim > 1 and not weight.any():
                    torch.nn.init.normal_(weight, std=0.1)
        return pipe


def tokenizer(template: bool = False, length: int | None = None):
    made = t.AutoTokenizer.from_pretrained(assets.resolve("tiny-pickscore"))
    if template:
        made.chat_template = TEMPLATE
    if length:
        made.model_max_length = length
    return made


@cache
def vocabulary() -> int:
    return len(tokenizer())


def special_tokens() -> dict:
    made = tokenizer()
    return {f"{name}_token_id": getattr(made, f"{name}_token_id") for name in ("bos", "eos", "pad")}


# ---- text encoders ----


def clip(width: int = 16, projection: bool = False, layers: int = 2, **more):
    settings = {
        "vocab_size": vocabulary(),
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "projection_dim": width,
        **special_tokens(),
        **more,
    }
    config = t.CLIPTextConfig(**settings)
    return (t.CLIPTextModelWithProjection if projection else t.CLIPTextModel)(config)


def t5(width: int = 32):
    return t.T5EncoderModel(
        t.T5Config(vocab_size=vocabulary(), d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    )


def umt5(width: int = 32):
    return t.UMT5EncoderModel(
        t.UMT5Config(vocab_size=vocabulary(), d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    )


def decoder(model: str, config: str, width: int = 16, layers: int = 2, **more):
    """A small language model: Qwen3, Llama, Gemma 2, GLM, ..."""
    settings = {
        "vocab_size": vocabulary(),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        **special_tokens(),
        **more,
    }
    return getattr(t, model)(getattr(t, config)(**settings))


def qwen_vl(width: int = 16, model: str = "Qwen2_5_VLForConditionalGeneration", section=(1, 1, 2)):
    config = t.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary(),
            "hidden_size": width,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": list(section), "rope_type": "default", "type": "default"},
            **special_tokens(),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return getattr(t, model)(config)


def qwen3_vl(width: int = 16):
    text = {
        "vocab_size": vocabulary(),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": True},
        **special_tokens(),
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    config = t.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    return t.Qwen3VLModel(config)


# ---- autoencoders and schedulers ----


def vae(channels: int = 4, blocks: int = 2, **more):
    return d.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        **more,
    )


def wan_vae(channels: int = 16):
    return d.AutoencoderKLWan(
        base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def qwen_vae():
    return d.AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def flux2_vae():
    return d.AutoencoderKLFlux2(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flow(**more):
    return d.FlowMatchEulerDiscreteScheduler(**more)


def ddim():
    return d.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def flow_model(transformer, autoencoder, text_encoder, **more) -> dict:
    """The parts of most; `more` takes the place of the usual ones, or comes beside them."""
    parts = {"transformer": transformer, "vae": autoencoder, "text_encoder": text_encoder}
    return parts | {"tokenizer": tokenizer(), "scheduler": flow(), **more}


def picture(colour: str, size: int = 32) -> Image.Image:
    """Not flat, so that what depends on it shows."""
    made = Image.radial_gradient("L").resize((size, size)).convert("RGB")
    return Image.blend(made, Image.new("RGB", made.size, colour), 0.5)


def pictures(size: int = 32) -> list[Image.Image]:
    return [picture("red", size), picture("green", size)]


def masks(size: int = 32) -> list[Image.Image]:
    return [Image.linear_gradient("L").resize((size, size)).point(lambda v, k=k: 255 * (v > k)) for k in (90, 160)]


def clips(frames: int = 9, size: int = 16) -> list[list[Image.Image]]:
    return [[picture(colour, size)] * frames for colour in ("red", "green")]


# ---- Stable Diffusion and its kin ----


def unet(cross: int = 16, channels: int = 4, **more):
    return d.UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 16,
            "in_channels": channels,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": cross,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **more,
        }
    )


def sd(channels: int = 4, **more) -> dict:
    return {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "unet": unet(channels=channels),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **more,
    }


def lcm() -> dict:
    parts = sd() | {"unet": unet(time_cond_proj_dim=8), "scheduler": d.LCMScheduler(clip_sample=False)}
    return parts


def controlnet(source) -> d.ControlNetModel:
    made = d.ControlNetModel.from_unet(source, conditioning_embedding_out_channels=(8, 8))
    for layer in made.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.1)
    return made


def sd_controlnet() -> dict:
    parts = sd()
    return parts | {"controlnet": controlnet(parts["unet"])}


def sdxl_unet(channels: int = 4):
    return unet(
        32,
        channels,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=64,  # 6 x 8 + 16
    )


def sdxl(channels: int = 4, **more) -> dict:
    return {
        "vae": vae(),
        "text_encoder": clip(),
        "text_encoder_2": clip(projection=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": sdxl_unet(channels),
        "scheduler": d.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        **more,
    }


def sdxl_controlnet() -> dict:
    parts = sdxl()
    return parts | {"controlnet": controlnet(parts["unet"])}


def motion_adapter():
    return d.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )


def animatediff() -> dict:
    parts = sd() | {"motion_adapter": motion_adapter()}
    for name in ("safety_checker", "requires_safety_checker"):
        del parts[name]
    return parts


def text_to_video() -> dict:
    made = d.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return {"vae": vae(), "text_encoder": clip(), "tokenizer": tokenizer(), "unet": made, "scheduler": ddim()}


# ---- transformers for pictures ----


def sd3(channels: int = 4, **more) -> dict:
    transformer = d.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    return {
        "transformer": transformer,
        "vae": vae(channels, shift_factor=0.06),
        "text_encoder": clip(projection=True),
        "text_encoder_2": clip(projection=True),
        "text_encoder_3": t5(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": tokenizer(),
        "scheduler": flow(),
        **more,
    }


def flux(channels: int = 4, **more) -> dict:
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "transformer": transformer,
        "vae": vae(1, shift_factor=0.0),
        "text_encoder": clip(),
        "text_encoder_2": t5(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": flow(),
        **more,
    }


def flux2() -> dict:
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )
    return flow_model(
        transformer,
        flux2_vae(),
        decoder("Qwen3ForCausalLM", "Qwen3Config", layers=3),
        tokenizer=tokenizer(template=True),
    )


def ernie() -> dict:
    transformer = d.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    return flow_model(transformer, flux2_vae(), decoder("Qwen3Model", "Qwen3Config"))


def bria_fibo() -> dict:
    transformer = d.BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        text_encoder_dim=16,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    autoencoder = d.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        temperal_downsample=[False, True, True],
        z_dim=16,
    )
    return flow_model(transformer, autoencoder, decoder("LlamaForCausalLM", "LlamaConfig"))


def chroma(**more) -> dict:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return flow_model(transformer, vae(1, shift_factor=0.0), t5(), **more)


def aura_flow() -> dict:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=256,
    )
    return flow_model(transformer, vae(), umt5())


def cogview4() -> dict:
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    return flow_model(
        transformer,
        vae(),
        decoder("GlmModel", "GlmConfig"),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )


def hidream() -> dict:
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    return {
        "transformer": transformer,
        "vae": vae(shift_factor=0.1),
        "text_encoder": clip(projection=True),
        "text_encoder_2": clip(projection=True),
        "text_encoder_3": t5(),
        "text_encoder_4": decoder("LlamaForCausalLM", "LlamaConfig"),
        **{f"tokenizer{end}": tokenizer() for end in ("", "_2", "_3", "_4")},
        "scheduler": flow(),
    }


def kandinsky3() -> dict:
    made = d.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    movq = d.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {"unet": made, "movq": movq, "text_encoder": t5(), "tokenizer": tokenizer(), "scheduler": d.DDPMScheduler()}


def kandinsky5(video: bool = False, conditioned: bool = False) -> dict:
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        visual_cond=conditioned,
        attention_type="regular",
    )
    return {
        "transformer": transformer,
        "vae": hunyuan_vae(16) if video else vae(16, shift_factor=0.1),
        "text_encoder": qwen_vl(),
        "tokenizer": tokenizer(template=True),
        "text_encoder_2": clip(),
        "tokenizer_2": tokenizer(),
        "scheduler": flow(shift=7.0),
    }


def krea2() -> dict:
    transformer = d.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    return {
        "transformer": transformer,
        "vae": qwen_vae(),
        "text_encoder": qwen3_vl(),
        "tokenizer": tokenizer(),
        "text_encoder_select_layers": (0, 1, 2),
        "scheduler": flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
    }


def lumina2() -> dict:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=16,
    )
    return flow_model(transformer, vae(shift_factor=0.06), decoder("Gemma2Model", "Gemma2Config"))


def prx() -> dict:
    transformer = d.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=16,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    )
    return flow_model(
        transformer, vae(shift_factor=0.0), decoder("Gemma2Model", "Gemma2Config"), tokenizer=tokenizer(length=64)
    )


def qwen_image(**more) -> dict:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return flow_model(transformer, qwen_vae(), qwen_vl(), tokenizer=tokenizer(template=True), **more)


def z_image() -> dict:
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # left empty by their constructor
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return flow_model(
        transformer,
        vae(16, shift_factor=0.1),
        decoder("Qwen3Model", "Qwen3Config"),
        tokenizer=tokenizer(template=True),
    )


def sana_parts() -> dict:
    gemma = decoder("Gemma2Model", "Gemma2Config")
    autoencoder = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return {"text_encoder": gemma, "tokenizer": tokenizer(length=300), "vae": autoencoder}


def sana(**more) -> dict:
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
        **more,
    )
    return sana_parts() | {"transformer": transformer, "scheduler": flow(shift=3.0)}


def sana_sprint() -> dict:
    return sana(guidance_embeds=True, qk_norm="rms_norm_across_heads") | {"scheduler": d.SCMScheduler()}


def deepfloyd() -> dict:
    made = d.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=[32, 64],
        norm_num_groups=4,
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = d.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.0, variance_type="learned_range"
    )
    return {
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
        "unet": made,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


# ---- video ----


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def wan(channels: int = 16, second: bool = False, **more) -> dict:
    def transformer():
        return d.WanTransformer3DModel(**WAN | {"in_channels": channels})

    parts = {"transformer": transformer(), "vae": wan_vae(), "text_encoder": umt5(), "tokenizer": tokenizer()}
    if second:
        parts |= {"transformer_2": transformer(), "boundary_ratio": 0.875}
    return parts | {"scheduler": flow(shift=7.0), **more}


def wan_vace() -> dict:
    more = {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96}
    return wan() | {"transformer": d.WanVACETransformer3DModel(**WAN | more)}


def skyreels(**more) -> dict:
    transformer = d.SkyReelsV2Transformer3DModel(**WAN)
    scheduler = d.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    return wan() | {"transformer": transformer, "scheduler": scheduler, **more}


def ltx() -> dict:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = d.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return flow_model(transformer, autoencoder, t5())


def cogvideox(channels: int = 4) -> dict:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    autoencoder = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return flow_model(transformer, autoencoder, t5(), scheduler=d.CogVideoXDDIMScheduler())


def mochi() -> dict:
    transformer = d.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    transformer.pos_frequencies.data.zero_()
    autoencoder = d.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return flow_model(transformer, autoencoder, t5())


def hunyuan_vae(channels: int = 4):
    return d.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def hunyuan_video(channels: int = 4) -> dict:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    return {
        "transformer": transformer,
        "vae": hunyuan_vae(),
        "text_encoder": decoder("LlamaModel", "LlamaConfig"),
        "text_encoder_2": clip(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": flow(shift=7.0),
    }


def sana_video() -> dict:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return sana_parts() | {"vae": wan_vae(), "transformer": transformer, "scheduler": scheduler}


# ---- with further parts ----


def with_controlnet(build: Callable[[], dict], denoiser: str = "unet", make: Callable | None = None, **more):
    """Components of `build` and a control network made from its denoiser."""

    def parts() -> dict:
        made = build()
        return made | {"controlnet": (make or controlnet)(made[denoiser])} | more

    return parts


def visible(network):
    """Control networks start from zeros and would change nothing."""
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return network


def transformer_controlnet(name: str, **more) -> Callable:
    """Of SD3, Flux and Qwen-Image, from their transformer."""
    return lambda source: visible(getattr(d, name).from_transformer(source, **more))


def sana_controlnet(source) -> d.SanaControlNetModel:
    names = inspect.signature(d.SanaControlNetModel.__init__).parameters
    same = {name: value for name, value in source.config.items() if name in names and not name.startswith("_")}
    return visible(d.SanaControlNetModel(**same | {"num_layers": 1}))


def animated(build: Callable[[], dict] = sd, **more) -> Callable[[], dict]:
    def parts() -> dict:
        made = build() | {"motion_adapter": motion_adapter()} | more
        for name in ("safety_checker", "requires_safety_checker"):
            made.pop(name, None)
        return made

    return parts


def upscale() -> dict:
    parts = sd() | {"unet": unet(channels=7, num_class_embeds=1000), "low_res_scheduler": d.DDPMScheduler()}
    del parts["requires_safety_checker"]
    return parts | {"watermarker": None}


def deepfloyd_upscale() -> dict:
    made = deepfloyd()
    old = made["unet"].config
    settings = {k: v for k, v in old.items() if not k.startswith("_")} | {
        "in_channels": 6,
        "class_embed_type": "timestep",
    }
    return made | {"unet": d.UNet2DConditionModel(**settings), "image_noising_scheduler": d.DDPMScheduler()}


TEXT, IMAGE, VIDEO = "text to image", "image input", "video"
SMALL = {"height": 32, "width": 32}
GUIDED = {"guidance_scale": 4.0}
SHORT = {"max_sequence_length": 16}
FILM = {"height": 16, "width": 16, "num_frames": 9}
EDIT = {"strength": 1.0}


def _models() -> list[TinyModel]:
    one = {"image": pictures()}
    hole = one | {"mask_image": masks()}
    models = [
        TinyModel("StableDiffusionPipeline", TEXT, sd, GUIDED),
        TinyModel("StableDiffusionPAGPipeline", TEXT, sd, GUIDED | {"pag_scale": 2.0}),
        TinyModel("LatentConsistencyModelPipeline", TEXT, lcm),
        TinyModel("StableDiffusionXLPipeline", TEXT, sdxl, GUIDED | SMALL),
        TinyModel("StableDiffusionXLPAGPipeline", TEXT, sdxl, GUIDED | SMALL | {"pag_scale": 2.0}),
        TinyModel("StableDiffusion3Pipeline", TEXT, sd3, GUIDED | SMALL | SHORT),
        TinyModel(
            "StableDiffusion3PAGPipeline", TEXT, lambda: sd3(pag_applied_layers=["blocks.1"]), GUIDED | SMALL | SHORT
        ),
        TinyModel("FluxPipeline", TEXT, flux, SMALL | SHORT),
        TinyModel("Flux2KleinPipeline", TEXT, flux2, GUIDED | SMALL | {"text_encoder_out_layers": (1, 2, 3), **SHORT}),
        TinyModel("Flux2Pipeline", TEXT, flux2, GUIDED | SMALL | {"text_encoder_out_layers": (1, 2, 3), **SHORT}),
        TinyModel("ErnieImagePipeline", TEXT, ernie, GUIDED | SMALL),
        TinyModel("BriaFiboPipeline", TEXT, bria_fibo, GUIDED | SMALL | SHORT | {"negative_prompt": "ugly"}),
        TinyModel("ChromaPipeline", TEXT, chroma, GUIDED | SMALL | SHORT),
        TinyModel("AuraFlowPipeline", TEXT, aura_flow, GUIDED | SMALL | SHORT),
        TinyModel("CogView4Pipeline", TEXT, cogview4, GUIDED | SMALL | SHORT),
        TinyModel("HiDreamImagePipeline", TEXT, hidream, GUIDED | SMALL | SHORT, {}, {"default_sample_size": 16}),
        TinyModel("Kandinsky3Pipeline", TEXT, kandinsky3, GUIDED | SMALL),
        TinyModel("Kandinsky5T2IPipeline", TEXT, kandinsky5, GUIDED | SMALL | SHORT, {}, {"resolutions": [(32, 32)]}),
        TinyModel("Krea2Pipeline", TEXT, krea2, GUIDED | SMALL | SHORT),
        TinyModel("Lumina2Pipeline", TEXT, lumina2, GUIDED | SMALL | SHORT),
        TinyModel("PRXPipeline", TEXT, prx, GUIDED | SMALL | {"use_resolution_binning": False}),
        TinyModel(
            "QwenImagePipeline", TEXT, qwen_image, SMALL | SHORT | {"true_cfg_scale": 3.0, "negative_prompt": " "}
        ),
        TinyModel("SanaPipeline", TEXT, sana, GUIDED | SMALL | SHORT),
        TinyModel("SanaSprintPipeline", TEXT, sana_sprint, GUIDED | SMALL | SHORT),
        TinyModel("ZImagePipeline", TEXT, z_image, GUIDED | SMALL | SHORT),
        TinyModel("IFPipeline", TEXT, deepfloyd, GUIDED),
        TinyModel("StableDiffusionImg2ImgPipeline", IMAGE, sd, GUIDED | EDIT, one),
        TinyModel("StableDiffusionInpaintPipeline", IMAGE, sd, GUIDED | EDIT | SMALL, hole),
        TinyModel("StableDiffusionInstructPix2PixPipeline", IMAGE, lambda: sd(channels=8), GUIDED, one),
        TinyModel("StableDiffusionPAGImg2ImgPipeline", IMAGE, sd, GUIDED | EDIT, one),
        TinyModel("StableDiffusionPAGInpaintPipeline", IMAGE, sd, GUIDED | EDIT | SMALL, hole),
        TinyModel("LatentConsistencyModelImg2ImgPipeline", IMAGE, lcm, EDIT, one),
        TinyModel("StableDiffusionControlNetPipeline", IMAGE, sd_controlnet, GUIDED, one),
        TinyModel("StableDiffusionXLImg2ImgPipeline", IMAGE, sdxl, GUIDED | EDIT, one),
        TinyModel("StableDiffusionXLInpaintPipeline", IMAGE, sdxl, GUIDED | EDIT | SMALL, hole),
        TinyModel("StableDiffusionXLControlNetPipeline", IMAGE, sdxl_controlnet, GUIDED | SMALL, one),
        TinyModel("StableDiffusion3Img2ImgPipeline", IMAGE, sd3, GUIDED | EDIT | SMALL | SHORT, one),
        TinyModel("StableDiffusion3InpaintPipeline", IMAGE, lambda: sd3(16), GUIDED | EDIT | SMALL | SHORT, hole),
        TinyModel("FluxImg2ImgPipeline", IMAGE, flux, EDIT | SMALL | SHORT, one),
        TinyModel("FluxInpaintPipeline", IMAGE, flux, EDIT | SMALL | SHORT, hole),
        TinyModel("FluxKontextPipeline", IMAGE, flux, SMALL | SHORT | {"max_area": 1024, "_auto_resize": False}, one),
        TinyModel("FluxControlPipeline", IMAGE, lambda: flux(8), SMALL | SHORT, {"control_image": pictures()}),
        TinyModel("ChromaImg2ImgPipeline", IMAGE, chroma, GUIDED | EDIT | SMALL | SHORT, one),
        TinyModel("QwenImageImg2ImgPipeline", IMAGE, qwen_image, EDIT | SMALL | SHORT, one),
        TinyModel("QwenImageInpaintPipeline", IMAGE, qwen_image, EDIT | SMALL | SHORT, hole),
        TinyModel("ZImageImg2ImgPipeline", IMAGE, z_image, GUIDED | EDIT | SMALL | SHORT, one),
        TinyModel("SanaSprintImg2ImgPipeline", IMAGE, sana_sprint, GUIDED | EDIT | SMALL | SHORT, one),
        TinyModel(
            "Flux2KleinPipeline",
            IMAGE,
            flux2,
            {"height": 64, "width": 64} | {"text_encoder_out_layers": (1, 2, 3), **SHORT},
            {"image": pictures(64)},
        ),
        TinyModel("WanPipeline", VIDEO, wan, GUIDED | FILM | SHORT),
        TinyModel("WanPipeline", VIDEO, lambda: wan(second=True), GUIDED | FILM | SHORT),
        TinyModel("WanImageToVideoPipeline", VIDEO, lambda: wan(36), GUIDED | FILM | SHORT, {"image": pictures(16)}),
        TinyModel(
            "WanVideoToVideoPipeline",
            VIDEO,
            wan,
            GUIDED | EDIT | {"height": 16, "width": 16} | SHORT,
            {"video": clips()},
        ),
        TinyModel("WanVACEPipeline", VIDEO, wan_vace, GUIDED | FILM | SHORT, {"video": clips()}),
        TinyModel("SkyReelsV2Pipeline", VIDEO, skyreels, GUIDED | FILM | SHORT),
        TinyModel("LTXPipeline", VIDEO, ltx, GUIDED | {"height": 32, "width": 32, "num_frames": 9} | SHORT),
        TinyModel(
            "LTXImageToVideoPipeline", VIDEO, ltx, GUIDED | SMALL | {"num_frames": 9} | SHORT, {"image": pictures()}
        ),
        TinyModel("LTXConditionPipeline", VIDEO, ltx, GUIDED | SMALL | {"num_frames": 9} | SHORT),
        TinyModel(
            "CogVideoXPipeline", VIDEO, cogvideox, GUIDED | {"height": 16, "width": 16, "num_frames": 8} | SHORT
        ),
        TinyModel(
            "CogVideoXVideoToVideoPipeline",
            VIDEO,
            cogvideox,
            GUIDED | EDIT | {"height": 16, "width": 16} | SHORT,
            {"video": clips(8)},
        ),
        TinyModel("MochiPipeline", VIDEO, mochi, GUIDED | {"height": 16, "width": 16, "num_frames": 7} | SHORT),
        TinyModel(
            "HunyuanVideoPipeline",
            VIDEO,
            hunyuan_video,
            FILM | SHORT | {"prompt_template": {"template": "{}", "crop_start": 0}},
        ),
        TinyModel("AnimateDiffPipeline", VIDEO, animatediff, GUIDED | {"num_frames": 2}),
        TinyModel("AnimateDiffPAGPipeline", VIDEO, animatediff, GUIDED | {"num_frames": 2, "pag_scale": 2.0}),
        TinyModel("AnimateDiffVideoToVideoPipeline", VIDEO, animatediff, GUIDED | EDIT, {"video": clips(2, 32)}),
        TinyModel("TextToVideoSDPipeline", VIDEO, text_to_video, GUIDED | SMALL | {"num_frames": 2}),
        TinyModel("VideoToVideoSDPipeline", VIDEO, text_to_video, GUIDED | EDIT, {"video": clips(2, 32)}),
        TinyModel(
            "SanaVideoPipeline",
            VIDEO,
            sana_video,
            GUIDED | SMALL | SHORT | {"frames": 9, "use_resolution_binning": False},
        ),
        TinyModel(
            "Kandinsky5T2VPipeline", VIDEO, lambda: kandinsky5(True), GUIDED | SMALL | {"num_frames": 5} | SHORT
        ),
    ]
    return models


def _further() -> list[TinyModel]:
    one, control = {"image": pictures()}, {"control_image": pictures()}
    hole = one | {"mask_image": masks()}
    pag = GUIDED | {"pag_scale": 2.0}
    flux_net = transformer_controlnet(
        "FluxControlNetModel", num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    sd3_net = transformer_controlnet("SD3ControlNetModel", num_layers=1, num_extra_conditioning_channels=0)
    qwen_net = transformer_controlnet(
        "QwenImageControlNetModel", num_layers=1, attention_head_dim=16, num_attention_heads=3
    )
    models = [
        TinyModel("StableDiffusionPanoramaPipeline", TEXT, sd, GUIDED | SMALL),
        TinyModel(
            "StableDiffusionControlNetImg2ImgPipeline", IMAGE, with_controlnet(sd), GUIDED | EDIT, one | control
        ),
        TinyModel(
            "StableDiffusionControlNetInpaintPipeline",
            IMAGE,
            with_controlnet(sd),
            GUIDED | EDIT | SMALL,
            hole | control,
        ),
        TinyModel("StableDiffusionControlNetPAGPipeline", IMAGE, with_controlnet(sd), pag, one),
        TinyModel(
            "StableDiffusionControlNetPAGInpaintPipeline",
            IMAGE,
            with_controlnet(sd),
            pag | EDIT | SMALL,
            hole | control,
        ),
        TinyModel("StableDiffusionUpscalePipeline", IMAGE, upscale, GUIDED, {"image": pictures(16)}),
        TinyModel(
            "StableDiffusionXLControlNetImg2ImgPipeline", IMAGE, with_controlnet(sdxl), GUIDED | EDIT, one | control
        ),
        TinyModel(
            "StableDiffusionXLControlNetInpaintPipeline",
            IMAGE,
            with_controlnet(sdxl),
            GUIDED | EDIT | SMALL,
            hole | control,
        ),
        TinyModel("StableDiffusionXLControlNetPAGPipeline", IMAGE, with_controlnet(sdxl), pag | SMALL, one),
        TinyModel(
            "StableDiffusionXLControlNetPAGImg2ImgPipeline", IMAGE, with_controlnet(sdxl), pag | EDIT, one | control
        ),
        TinyModel("StableDiffusionXLInstructPix2PixPipeline", IMAGE, lambda: sdxl(8), GUIDED | SMALL, one),
        TinyModel("StableDiffusionXLPAGImg2ImgPipeline", IMAGE, sdxl, pag | EDIT, one),
        TinyModel("StableDiffusionXLPAGInpaintPipeline", IMAGE, sdxl, pag | EDIT | SMALL, hole),
        TinyModel(
            "StableDiffusion3PAGImg2ImgPipeline",
            IMAGE,
            lambda: sd3(pag_applied_layers=["blocks.1"]),
            pag | EDIT | SMALL | SHORT,
            one,
        ),
        TinyModel(
            "StableDiffusion3ControlNetPipeline",
            IMAGE,
            with_controlnet(sd3, "transformer", sd3_net),
            GUIDED | SMALL | SHORT,
            control,
        ),
        TinyModel("FluxControlImg2ImgPipeline", IMAGE, lambda: flux(8), EDIT | SMALL | SHORT, one | control),
        TinyModel("FluxControlInpaintPipeline", IMAGE, lambda: flux(8), EDIT | SMALL | SHORT, hole | control),
        TinyModel(
            "FluxControlNetPipeline", IMAGE, with_controlnet(flux, "transformer", flux_net), SMALL | SHORT, control
        ),
        TinyModel(
            "FluxControlNetImg2ImgPipeline",
            IMAGE,
            with_controlnet(flux, "transformer", flux_net),
            EDIT | SMALL | SHORT,
            one | control,
        ),
        TinyModel(
            "FluxControlNetInpaintPipeline",
            IMAGE,
            with_controlnet(flux, "transformer", flux_net),
            EDIT | SMALL | SHORT,
            hole | control,
        ),
        TinyModel("FluxFillPipeline", IMAGE, lambda: flux(24), EDIT | SMALL | SHORT, hole),
        TinyModel(
            "FluxKontextInpaintPipeline",
            IMAGE,
            flux,
            EDIT | SMALL | SHORT | {"max_area": 1024, "_auto_resize": False},
            hole,
        ),
        TinyModel(
            "Flux2KleinInpaintPipeline",
            IMAGE,
            flux2,
            GUIDED | EDIT | SMALL | {"text_encoder_out_layers": (1, 2, 3), **SHORT},
            hole,
        ),
        TinyModel(
            "Flux2KleinKVPipeline",
            IMAGE,
            flux2,
            {"height": 64, "width": 64} | {"text_encoder_out_layers": (1, 2, 3), **SHORT},
            {"image": pictures(64)},
        ),
        TinyModel("ChromaInpaintPipeline", IMAGE, chroma, GUIDED | EDIT | SMALL | SHORT, hole),
        TinyModel("ZImageInpaintPipeline", IMAGE, z_image, GUIDED | EDIT | SMALL | SHORT, hole),
        TinyModel(
            "QwenImageControlNetPipeline",
            IMAGE,
            with_controlnet(qwen_image, "transformer", qwen_net),
            SMALL | SHORT,
            control,
        ),
        TinyModel("Kandinsky3Img2ImgPipeline", IMAGE, kandinsky3, GUIDED | EDIT, one),
        TinyModel("IFImg2ImgPipeline", IMAGE, deepfloyd, GUIDED | EDIT, one),
        TinyModel("IFInpaintingPipeline", IMAGE, deepfloyd, GUIDED | EDIT, hole),
        TinyModel("IFSuperResolutionPipeline", IMAGE, deepfloyd_upscale, GUIDED | SMALL, {"image": pictures(16)}),
        TinyModel(
            "SanaControlNetPipeline",
            IMAGE,
            with_controlnet(sana, "transformer", sana_controlnet),
            GUIDED | SMALL | SHORT,
            control,
        ),
        TinyModel(
            "AnimateDiffControlNetPipeline",
            VIDEO,
            animated(with_controlnet(sd)),
            GUIDED | {"num_frames": 2},
            {"conditioning_frames": clips(2, 32)},
        ),
        TinyModel("AnimateDiffSDXLPipeline", VIDEO, animated(sdxl), GUIDED | SMALL | {"num_frames": 2}),
        TinyModel(
            "AnimateDiffVideoToVideoControlNetPipeline",
            VIDEO,
            animated(with_controlnet(sd)),
            GUIDED | EDIT,
            {"video": clips(2, 32), "conditioning_frames": clips(2, 32)},
        ),
        TinyModel("PIAPipeline", VIDEO, animated(lambda: sd(channels=9)), GUIDED | SMALL | {"num_frames": 2}, one),
        TinyModel(
            "SanaImageToVideoPipeline",
            VIDEO,
            sana_video,
            GUIDED | SMALL | SHORT | {"frames": 9, "use_resolution_binning": False},
            one,
        ),
        TinyModel(
            "CogVideoXImageToVideoPipeline",
            VIDEO,
            lambda: cogvideox(8),
            GUIDED | {"height": 16, "width": 16, "num_frames": 8} | SHORT,
            {"image": pictures(16)},
        ),
        TinyModel(
            "CogVideoXFunControlPipeline",
            VIDEO,
            lambda: cogvideox(8),
            GUIDED | {"height": 16, "width": 16} | SHORT,
            {"control_video": clips(8)},
        ),
        TinyModel(
            "SkyReelsV2DiffusionForcingPipeline", VIDEO, skyreels, GUIDED | FILM | SHORT | {"base_num_frames": 9}
        ),
        TinyModel(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            VIDEO,
            skyreels,
            GUIDED | FILM | SHORT | {"base_num_frames": 9},
            {"image": pictures(16)},
        ),
        TinyModel(
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            VIDEO,
            skyreels,
            GUIDED | FILM | SHORT | {"base_num_frames": 9, "overlap_history": 1},
            {"video": clips()},
        ),
        TinyModel(
            "HunyuanSkyreelsImageToVideoPipeline",
            VIDEO,
            lambda: hunyuan_video(8),
            FILM | SHORT | {"prompt_template": {"template": "{}", "crop_start": 0}},
            {"image": pictures(16)},
        ),
        TinyModel("LucyEditPipeline", VIDEO, lambda: wan(32), GUIDED | FILM | SHORT, {"video": clips()}),
        TinyModel(
            "Kandinsky5I2VPipeline",
            VIDEO,
            lambda: kandinsky5(True, True),
            GUIDED | SMALL | {"num_frames": 5} | SHORT,
            one,
        ),
    ]
    return models


MODELS = _models() + _further()
