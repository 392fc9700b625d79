"""Model families: how a family's network is conditioned, called and sampled. The training step knows no family.

    model = load_model("sdxl")                      in loading.py: a preset's name, a diffusers folder or a hub id
    model.predict(model.denoiser, x_t, t, cond)     [N, C, h, w]

This file has the contract of a family, SD 1.x/2.x and SDXL. flow_models.py has the others.
"""

import copy
import functools
import inspect

import numpy as np
import torch

from common import InputError
from distributed import to_device
from loss import DDPM


class Family:
    """The contract of a family: all members that train.py and the other files use.

    A new family is one subclass (of StableDiffusion3 for flow matching) and one row of FAMILIES in loading.py. For
    adapters its pipeline needs save_lora_weights and load_lora_weights. It must give

        denoiser_name               the part of the pipeline that trains: "unet" or "transformer"
        parts                       names of the pipeline's parts that it cannot do without
        text_encoders               names of the text encoders among them; a part that is null is skipped
        lora_targets                names of the layers that an adapter trains, or a regular expression for them
        blocks                      class names of the repeated blocks that --compile compiles
        guidance                    the usual classifier-free guidance of its samples
        make_process()              the DDPM or Flow of the pipeline's schedule; ValueError if it is of another kind
        encode_prompt(prompts, device)
                                    {"prompt_embeds": [B, L, E], ...} of B prompts, by the pipeline's own encode_prompt.
                                    Names are those of the pipeline's arguments; a cache stores them under these names.
                                    If L is the longest prompt's, "prompt_embeds_mask" [B, L] is 1 at a prompt's tokens
        conditioning(embeds, time_ids)
                                    what `predict` takes as cond: for B prompts with S images each, the rows of all
                                    first images, then of all second ones. embeds: as above; time_ids: [B, S, 6] float32
        predict(network, x_t, t, cond)
                                    the prediction [N, C, h, w] for x_t [N, C, h, w] at t [N]

    It may change

        optimizer                   the default of --optimizer
        widths(pipe)                {name in the denoiser's configuration: the number that its other parts need there}
        vae_class                   the name of the VAE's class
        guidance_name, negative_prompt   the pipeline's argument for the guidance; the prompt that it leads away from
        latent_shape(resolution)    (C, h, w)
        latent_multiple()           what the side of a latent must be a multiple of
        own_sample_size()           the side of the model's own latents, or None
        longest_tokenizer()         (tokenizer, tokens) of the text encoder that reads most of a prompt
        schedule()                  what the process depends on, in plain numbers and words, for digests
        set_times(args)             applies --timestep_* and --train_guidance, and writes the values used into args
        sampling_embeds(prompts)    what the pipeline takes in the place of prompts
        latent_scale(latents)       (shift, factor): the denoiser's latents are (latents - shift) * factor
        moments(), decoded()        the calls of the VAE
        sample(...)                 scaled latents of prompts
        check_scheduler()           InputError if the pipeline's scheduler would sample by another schedule

    and it inherits resolution(), encode_prompts(), encode_images(), encoding_vae, scale_latents(), decode(),
    networks() -> {name: network}, num_parameters and is_toy.

    pipe       the diffusers pipeline, float32
    denoiser   the network in it that trains
    process    the diffusion process
    vae_dtype  the precision in which images are encoded
    init_lora  where the LoRA weights came from that were fused in last, or None; `fused`: {tensor: digest} of each
    """

    optimizer, vae_class, guidance_name, negative_prompt = "adamw", "AutoencoderKL", "guidance_scale", ""
    widths = staticmethod(lambda pipe: {})

    def __init__(self, pipe):
        self.pipe, self.init_lora, self.fused, self.vae_dtype = pipe, None, [], torch.float32
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.process = self.make_process()
        self.num_parameters = sum(parameter.numel() for parameter in self.denoiser.parameters())
        self.is_toy = self.num_parameters < 1e8  # the embedded CLIP is good enough for a toy
        self.guidance = 3.0 if self.is_toy else self.guidance
        pipe.set_progress_bar_config(disable=True)
        for network in self.networks().values():
            network.eval().requires_grad_(False)  # with dropout the policy would differ from its reference

    def networks(self):
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}

    # Sizes and timesteps

    def resolution(self, wanted=None, for_training=True):
        """The side of the images in pixels: `wanted`, or the model's own. InputError if the model cannot do it."""
        multiple = self.pipe.vae_scale_factor
        if for_training:  # a pipeline pads odd latents inside the network; in training we do not
            multiple *= self.latent_multiple()
        if wanted and wanted % multiple:
            raise InputError(f"--resolution {wanted}: this model needs a multiple of {multiple}")
        own = self.own_sample_size()
        if not wanted and own is None:
            raise InputError("the model does not say the size of its images; pass --resolution")
        return wanted or int(np.min(own)) * self.pipe.vae_scale_factor

    def own_sample_size(self):
        return self.denoiser.config.get("sample_size")

    def latent_shape(self, resolution):
        side = resolution // self.pipe.vae_scale_factor
        return self.pipe.vae.config.latent_channels, side, side

    def latent_multiple(self):
        return 1

    def schedule(self):
        process = vars(self.process).items()
        return {name: value.tolist() if torch.is_tensor(value) else value for name, value in process}

    def set_times(self, args):
        for name in ("timestep_sampling", "timestep_mean", "timestep_scale", "timestep_shift", "train_guidance"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} is for flow-matching models; this model's family does not take it")

    def check_scheduler(self):
        """A family whose pipeline takes many schedulers refuses the wrong ones here."""

    # Prompts

    def longest_tokenizer(self):
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    @torch.no_grad()
    def encode_prompts(self, prompts, dtype=torch.float32):
        """What `encode_prompt` gives for B prompts, float32, under autocast to `dtype`. Long prompts are cut.

        An empty prompt becomes what the pipeline itself uses as unconditional: zeros if SDXL's
        force_zeros_for_empty_prompt says so (Diffusion-DPO trains on the encoded "" there), else the encoded "".
        """
        device = self.pipe.text_encoder.device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            embeds = self.encode_prompt(prompts, device)
        embeds = {name: value.float() for name, value in embeds.items()}
        if self.pipe.config.get("force_zeros_for_empty_prompt", False):
            is_empty = torch.tensor([not prompt for prompt in prompts], device=device)
            for value in embeds.values():
                value[is_empty] = 0
        return embeds

    def sampling_embeds(self, prompts, dtype=torch.float32):
        """The pipeline's arguments in the place of N prompts: their embeddings, and the negative one for its guidance."""
        embeds = self.encode_prompts(prompts, dtype)
        for name, value in self.encode_prompts([self.negative_prompt], dtype).items():
            embeds[f"negative_{name}"] = value.expand(len(prompts), *value.shape[1:])
        return embeds

    # Images

    @torch.no_grad()
    def encode_images(self, pixels):
        """Mean and std [B, S, C, h, w] float32 of the VAE's posterior of pixels [B, S, 3, H, W] uint8, not yet scaled.

        The VAE runs in `vae_dtype`, which is never fp16: SDXL's VAE overflows there. A few pairs are encoded at a
        time: at 1024 px one activation of 16 pairs would have 2^32 elements.
        """
        vae, outputs = self.encoding_vae, []
        for part in pixels.split(max(1, 2 ** 21 // pixels[0, 0, 0].numel())):
            images = to_device(part.flatten(0, 1), vae.device).float() / 127.5 - 1          # in [-1, 1]
            outputs.append([moment.float() for moment in self.moments(vae, images.to(vae.dtype))])
        mean, std = (torch.cat(output).unflatten(0, pixels.shape[:2]) for output in zip(*outputs))
        return mean, std

    @functools.cached_property
    def encoding_vae(self):
        """The VAE in `vae_dtype`: a copy if that is not float32, because samples are decoded in float32."""
        vae = self.pipe.vae
        if vae.device.type == "cpu" and all(param.ndim < 5 for param in vae.parameters()):
            vae.to(memory_format=torch.channels_last)  # 1.5 times as fast there; on an H100 it was slower
        return vae if self.vae_dtype == torch.float32 else copy.deepcopy(vae).to(self.vae_dtype)

    def moments(self, vae, images):
        """Mean and std [N, C, h, w] of the VAE's posterior of images [N, 3, H, W] in [-1, 1]."""
        posterior = vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decoded(self, latents):
        return self.pipe.vae.decode(latents).sample

    def latent_scale(self, latents):
        config = self.pipe.vae.config
        return config.get("shift_factor") or 0, config.scaling_factor

    def scale_latents(self, latents):
        shift, factor = self.latent_scale(latents)
        return (latents - shift) * factor

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents [N, C, h, w] -> pictures [N, 3, H, W] float32 in [0, 1], on the CPU."""
        shift, factor = self.latent_scale(latents)
        latents = latents.float() / factor + shift
        at_once = max(1, 2 ** 14 // latents[0, 0].numel())
        pictures = [self.decoded(part).cpu() for part in latents.split(at_once)]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(self, prompts, generators, steps, guidance, dtype=torch.float32, pipe=None, **more):
        """Scaled latents [N, C, h, w] of N prompts, each from the noise of its own CPU generator.

        prompts  N strings; or None, with `sampling_embeds` among `more`
        pipe     another pipeline on the same networks, such as image-to-image
        more     arguments of the pipeline: height and width in pixels; image and strength for image-to-image
        """
        pipe = pipe or self.pipe
        with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
            return pipe(prompt=prompts, num_inference_steps=steps, generator=generators, output_type="latent",
                        **{self.guidance_name: guidance}, **more).images.float()


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, epsilon- or v-prediction."""

    denoiser_name = "unet"
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    text_encoders = ("text_encoder",)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")  # nearly all of the arithmetic
    guidance = 7.5
    schedule_keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                     "rescale_betas_zero_snr")

    def make_process(self):
        from diffusers import DDPMScheduler

        config = self.pipe.scheduler.config
        if "beta_schedule" not in config or self.pipe.vae.config.get("latents_mean") is not None:
            raise ValueError("its noise schedule or its latents are not those of Stable Diffusion or SDXL")
        if self.denoiser.config.get("time_cond_proj_dim"):
            raise ValueError("its UNet takes an embedding of the guidance, as latent consistency models do")
        if getattr(self.pipe.text_encoder.config, "use_attention_mask", False):
            raise ValueError("its text encoder needs an attention mask, as AltDiffusion's does")
        scheduler = DDPMScheduler.from_config(config)
        self.schedule_config = {key: scheduler.config[key] for key in self.schedule_keys}
        return DDPM(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @staticmethod
    def widths(pipe):
        texts = [part.config.hidden_size for name, part in pipe.components.items() if part and "text_encoder" in name]
        channels = dict.fromkeys(("in_channels", "out_channels"), pipe.vae.config.latent_channels)
        return channels | {"cross_attention_dim": sum(texts)}

    def schedule(self):
        return self.schedule_config  # the numbers that follow from it are rounded in another way on another processor

    def latent_multiple(self):
        return 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def encode_prompt(self, prompts, device):
        prompt_embeds, _ = self.pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}

    def conditioning(self, embeds, time_ids):
        images = time_ids.shape[1]
        return {"encoder_hidden_states": embeds["prompt_embeds"].float().repeat(images, 1, 1)}

    def predict(self, network, x_t, t, cond):
        return network(x_t, t, **cond, return_dict=False)[0]

    def check_scheduler(self):
        """InputError if the pipeline's scheduler does not know a key of the schedule that the model has."""
        scheduler = self.pipe.scheduler
        known = inspect.signature(type(scheduler).__init__).parameters
        for key in self.schedule_keys:
            if scheduler.config.get(key) and key not in known:
                raise InputError(f"{type(scheduler).__name__} ignores the model's {key}, so it would sample by another "
                                 "noise schedule. Pass evaluate.py --scheduler EulerDiscreteScheduler, or train.py "
                                 "--sample_every 0")


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, pooled embeddings, and each image's own size and crop."""

    parts = StableDiffusion.parts + ("text_encoder_2", "tokenizer_2")
    text_encoders = ("text_encoder", "text_encoder_2")
    optimizer = "adafactor"
    guidance = 5.0

    def encode_prompt(self, prompts, device):
        prompt_embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, device=device,
                                                              do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}        # [B, L, E], [B, P]

    def conditioning(self, embeds, time_ids):
        """time_ids stay float32: bf16 would round 1023 to 1024."""
        images = time_ids.shape[1]
        pooled = embeds["pooled_prompt_embeds"].float()
        added = {"text_embeds": pooled.repeat(images, 1), "time_ids": time_ids.transpose(0, 1).flatten(0, 1)}
        return super().conditioning(embeds, time_ids) | {"added_cond_kwargs": added}


def cast_for_autocast(network, dtype, device=None):
    """Casts a network's frozen Linear and Conv weights in place, as autocast would in every forward.

    All other parameters stay float32, as autocast leaves them. So under autocast to `dtype` the numbers are the same.
    A reference held whole in bf16 would move logits at step 0 by 1. Trainable weights stay float32, too: in bf16 a
    learning rate of 1e-5 would not move them. Layers move to the device one by one, so neither the host nor
    the device holds a second copy of the network in float32.
    """
    embedded = {module.weight for module in network.modules() if isinstance(module, torch.nn.Embedding)}
    for module in network.modules():
        is_cast = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and module.weight not in embedded
        if is_cast and not module.weight.requires_grad:
            module.to(device, dtype)
    return network.to(device)


def frozen_reference(network, dtype=torch.float32):
    """A copy of `network` that takes no gradient and computes the same numbers under autocast to `dtype`."""
    return cast_for_autocast(copy.deepcopy(network).eval().requires_grad_(False), dtype)
