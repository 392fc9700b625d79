"""A class per model family: how it is loaded, conditioned, called, sampled and saved. The step knows no family.

    model = load_model("sdxl")                      a preset's name, a diffusers folder or a hub id
    model.encode_prompts(["a cat"])                 {"prompt_embeds": [B, L, E], ...}
    model.predict(model.denoiser, x_t, t, cond)     [N, C, h, w]

Another family, of flow matching too, is one more class with these methods and one more row of FAMILIES.
"""

import concurrent.futures
import contextlib
import copy
import functools
import importlib
import inspect
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from common import InputError, brief, clip_tokenizer, digest, fingerprint, hub_id, to_device
from loss import DDPM, Flow

HUB_IDS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
}
EMBEDDED = {"tiny": "extras.tiny", "tiny-flow": "extras.tiny_flow"}  # the modules that build them
SCHEDULE_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                 "rescale_betas_zero_snr")
T5_TOKENS = 256  # of a prompt, by SD3's pipelines
BELOW = "init_lora.json"  # beside LoRA weights: the LoRA weights that they stand on
TOY = 1e8  # parameters; a smaller denoiser is a toy, for which the embedded CLIP will do


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x, epsilon- or v-prediction.

    pipe      the diffusers pipeline, float32
    denoiser  the network in it that trains
    process   the diffusion process of its schedule
    init_lora where the LoRA weights came from that were fused into it last, or None
    vae_dtype in which images are encoded
    """

    denoiser_name = "unet"
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")  # that are compiled: nearly all of the arithmetic
    text_encoders = ("text_encoder",)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    optimizer = "adamw"
    guidance = 7.5

    def __init__(self, pipe):
        self.pipe, self.init_lora, self.vae_dtype = pipe, None, torch.float32
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.process = self.make_process()
        self.num_parameters = sum(parameter.numel() for parameter in self.denoiser.parameters())
        self.is_toy = self.num_parameters < TOY
        pipe.set_progress_bar_config(disable=True)
        for network in self.networks().values():
            network.eval().requires_grad_(False)  # eval(): dropout would part the policy from its reference

    def make_process(self):
        """The diffusion process of the pipeline's schedule. ValueError where it, or the network, is of another kind."""
        from diffusers import DDPMScheduler

        config = self.pipe.scheduler.config
        if "beta_schedule" not in config or self.pipe.vae.config.get("latents_mean") is not None:
            raise ValueError("its noise schedule or its latents are not those of Stable Diffusion or SDXL")
        if self.denoiser.config.get("time_cond_proj_dim"):
            raise ValueError("its UNet wants an embedding of the guidance, as latent consistency models do")
        if getattr(self.pipe.text_encoder.config, "use_attention_mask", False):
            raise ValueError("its text encoder wants an attention mask, as AltDiffusion's does")
        scheduler = DDPMScheduler.from_config(config)
        return DDPM(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def set_times(self, args):
        """Draws times by --timestep_* and notes there what is drawn by. InputError where they have no effect."""
        for name in ("timestep_sampling", "timestep_mean", "timestep_scale", "timestep_shift", "train_guidance"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} is for models of flow matching; this one draws its timesteps uniformly")

    def networks(self):
        """{name: network} of the pipeline."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}

    def resolution(self, wanted=None, for_training=True):
        """The side of the images, pixels: `wanted`, or the model's own. InputError if it will not do."""
        least = self.pipe.vae_scale_factor
        if for_training:  # whose latents are not padded, as a pipeline pads them, where halves meet
            least *= self.latent_multiple()
        if wanted and wanted % least:
            raise InputError(f"--resolution {wanted} is no multiple of {least}, as this model needs")
        own = self.own_sample_size()
        if not wanted and own is None:
            raise InputError("the model does not say the size of its images; give --resolution")
        return wanted or int(np.min(own)) * self.pipe.vae_scale_factor

    def latent_multiple(self):
        """What the side of a latent must be a multiple of."""
        return 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def own_sample_size(self):
        """The side of the model's own latents, or None."""
        return self.denoiser.config.get("sample_size")

    def prompt_shape(self):
        """(L, E) of `prompt_embeds`."""
        return self.pipe.tokenizer.model_max_length, self.denoiser.config.cross_attention_dim

    def tokenizers(self):
        """{argument of `encode_ids`: (tokenizer, tokens that its text encoder reads)}."""
        return {"ids": (self.pipe.tokenizer, self.pipe.tokenizer.model_max_length)}

    def longest_reader(self):
        """(tokenizer, tokens that it reads) of the text encoder that reads most of a prompt."""
        return max(self.tokenizers().values(), key=lambda reader: reader[1])

    def pooled_width(self):
        """P of `pooled_prompt_embeds`; 0 where there are none."""
        return 0

    def latent_shape(self, resolution):
        side = resolution // self.pipe.vae_scale_factor
        return self.pipe.vae.config.latent_channels, side, side

    # The forward

    def predict(self, network, x_t, t, cond):
        """The prediction [N, C, h, w] of a network of this family for x_t [N, C, h, w] at t [N]."""
        return network(x_t, t, **cond, return_dict=False)[0]

    def conditioning(self, prompt_embeds, time_ids):
        """What `predict` takes for B prompts with S images each: rows of the first images, then of the second.

        prompt_embeds  what `encode_prompts` gives
        time_ids       [B, S, 6] float32, used by SDXL alone
        """
        images = time_ids.shape[1]
        return {"encoder_hidden_states": prompt_embeds["prompt_embeds"].float().repeat(images, 1, 1)}

    # Prompts and images

    def encode_prompts(self, prompts, dtype=torch.float32, ids=None):
        """{"prompt_embeds": [B, L, E]} float32 of B prompts; but of SD also "pooled_prompt_embeds": [B, P].

        An empty prompt becomes what the pipeline itself takes for unconditional: zeros where SDXL's
        force_zeros_for_empty_prompt says so (Diffusion-DPO trains on the encoded "" there), else the encoded
        "". Longer prompts than the encoder reads are cut.

        ids  what `tokenize` made of the prompts, if that is done
        """
        device = self.pipe.text_encoder.device
        ids = ids or tokenize(self.tokenizers(), prompts)

        def encode(rows):
            part = {name: to_device(value[rows.start:rows.stop], device) for name, value in ids.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self.encode_ids(**part)

        outputs = by_rows(encode, range(len(prompts)), device, len(prompts), torch.get_num_threads())
        embeds = {name: torch.cat([output[name] for output in outputs]).float() for name in outputs[0]}
        zeros = self.pipe.config.get("force_zeros_for_empty_prompt", False)
        for number, prompt in enumerate(prompts):
            if zeros and not prompt:
                for value in embeds.values():
                    value[number] = 0
        return embeds

    def encode_ids(self, ids):
        """{name: [B, ...]} of ids [B, tokens] of each tokenizer, as the pipeline's encode_prompt makes them."""
        return {"prompt_embeds": self.pipe.text_encoder(ids)[0]}

    def sampling_embeds(self, prompts, dtype=torch.float32):
        """What a pipeline takes in the place of N prompts: their embeddings, and that of none for its guidance.

        An empty prompt is what `encode_prompts` makes of it.
        """
        embeds = self.encode_prompts(prompts, dtype)
        for name, value in self.encode_prompts([""], dtype).items():
            embeds[f"negative_{name}"] = value.expand_as(embeds[name])
        return embeds

    def encode_images(self, pixels):
        """Mean and std [B, S, C, h, w] of the VAE's posterior of pixels [B, S, 3, H, W] uint8, before the scaling.

        In `vae_dtype`, never in fp16, in which SDXL's VAE overflows. A few pairs at a time: at 1024 px one
        activation of 16 pairs would have 2^32 elements.
        """
        vae = self.encoding_vae

        def encode(images):
            images = to_device(images.flatten(0, 1), vae.device).float() / 127.5 - 1    # in [-1, 1]
            posterior = vae.encode(images.to(vae.dtype)).latent_dist
            return posterior.mean.float(), posterior.std.float()

        at_once = max(1, 2 ** 21 // pixels[0, 0, 0].numel())
        outputs = by_rows(encode, pixels, vae.device, at_once, torch.get_num_threads())
        mean, std = (torch.cat(output).unflatten(0, pixels.shape[:2]) for output in zip(*outputs))
        return mean, std

    @functools.cached_property
    def encoding_vae(self):
        """The VAE in `vae_dtype`; a copy where that is not float32, in which samples are decoded.

        Channels-last on a CPU, where that is 1.5 times as fast; on an H100 it was slower.
        """
        vae = self.pipe.vae
        if vae.device.type == "cpu":
            vae.to(memory_format=torch.channels_last)
        return vae if self.vae_dtype == torch.float32 else copy.deepcopy(vae).to(self.vae_dtype)

    def scale_latents(self, latents):
        """Latents as the VAE gives them -> as the denoiser knows them, of about unit variance."""
        config = self.pipe.vae.config
        return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """Pictures [N, 3, H, W] float32 on the CPU, in [0, 1], of scaled latents [N, C, h, w]; in float32."""
        config = self.pipe.vae.config
        latents = latents.float() / config.scaling_factor + (config.get("shift_factor") or 0)
        at_once = max(1, 2 ** 14 // latents[0, 0].numel())
        pictures = [self.pipe.vae.decode(part).sample.cpu() for part in latents.split(at_once)]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(self, prompts, generators, steps, guidance, dtype=torch.float32, pipe=None, **more):
        """Scaled latents [N, C, h, w] of N prompts, each from the noise of its own CPU generator.

        prompts  or None, with what `sampling_embeds` gave of them
        pipe     another pipeline on the same networks, of image-to-image
        more     what the pipeline takes: height and width in pixels; image and strength of image-to-image
        """
        pipe = pipe or self.pipe
        with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
            return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                        output_type="latent", **more).images.float()

    def check_scheduler(self):
        """InputError where the pipeline's scheduler ignores a key of the schedule that the model has."""
        scheduler = self.pipe.scheduler
        known = inspect.signature(type(scheduler).__init__).parameters
        for key in SCHEDULE_KEYS:
            if scheduler.config.get(key) and key not in known:
                raise InputError(f"{type(scheduler).__name__} ignores the model's {key} and would draw with "
                                 "another noise schedule; give evaluate.py --scheduler EulerDiscreteScheduler, or "
                                 "train.py --sample_every 0")

    # Training and saving

    def add_lora(self, rank, seed):
        """Puts an adapter, the one thing that trains, into the denoiser; its first values follow from the seed."""
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                 target_modules=self.lora_targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.denoiser.add_adapter(config)
        layer_class = peft.tuners.tuners_utils.BaseTunerLayer
        self.lora_layers = [module for module in self.denoiser.modules() if isinstance(module, layer_class)]
        for layer in self.lora_layers:
            layer.cast_input_dtype_enabled = False  # to float32, from which autocast would cast them back

    def save(self, folder):
        """A diffusers pipeline; or, where the denoiser holds an adapter, what load_lora_weights loads."""
        import diffusers
        import peft

        if not hasattr(self.denoiser, "peft_config"):
            return self.pipe.save_pretrained(folder)
        weights = peft.get_peft_model_state_dict(self.denoiser)
        if self.denoiser_name == "unet":
            weights = diffusers.utils.convert_state_dict_to_diffusers(weights)
        self.pipe.save_lora_weights(folder, weights)
        if self.init_lora:
            is_local = Path(self.init_lora).exists()
            below = str(Path(self.init_lora).absolute()) if is_local else self.init_lora
            (Path(folder) / BELOW).write_text(json.dumps({"init_lora": below}))

    @functools.cached_property
    def encoder_digests(self):
        """{name: digest} of all that encoded pairs stand for: VAE, text encoders, tokenizers."""
        digests = {"force_zeros_for_empty_prompt": bool(self.pipe.config.get("force_zeros_for_empty_prompt"))}
        parts = {name: part for name, part in self.pipe.components.items() if part}
        for name, part in sorted(parts.items()):
            if name == "vae" or name in self.text_encoders:
                digests[name] = digest_with_config(part)
            elif name.startswith("tokenizer"):
                vocabulary = part.get_vocab()
                digests[name] = digest([sorted(vocabulary, key=vocabulary.get), part.special_tokens_map,
                                        part.pad_token_id, part.padding_side, part.model_max_length,
                                        part("a photo").input_ids])
        return digests

    @functools.cached_property
    def digests(self):
        """{name: digest} of all that a run starts from; to be asked for before anything trains."""
        denoiser = digest_with_config(self.denoiser)
        return self.encoder_digests | {self.denoiser_name: denoiser, "noise schedule": digest(self.schedule())}

    def schedule(self):
        """What the process is a function of, plain numbers and words."""
        return [self.process.prediction_type, self.process.alphas_cumprod.tolist()]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, pooled embeddings, and every image's own size and crop."""

    parts = StableDiffusion.parts + ("text_encoder_2", "tokenizer_2")
    text_encoders = ("text_encoder", "text_encoder_2")
    optimizer = "adafactor"
    guidance = 5.0

    def pooled_width(self):
        return self.pipe.text_encoder_2.config.projection_dim

    def tokenizers(self):
        return super().tokenizers() | {"ids_2": (self.pipe.tokenizer_2, self.pipe.tokenizer_2.model_max_length)}

    def encode_ids(self, ids, ids_2):
        embeds, (_, second) = encode_by_both_clips(self.pipe, ids, ids_2)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": second.text_embeds}

    def conditioning(self, prompt_embeds, time_ids):
        """See above; time_ids stay float32: bf16 would round 1023 to 1024."""
        images = time_ids.shape[1]
        pooled = prompt_embeds["pooled_prompt_embeds"].float()
        added = {"text_embeds": pooled.repeat(images, 1), "time_ids": time_ids.transpose(0, 1).flatten(0, 1)}
        return super().conditioning(prompt_embeds, time_ids) | {"added_cond_kwargs": added}


class StableDiffusion3(StableDiffusion):
    """SD3 and SD3.5: a transformer of flow matching, two CLIP text encoders, and T5, which may be left out."""

    denoiser_name = "transformer"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    blocks = ("JointTransformerBlock",)
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    guidance = 4.5

    def make_process(self):
        """Logit-normal, as SD3 was trained (section 5.3.1 of arXiv:2403.03206), with the shift that it samples by."""
        config = self.pipe.scheduler.config
        if "shift" not in config:
            raise ValueError("its scheduler is not of flow matching")
        return Flow("logit_normal", 0.0, 1.0, self.shift(config))

    def shift(self, config):
        return config.shift

    def pooled_width(self):
        return self.denoiser.config.pooled_projection_dim

    def set_times(self, args):
        if args.train_guidance is not None and not self.denoiser.config.get("guidance_embeds"):
            raise InputError("--train_guidance: this model is told none")
        if args.timestep_sampling == "uniform" and (args.timestep_mean, args.timestep_scale) != (None, None):
            raise InputError("--timestep_mean and --timestep_scale are of --timestep_sampling logit_normal")
        for name, value in vars(self.process).items():
            typed = getattr(args, f"timestep_{name}")
            setattr(self.process, name, value if typed is None else typed)
            setattr(args, f"timestep_{name}", getattr(self.process, name))

    def schedule(self):
        return vars(self.process)

    def latent_multiple(self):
        return self.denoiser.config.patch_size

    def prompt_shape(self):
        return self.pipe.tokenizer.model_max_length + T5_TOKENS, self.denoiser.config.joint_attention_dim  # CLIP's and T5's

    def resolution(self, wanted=None, for_training=True):
        """See above; its pipeline pads nothing either, and the positions of a model end at some size."""
        side, positions = super().resolution(wanted), self.denoiser.config.get("pos_embed_max_size")
        most = (positions or math.inf) * self.latent_multiple() * self.pipe.vae_scale_factor
        if side > most:
            raise InputError(f"--resolution {side}: this model has positions for {most} pixels")
        return side

    def tokenizers(self):
        length = self.pipe.tokenizer.model_max_length
        readers = {"ids": (self.pipe.tokenizer, length), "ids_2": (self.pipe.tokenizer_2, length)}
        return readers | ({"ids_3": (self.pipe.tokenizer_3, T5_TOKENS)} if self.pipe.text_encoder_3 else {})

    def encode_ids(self, ids, ids_2, ids_3=None):
        """See above; CLIP's tokens, filled up with zeros to the width of T5's, then T5's, zeros where it is left out."""
        tokens, outputs = encode_by_both_clips(self.pipe, ids, ids_2)                       # [B, 77, E of CLIP]
        if ids_3 is None:
            of_t5 = tokens.new_zeros(len(ids), T5_TOKENS, self.denoiser.config.joint_attention_dim)
        else:
            of_t5 = self.pipe.text_encoder_3(ids_3)[0]                                      # [B, 256, E]
        tokens = F.pad(tokens, (0, of_t5.shape[-1] - tokens.shape[-1]))                     # [B, 77, E]
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)              # [B, P]
        return {"prompt_embeds": torch.cat([tokens, of_t5], dim=1), "pooled_prompt_embeds": pooled}

    def conditioning(self, prompt_embeds, time_ids):
        pooled = prompt_embeds["pooled_prompt_embeds"].float().repeat(time_ids.shape[1], 1)
        return super().conditioning(prompt_embeds, time_ids) | {"pooled_projections": pooled}

    def predict(self, network, x_t, t, cond):
        """See above; t [N] in (0, 1), of which the network takes thousandths."""
        return network(x_t, timestep=1000 * t, **cond, return_dict=False)[0]

    def check_scheduler(self):
        """Any scheduler of flow matching draws by the same paths."""


class Flux(StableDiffusion3):
    """FLUX.1: latents in packs of 2 x 2, positions of each, and, in dev, an embedding of the distilled guidance.

    train_guidance  that the network is told while it trains
    """

    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    text_encoders = ("text_encoder", "text_encoder_2")
    guidance = 3.5
    train_guidance = 1.0

    def shift(self, config, resolution=None):
        """Of a size of images, pixels, by default the model's own, as its pipeline computes it."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        if not config.get("use_dynamic_shifting"):
            return config.shift
        tokens = ((resolution or self.resolution()) // self.pipe.vae_scale_factor // 2) ** 2
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return math.exp(calculate_shift(tokens, *(config[key] for key in keys)))

    def set_times(self, args):
        self.process.shift = self.shift(self.pipe.scheduler.config, args.resolution)
        if self.denoiser.config.guidance_embeds:
            args.train_guidance = 1.0 if args.train_guidance is None else args.train_guidance
            self.train_guidance = args.train_guidance
        super().set_times(args)

    def schedule(self):
        return super().schedule() | {"train_guidance": self.train_guidance}

    def latent_multiple(self):
        return 2

    def own_sample_size(self):
        return self.pipe.default_sample_size

    def prompt_shape(self):
        _, length = self.longest_reader()
        return length, self.denoiser.config.joint_attention_dim

    def tokenizers(self):
        return {"ids": (self.pipe.tokenizer, self.pipe.tokenizer.model_max_length), "ids_2": (self.pipe.tokenizer_2, 512)}

    def encode_ids(self, ids, ids_2):
        return {"prompt_embeds": self.pipe.text_encoder_2(ids_2)[0],
                "pooled_prompt_embeds": self.pipe.text_encoder(ids).pooler_output}

    def sampling_embeds(self, prompts, dtype=torch.float32):
        return self.encode_prompts(prompts, dtype)  # its guidance is an embedding

    def predict(self, network, x_t, t, cond):
        count, channels, height, width = x_t.shape
        pack, ids = self.pipe._pack_latents, self.pipe._prepare_latent_image_ids
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full_like(t, self.train_guidance)
        prediction = network(
            pack(x_t, count, channels, height, width), timestep=t, guidance=guidance, **cond,
            img_ids=ids(count, height // 2, width // 2, x_t.device, x_t.dtype),
            txt_ids=x_t.new_zeros(cond["encoder_hidden_states"].shape[1], 3), return_dict=False)[0]
        return self.unpack(prediction, height, width)

    def unpack(self, packed, height, width):
        """[N, h w / 4, 4 C] -> [N, C, h, w]."""
        return self.pipe._unpack_latents(packed, height, width, 1)

    def sample(self, *inputs, height, width, **more):
        packed = super().sample(*inputs, height=height, width=width, **more)
        scale = self.pipe.vae_scale_factor
        return self.unpack(packed, height // scale, width // scale)


FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL,
            "StableDiffusion3Pipeline": StableDiffusion3, "FluxPipeline": Flux}


def encode_by_both_clips(pipe, ids, ids_2):
    """The last hidden states but one [B, L, E] of a pipeline's two CLIPs, side by side; and what each gives beside."""
    outputs = [pipe.text_encoder(ids, output_hidden_states=True), pipe.text_encoder_2(ids_2, output_hidden_states=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs


def tokenize(tokenizers, prompts):
    """{name: ids [B, tokens] int64} of B prompts by a model's `tokenizers`; longer ones are cut.

    As in the pipelines, a word of textual inversion stands for all of its vectors.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    ids = {}
    for name, (tokenizer, length) in tokenizers.items():
        texts = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)
        ids[name] = tokenizer(texts, padding="max_length", max_length=length, truncation=True,
                              return_tensors="pt").input_ids
    return ids


def by_rows(function, rows, device, at_once, threads=1):
    """[function of some rows, ...], without gradients, `at_once` rows at a time.

    On a CPU one row at a time, each on one thread, `threads` of them side by side, which is no slower: so a
    row gives the same bits in any batch, by any number of threads. (A difference of errors times beta shows
    bits.) One thread for what tokenizes: tokenizers are not made for more.
    """
    function = torch.no_grad()(function)  # of this thread alone, were it around the pool
    if device.type != "cpu":
        return [function(rows[i:i + at_once]) for i in range(0, len(rows), at_once)]
    with concurrent.futures.ThreadPoolExecutor(threads, "cpu", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, (rows[i:i + 1] for i in range(len(rows)))))


def cast_for_autocast(network, dtype, device=None):
    """`network`, its frozen Linear and Conv weights cast in place, as autocast would in every forward.

    On their way to a device, one by one: neither the host nor the device has a whole network in float32 for that.

    All other parameters stay float32, as autocast leaves them, so that under autocast to `dtype` the numbers
    are the very same: a reference held whole in bf16 would move logits at step 0 by 1. So do those that train
    (an adapter's): in bf16 a learning rate of 1e-5 would not move them.
    """
    for module in network.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(device, dtype)
    return network.to(device)


def frozen_reference(network, dtype=torch.float32):
    """A copy of `network` that takes no gradient and, under autocast to `dtype`, computes the same numbers."""
    return cast_for_autocast(copy.deepcopy(network).eval().requires_grad_(False), dtype)


@contextlib.contextmanager
def disabled_adapter(lora_layers):
    """A network without its LoRA adapter, the reference of a policy that is one; on again on any way out.

    It is peft's own switch, less a search of the network and of what trains in it, which at SDXL takes 50 ms.

    lora_layers  the layers that hold it, see `add_lora`
    """
    for layer in lora_layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in lora_layers:
            layer._disable_adapters = False


def compile_blocks(network, names):
    """Compiles, in place, the modules of a network whose class has one of these names: no trace in its weights.

    A graph for every size of input: one for any would round otherwise than each of its own.
    """
    torch._dynamo.config.recompile_limit = 256  # of one class: sizes, by with and without gradient and adapter
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile(dynamic=False)


def digest_with_config(network):
    """A digest of a network's weights, by `fingerprint`, and of its configuration, less who saved it and where."""
    config = network.config if isinstance(network.config, dict) else network.config.to_dict()
    omitted = ("transformers_version", "dtype", "torch_dtype", "architectures")
    config = {key: str(value) for key, value in config.items() if key[0] != "_" and key not in omitted}
    return digest([fingerprint(network), config])


# Loading


def load_model(name, random_init=False, config=None):
    """The float32 model of a preset's name, a diffusers folder, a hub id or a checkpoint in one file.

    Its networks are frozen and on the CPU.

    random_init  sd15, sdxl: random weights of the published architecture; nothing is downloaded
    config       of a checkpoint in one file: a diffusers folder with its configuration and vocabularies
    raises       InputError where it cannot be read, is of no family of ours, or where a tensor or a vocabulary
                 is missing, for which the libraries would take any other
    """
    quiet_libraries()
    if random_init:
        return random_model(name)
    source, family = find_model(name, config)
    try:
        is_file = Path(source).is_file()
        pipe = load_single_file(source, family, config) if is_file else load_pipeline(source, family)
        return family(pipe)
    except Exception as error:
        raise InputError(f"--model {source} cannot be loaded: {brief(error)}")


def quiet_libraries():
    """No progress bars of loading; no report of every prompt that is cut, nor of threads in every forked reader."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def find_model(name, config=None):
    """(folder, hub id or file, class) of a model, by its model_index.json alone. InputError if it will not do."""
    if config and not Path(name).is_file():
        raise InputError(f"--config is for a --model in one file; {name} is none, or has its own")
    source = HUB_IDS.get(name, name)
    if name in EMBEDDED:
        source = str(importlib.import_module(EMBEDDED[name]).part("pipeline"))
    is_local, is_file = Path(source).is_dir(), Path(source).is_file()
    try:
        described_by = (config or published_config(source)) if is_file else source
        index = model_index(described_by)
        kind = index["_class_name"]
    except Exception as error:
        way_out = "; give its configuration by --config DIR, a diffusers folder of such a model" if is_file else ""
        raise InputError(f"--model {source} cannot be read as a diffusers pipeline: {brief(error)}{way_out}")
    if kind not in FAMILIES:
        raise InputError(f"--model {source} is a {kind}, none of {', '.join(FAMILIES)}")
    for part in FAMILIES[kind].parts:
        is_listed = part in index and index[part][0] is not None
        if not is_listed or is_local and not (Path(source) / part).is_dir():
            raise InputError(f"--model {source} lacks its {part}")
    return source, FAMILIES[kind]


def model_index(source):
    """The content of model_index.json of a diffusers folder or a hub id."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.load_config(source if Path(source).is_dir() else hub_id(source))


def load_pipeline(source, family):
    """The pipeline of a folder or hub id, every tensor and vocabulary of it there."""
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(source)
    networks = {name: None for name, part in index.items() if isinstance(part, list) and part[0] is None}
    for name in (family.denoiser_name, "vae", *family.text_encoders):
        if name in networks:
            continue  # a text encoder that was left out
        library, class_name = index[name]
        network_class = getattr(importlib.import_module(library), class_name)
        networks[name], info = load_network(network_class, source, name)
        if info["missing_keys"]:
            raise ValueError(f"its {name} lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    if "safety_checker" in index:
        networks |= {"safety_checker": None, "requires_safety_checker": False}
    return checked(DiffusionPipeline.from_pretrained(source, **networks))


def load_network(network_class, source, name):
    """(network in float32, what the library says of its loading), of the one variant that a folder has."""
    variants = set()
    for file in Path(source, name).glob("*model*"):  # NAME[.VARIANT][-00001-of-00002].(safetensors|bin)[.index.json]
        match = re.fullmatch(r"[^.]+?(\.\w+?)?(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?", file.name)
        if match:
            variants.add((match[1] or match[5] or "").removeprefix("."))
    variant = variants.pop() if len(variants) == 1 else None
    return network_class.from_pretrained(source, subfolder=name, dtype=torch.float32, variant=variant or None,
                                         output_loading_info=True)


@functools.cache  # it reads the whole file
def published_config(file):
    """The hub id of the published model whose architecture a checkpoint in one file has."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    return fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]


def load_single_file(file, family, config=None):
    """The pipeline of a checkpoint in the original names, every tensor of it there."""
    import diffusers

    pipeline_class = getattr(diffusers, {kind: name for name, kind in FAMILIES.items()}[family])
    no_checker = {"safety_checker": None} if "safety_checker" in pipeline_class._optional_components else {}
    try:
        pipe = pipeline_class.from_single_file(str(file), config=config, torch_dtype=torch.float32, **no_checker)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to("cpu")
    except NotImplementedError:  # torch's, of a tensor that the file has no values for
        raise ValueError("the file lacks a tensor of a network")
    return checked(pipe)


def checked(pipe):
    """A pipeline, if it has its vocabularies."""
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part and part.vocab_size <= len(set(part.all_special_ids)):
            raise ValueError(f"its {name} has no vocabulary")
    return pipe


def fuse_lora(model, source):
    """Adds the LoRA weights of a folder, a file or a hub id to the weights of a model's networks.

    An adapter that was trained with --init_lora stands on another one, which comes first.

    raises  InputError where they cannot be read, or a tensor of theirs fits nowhere: diffusers would go on
            without it
    """
    pipe, below = model.pipe, Path(source) / BELOW
    try:
        lower = json.loads(below.read_text())["init_lora"] if below.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{below} cannot be read: {error!r}")
    if lower:
        fuse_lora(model, lower)
    try:
        refuse_dora(source)
        if model.denoiser_name == "unet":
            weights, *_ = pipe.lora_state_dict(source, unet_config=model.denoiser.config)
        else:
            weights = pipe.lora_state_dict(source)
        pipe.load_lora_weights(source)
        loaded = set()
        for network in model.networks().values():
            for name, param in network.named_parameters():
                if "lora_" in name:
                    loaded.add(tensor_digest(param.detach()))
        homeless = [name for name, tensor in weights.items() if tensor_digest(tensor) not in loaded]
        if homeless:
            raise ValueError(f"{len(homeless)} of its {len(weights)} tensors fit nowhere: {homeless[0]} ...")
        pipe.fuse_lora(components=pipe._lora_loadable_modules)
        pipe.unload_lora_weights()
        model.init_lora = source
    except Exception as error:
        raise InputError(f"LoRA weights {source} cannot be loaded into this model: {brief(error)}")


def refuse_dora(source):
    """ValueError where a local file holds magnitudes, which diffusers leaves out of such LoRA weights."""
    path = Path(source)
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, "pt") as weights:
            if any("dora_scale" in name for name in weights.keys()):
                raise ValueError("they are DoRA's, whose magnitudes diffusers leaves out")


def tensor_digest(tensor):
    """Of the values, whatever the type and the shape that they are held in."""
    return digest(tensor.float().cpu().numpy().tobytes())


# Random weights at full size: for benchmarks, and to see that a run fits

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
