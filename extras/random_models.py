"""Random weights at full size."""
import torch
from common import clip_tokenizer
from flow_models import Flux, StableDiffusion3
from models import StableDiffusion, StableDiffusionXL

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
CLIP_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 projection_dim=768, hidden_act="quick_gelu")
T5_XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
              feed_forward_proj="gated-gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
              projection_dim=1280, hidden_act="gelu")
VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
VAE_16 = VAE | dict(sample_size=1024, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
CONFIGS = {  # of the published models, but for diffusers' defaults
    "sd15": dict(
        unet=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=VAE | dict(sample_size=512, scaling_factor=0.18215),
        text_encoder=CLIP_TEXT),
    "sdxl": dict(
        unet=dict(sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                  transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                  use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                  projection_class_embeddings_input_dim=2816),
        vae=VAE | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIP_TEXT,
        text_encoder_2=CLIP_G),
    "sd3.5-medium": dict(
        transformer=dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                         dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        vae=VAE_16 | dict(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIP_TEXT,
        text_encoder_2=CLIP_G,
        text_encoder_3=T5_XXL,
        scheduler=dict(shift=3.0)),
    "flux-dev": dict(
        transformer=dict(guidance_embeds=True),
        vae=VAE_16 | dict(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIP_TEXT,
        text_encoder_2=T5_XXL,
        scheduler=dict(shift=3.0, use_dynamic_shifting=True)),
}


def random_model(name, **smaller):
    """The model of a row of CONFIGS, its weights drawn from seed 0.

    smaller  by the name of a part, what to change of its configuration: for tests
    """
    from diffusers import (AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline,
                           StableDiffusionXLPipeline, UNet2DConditionModel)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {part: values | smaller.get(part, {}) for part, values in CONFIGS[name].items()}
    if "transformer" in config:
        return random_flow_model(config)
    tokenizer = clip_tokenizer(77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config["unet"])
        vae = AutoencoderKL(**config["vae"])
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        if "text_encoder_2" in config:
            text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    is_xl = "text_encoder_2" in config
    with torch.device("cpu"):  # on "meta", where a model has no weights, it would have no schedule
        scheduler = EulerDiscreteScheduler(**SCHEDULE) if is_xl else PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    if is_xl:
        pipe = StableDiffusionXLPipeline(vae, text, text_2, tokenizer, tokenizer, unet, scheduler)
        return StableDiffusionXL(pipe)
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    return StableDiffusion(pipe)


def random_flow_model(config):
    """The model of SD3's or FLUX's kind of {part: its configuration}; T5 gets a tokenizer of letters."""
    from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                           SD3Transformer2DModel, StableDiffusion3Pipeline)
    from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel,
                              T5Tokenizer)

    is_sd3 = "text_encoder_3" in config
    transformer_class = SD3Transformer2DModel if is_sd3 else FluxTransformer2DModel
    clip_class = CLIPTextModelWithProjection if is_sd3 else CLIPTextModel
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    t5_tokenizer = T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)
    tokenizer = clip_tokenizer(77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = transformer_class(**config["transformer"])
        vae = AutoencoderKL(**config["vae"])
        clip = clip_class(CLIPTextConfig(**config["text_encoder"]))
        clip_2 = clip_class(CLIPTextConfig(**config["text_encoder_2"])) if is_sd3 else None
        t5 = T5EncoderModel(T5Config(**config["text_encoder_3" if is_sd3 else "text_encoder_2"]))
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    if is_sd3:
        return StableDiffusion3(StableDiffusion3Pipeline(transformer, scheduler, vae, clip, tokenizer, clip_2, tokenizer,
                                                         t5, t5_tokenizer))
    return Flux(FluxPipeline(scheduler, vae, clip, tokenizer, t5, t5_tokenizer, transformer))
