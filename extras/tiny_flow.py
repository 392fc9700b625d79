"""The embedded flow model: a small StableDiffusion3Pipeline for the drawings of tiny.py.

    python train.py --model tiny-flow                            RPO on a flow-matching model, in minutes
    python -m extras.tiny tiny-flow out/tiny-flow-rpo/model      judge it before and after

The VAE, the pairs, the prompts and the judge are those of tiny.py. The transformer cuts the 8x8x4 latents into
2x2 patches and has two CLIP text encoders of its own. T5 is left out: the pipeline puts 256 zeros where its tokens
would be.
"""

from common import clip_tokenizer
from extras import tiny

WIDTH, TEXT_WIDTH = 96, 32  # the transformer's and each text encoder's
LENGTH = 16  # tokens of a prompt
TRAINED = ("transformer", "text_encoder", "text_encoder_2")  # what tiny-flow.safetensors has


def part(name):
    """The folder of a part of the embedded flow model, see `tiny.part`."""
    return tiny.part(name, {"pipeline": write_pipeline}[name])


def write_pipeline(folder):
    embedded_pipeline(tiny.FILES).save_pretrained(folder)


def embedded_pipeline(folder):
    pipe = make_pipeline(tiny.embedded_vae(folder, is_shifted=True))
    tiny.unpack(tiny.parts_of(pipe, TRAINED), folder / "tiny-flow.safetensors")
    return pipe


def make_pipeline(vae):
    """A StableDiffusion3Pipeline with an untrained transformer and untrained text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    text_encoders = [tiny.make_text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH, heads=2, words=words)
                     for words in ("words", "words 2")]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, pos_embed_max_size=4, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=32, num_attention_heads=WIDTH // 32, joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=2 * TEXT_WIDTH, qk_norm="rms_norm")
    tokenizer = clip_tokenizer(LENGTH)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=1.0), vae, text_encoders[0],
                                    tokenizer, text_encoders[1], tokenizer, text_encoder_3=None, tokenizer_3=None)
