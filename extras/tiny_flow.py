"""The embedded flow model: a small StableDiffusion3Pipeline for the drawings of tiny.py.

    python train.py --model tiny-flow                            RPO on a flow-matching model, in minutes
    python -m extras.tiny tiny-flow out/tiny-flow-rpo/model      judge it before and after

The VAE, the pairs, the prompts and the judge are those of tiny.py. The transformer cuts the 8x8x4 latents into
2x2 patches and has two CLIP text encoders of its own. T5 is left out: the pipeline puts 256 zeros where its tokens
would be.
"""

import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from common import clip_tokenizer
from extras import tiny
from flow_models import T5_TOKENS

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


def train(pipe, latents, prompts, steps, fit):
    """Trains what is TRAINED of a pipeline, on unscaled latents [N, 4, 8, 8] and their N prompts, by tiny_build.fit."""
    networks = tiny.parts_of(pipe, TRAINED)
    transformer, *text_encoders = networks.values()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids   # [N + 1, 16]

    def batch_loss():  # one prompt in ten is empty, for classifier-free guidance
        rows = torch.randint(len(prompts), (64,))
        t = torch.randn(64, 1, 1, 1).sigmoid()
        noise = torch.randn(64, 4, 8, 8)
        x_t = (1 - t) * latents[rows] + t * noise
        is_empty = torch.rand(64) < 0.1
        cond = encode(text_encoders, ids[torch.where(is_empty, len(prompts), rows)])
        with AlikeTokens(T5_TOKENS):
            prediction = transformer(x_t, timestep=1000 * t.flatten(), **cond, return_dict=False)[0]
        return F.mse_loss(prediction, noise - latents[rows])

    fit("flow", steps, networks.values(), 2e-3, batch_loss)


def encode(text_encoders, ids):
    """The embeddings of ids [B, 16] that SD3's pipeline makes without T5, but with one of its 256 zeros."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in text_encoders]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)            # [B, 16, 64]
    return {"encoder_hidden_states": F.pad(tokens, (0, 0, 0, 1)),                           # [B, 17, 64]
            "pooled_projections": torch.cat([output.text_embeds for output in outputs], dim=-1)}


class AlikeTokens(TorchFunctionMode):
    """Attention in which the last token stands for `count` equal tokens: its logits are log(count) higher.

    This is exact. Text tokens have no positions, so tokens that are equal at first stay equal in every layer. The base
    model trains on 33 tokens instead of 288.
    """

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            _, key, _ = args
            bias = torch.zeros(1, 1, 1, key.shape[2])
            bias[..., -1] = math.log(self.count)
            kwargs = kwargs | {"attn_mask": bias}
        return function(*args, **kwargs)
