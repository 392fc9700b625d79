"""The published architectures with random weights: for the benchmark, for tests, and to see whether a run fits.

    python train.py --model sdxl --random_init --data my_pairs              full size, no download
    random_model("sd15", unet=dict(block_out_channels=(32, 32, 64, 64)))    the same architecture, smaller
"""

import torch
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline,
                       FluxTransformer2DModel, PNDMScheduler, SchedulerMixin, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, T5EncoderModel, T5Tokenizer

from common import clip_tokenizer
from flow_models import Flux, StableDiffusion3
from models import StableDiffusion, StableDiffusionXL

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
VAE_16 = VAE | dict(sample_size=1024, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              projection_dim=768, hidden_act="quick_gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
              projection_dim=1280, hidden_act="gelu")
T5_XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
              feed_forward_proj="gated-gelu")
PIPELINES = {  # the family and its pipeline
    "sd15": (StableDiffusion, StableDiffusionPipeline),
    "sdxl": (StableDiffusionXL, StableDiffusionXLPipeline),
    "sd3.5-medium": (StableDiffusion3, StableDiffusion3Pipeline),
    "flux-dev": (Flux, FluxPipeline),
}
CONFIGS = {  # the class of each part and what differs from its defaults; weights are drawn in this order
    "sd15": dict(
        unet=(UNet2DConditionModel, dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)),
        vae=(AutoencoderKL, VAE | dict(sample_size=512, scaling_factor=0.18215)),
        text_encoder=(CLIPTextModel, CLIP_L),
        scheduler=(PNDMScheduler, SCHEDULE | dict(skip_prk_steps=True))),
    "sdxl": dict(
        unet=(UNet2DConditionModel, dict(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)),
        vae=(AutoencoderKL, VAE | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True)),
        text_encoder=(CLIPTextModel, CLIP_L),
        text_encoder_2=(CLIPTextModelWithProjection, CLIP_G),
        scheduler=(EulerDiscreteScheduler, SCHEDULE)),
    "sd3.5-medium": dict(
        transformer=(SD3Transformer2DModel, dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")),
        vae=(AutoencoderKL, VAE_16 | dict(scaling_factor=1.5305, shift_factor=0.0609)),
        text_encoder=(CLIPTextModelWithProjection, CLIP_L),
        text_encoder_2=(CLIPTextModelWithProjection, CLIP_G),
        text_encoder_3=(T5EncoderModel, T5_XXL),
        scheduler=(FlowMatchEulerDiscreteScheduler, dict(shift=3.0))),
    "flux-dev": dict(
        transformer=(FluxTransformer2DModel, dict(guidance_embeds=True)),
        vae=(AutoencoderKL, VAE_16 | dict(scaling_factor=0.3611, shift_factor=0.1159)),
        text_encoder=(CLIPTextModel, CLIP_L),
        text_encoder_2=(T5EncoderModel, T5_XXL),
        scheduler=(FlowMatchEulerDiscreteScheduler, dict(shift=3.0, use_dynamic_shifting=True))),
}


def random_model(name, **smaller):
    """The model of a row of CONFIGS. Its weights are a function of the row: they are drawn from seed 0.

    smaller  {part: changes of its configuration}; tests make small models by it
    """
    parts, clip = {}, clip_tokenizer(77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, (part_class, config) in CONFIGS[name].items():
            parts[part] = build(part_class, config | smaller.get(part, {}))
            if part.startswith("text_encoder"):
                tokenizer = t5_tokenizer() if part_class is T5EncoderModel else clip
                parts[part.replace("text_encoder", "tokenizer")] = tokenizer
    family, pipeline_class = PIPELINES[name]
    if pipeline_class is StableDiffusionPipeline:  # the one that must be told that it has no safety checker
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return family(pipeline_class(**parts))


def build(part_class, config):
    if issubclass(part_class, PreTrainedModel):
        return part_class(part_class.config_class(**config))
    if issubclass(part_class, SchedulerMixin):
        with torch.device("cpu"):  # a schedule needs its values, also where the networks are built on "meta"
            return part_class(**config)
    return part_class(**config)


def t5_tokenizer():
    """A tokenizer for T5 that knows single letters alone."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    return T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)
