"""The published architectures with random weights: for the benchmark, for tests, and to see whether a run fits.

    python train.py --model sdxl --random_init --data my_pairs              full size, no download
    random_model("sd15", unet=dict(block_out_channels=(32, 32, 64, 64)))    the same architecture, smaller
"""

import diffusers
import torch
import transformers
from open_clip.tokenizer import bytes_to_unicode

from common import clip_tokenizer
from loading import FAMILIES

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
QWEN_3 = dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
              num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
QWEN_VL = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4,
               rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
             "sd3.5-medium": "StableDiffusion3Pipeline", "flux-dev": "FluxPipeline", "z-image": "ZImagePipeline",
             "flux2-klein": "Flux2KleinPipeline", "qwen-image": "QwenImagePipeline"}
CONFIGS = {  # the class of each part and what differs from its defaults; weights are drawn in this order
    "sd15": dict(
        unet=("UNet2DConditionModel", dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)),
        vae=("AutoencoderKL", VAE | dict(sample_size=512, scaling_factor=0.18215)),
        text_encoder=("CLIPTextModel", CLIP_L),
        scheduler=("PNDMScheduler", SCHEDULE | dict(skip_prk_steps=True))),
    "sdxl": dict(
        unet=("UNet2DConditionModel", dict(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)),
        vae=("AutoencoderKL", VAE | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True)),
        text_encoder=("CLIPTextModel", CLIP_L),
        text_encoder_2=("CLIPTextModelWithProjection", CLIP_G),
        scheduler=("EulerDiscreteScheduler", SCHEDULE)),
    "sd3.5-medium": dict(
        transformer=("SD3Transformer2DModel", dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")),
        vae=("AutoencoderKL", VAE_16 | dict(scaling_factor=1.5305, shift_factor=0.0609)),
        text_encoder=("CLIPTextModelWithProjection", CLIP_L),
        text_encoder_2=("CLIPTextModelWithProjection", CLIP_G),
        text_encoder_3=("T5EncoderModel", T5_XXL),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=3.0))),
    "flux-dev": dict(
        transformer=("FluxTransformer2DModel", dict(guidance_embeds=True)),
        vae=("AutoencoderKL", VAE_16 | dict(scaling_factor=0.3611, shift_factor=0.1159)),
        text_encoder=("CLIPTextModel", CLIP_L),
        text_encoder_2=("T5EncoderModel", T5_XXL),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=3.0, use_dynamic_shifting=True))),
    "z-image": dict(
        transformer=("ZImageTransformer2DModel", dict(axes_lens=[1536, 512, 512])),
        vae=("AutoencoderKL", VAE_16 | dict(scaling_factor=0.3611, shift_factor=0.1159)),
        text_encoder=("Qwen3Model", QWEN_3),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=6.0))),
    "flux2-klein": dict(
        transformer=("Flux2Transformer2DModel", dict(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False)),
        vae=("AutoencoderKLFlux2", dict()),
        text_encoder=("Qwen3ForCausalLM", QWEN_3),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=3.0, use_dynamic_shifting=True))),
    "qwen-image": dict(
        transformer=("QwenImageTransformer2DModel", dict()),
        vae=("AutoencoderKLQwenImage", dict()),
        text_encoder=("Qwen2_5_VLForConditionalGeneration", dict(text_config=QWEN_VL, vision_config=dict(
            hidden_size=1280, out_hidden_size=3584))),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(
            shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02))),
}


def random_model(name, **smaller):
    """The model of a row of CONFIGS. Its weights are a function of the row: they are drawn from seed 0.

    smaller  {part: changes of its configuration}; tests make small models by it
    """
    parts = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, (class_name, config) in CONFIGS[name].items():
            parts[part] = build(class_name, config | smaller.get(part, {}))
            if part.startswith("text_encoder"):
                parts[part.replace("text_encoder", "tokenizer")] = tokenizer_for(class_name)
    pipeline_name = PIPELINES[name]
    if name == "sd15":  # the one that must be told that it has no safety checker
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return FAMILIES[pipeline_name](getattr(diffusers, pipeline_name)(**parts))


def build(class_name, config):
    if hasattr(transformers, class_name):
        part_class = getattr(transformers, class_name)
        return part_class(part_class.config_class(**config))
    part_class = getattr(diffusers, class_name)
    if "Scheduler" in class_name:
        with torch.device("cpu"):  # a schedule needs its values, also where the networks are built on "meta"
            return part_class(**config)
    return part_class(**config)


def tokenizer_for(class_name):
    """A tokenizer for a text encoder's class. T5's and Qwen's know single letters alone."""
    if class_name.startswith("Qwen"):
        return qwen_tokenizer()
    return t5_tokenizer() if class_name.startswith("T5") else clip_tokenizer(77)


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    return transformers.T5Tokenizer(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def qwen_tokenizer():
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*marks, *bytes_to_unicode().values()]
    template = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                "{% endfor %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}")
    return transformers.Qwen2Tokenizer({word: number for number, word in enumerate(words)}, chat_template=template,
                                       additional_special_tokens=marks[1:], model_max_length=131072)
