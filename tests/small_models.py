"""Small pipelines of every family, with random weights: 32 px to 8x8 latents."""

import functools
import os
import shutil
from pathlib import Path

import filelock
import torch
from diffusers import (AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import data
import loading
from extras import random_models

CLIP = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VAE = dict(block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3,
           up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, norm_num_groups=4)
T5 = dict(vocab_size=98, d_model=96, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
loaded = functools.cache(loading.load_model)  # most of a small run's time is to read a vocabulary
clip_loaded = functools.cache(data.Clip)


@functools.cache
def small_folder(kind):
    """The folder of "sd", "sdxl", "sd-v" (v-prediction), "sd3", "flux", "z-image", "flux2-klein" or "qwen-image". All processes of a session share it."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / kind
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            torch.manual_seed(0)
            make = {"sd3": make_sd3, "flux": make_flux, "z-image": make_z_image, "flux2-klein": make_flux2_klein,
                    "qwen-image": make_qwen_image}.get(kind, make_unet_pipeline)
            make(kind).save_pretrained(f"{folder}.part")
            shutil.move(f"{folder}.part", folder)
    return str(folder)


def make_unet_pipeline(kind):
    is_xl = kind == "sdxl"
    vae = AutoencoderKL(**VAE, scaling_factor=0.13025 if is_xl else 0.18215)
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=48 + 6 * 8) if is_xl else {}
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32 + 48 if is_xl else 32,
        mid_block_type=None, up_block_types=("UpBlock2D", "UpBlock2D"), **added)
    schedule = random_models.SCHEDULE | dict(prediction_type="v_prediction" if kind == "sd-v" else "epsilon")
    first, tokenizer = CLIPTextModel(text_config(32)), letters()
    if is_xl:
        second = CLIPTextModelWithProjection(text_config(48))
        return StableDiffusionXLPipeline(vae, first, second, tokenizer, tokenizer, unet,
                                         EulerDiscreteScheduler(**schedule))
    return StableDiffusionPipeline(vae, first, tokenizer, unet, PNDMScheduler(skip_prk_steps=True, **schedule),
                                   None, None, requires_safety_checker=False)


def text_config(width):
    return CLIPTextConfig(hidden_size=width, projection_dim=width, vocab_size=514, bos_token_id=512, eos_token_id=513,
                          **CLIP)


def letters():
    """CLIP's tokenizer without words: it knows its 2 x 256 letters alone, so it is soon read and saved."""
    characters = [*bytes_to_unicode().values()]
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=77)


def make_sd3(kind):
    transformer = dict(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=80, pos_embed_max_size=8,
        dual_attention_layers=(0,))
    first, second = (CLIP | dict(hidden_size=width, projection_dim=width) for width in (32, 48))
    return random_models.random_model("sd3.5-medium", transformer=transformer, vae=flow_vae(), text_encoder=first,
                                      text_encoder_2=second, text_encoder_3=T5).pipe


def make_flux(kind):
    transformer = dict(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6))
    return random_models.random_model("flux-dev", transformer=transformer, vae=flow_vae(),
                                      text_encoder=CLIP | dict(hidden_size=32, projection_dim=32),
                                      text_encoder_2=T5).pipe


def flow_vae():
    return VAE | dict(layers_per_block=1, scaling_factor=1.5305, shift_factor=0.0609)


QWEN = dict(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8)


def make_z_image(kind):
    transformer = dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                       axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64])
    return random_models.random_model("z-image", transformer=transformer, vae=flow_vae(), text_encoder=QWEN).pipe


def make_flux2_klein(kind):
    """Its pipeline takes the layers 9, 18 and 27 of the text encoder."""
    transformer = dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                       joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4))
    vae = VAE | dict(layers_per_block=1)
    pipe = random_models.random_model("flux2-klein", transformer=transformer, vae=vae,
                                      text_encoder=QWEN | dict(num_hidden_layers=28)).pipe
    pipe.vae.bn.running_mean.normal_()
    pipe.vae.bn.running_var.uniform_(0.5, 2)
    return pipe


def make_qwen_image(kind):
    transformer = dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                       joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    vae = dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
               latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[0.5, 1.5, 2.0, 1.0])
    text = dict(text_config=QWEN | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])),
                vision_config=dict(depth=1, hidden_size=16, out_hidden_size=16, intermediate_size=16, num_heads=2))
    return random_models.random_model("qwen-image", transformer=transformer, vae=vae, text_encoder=text).pipe
