"""Stable Diffusion 1.5 and SDXL with random weights: their published configurations, and nothing to download.

For benchmarks, and to see that a run fits: `train.py --model sdxl --random_init`. The tokenizer is CLIP's,
with the vocabulary that open_clip brings.
"""

import torch

import data
import tiny

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768)
VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
CONFIGS = {  # of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0, but for diffusers' defaults
    "sd15": dict(
        unet=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=VAE | dict(sample_size=512, scaling_factor=0.18215),
        text_encoder=TEXT | dict(hidden_act="quick_gelu")),
    "sdxl": dict(
        unet=dict(sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                  transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                  use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                  projection_class_embeddings_input_dim=2816),
        vae=VAE | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=TEXT | dict(hidden_act="quick_gelu"),
        text_encoder_2=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                            num_attention_heads=20, projection_dim=1280, hidden_act="gelu")),
}


def load(args):
    """The pipeline of --model: with --random_init of that architecture alone, else as it was published."""
    return build(args.model) if args.random_init else data.load_pipeline(args.model)


def build(name, **smaller):
    """The float32 pipeline of a row of CONFIGS, its weights drawn from seed 0.

    smaller  by the name of a part, what to change of its configuration: for tests
    """
    from diffusers import (AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline,
                           StableDiffusionXLPipeline, UNet2DConditionModel)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {part: values | smaller.get(part, {}) for part, values in CONFIGS[name].items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae = UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"])
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        if "text_encoder_2" in config:
            text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    tokenizer = tiny.clip_tokenizer(77)
    if "text_encoder_2" in config:
        scheduler = EulerDiscreteScheduler(**SCHEDULE)
        pipe = StableDiffusionXLPipeline(vae, text, text_2, tokenizer, tokenizer, unet, scheduler)
    else:
        scheduler = PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
        pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                       requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
