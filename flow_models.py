"""Flow-matching families: SD3 and SD3.5, and FLUX.1. The contract of a family is in models.py."""

import math

import torch

from common import InputError
from loss import Flow
from models import Family

T5_TOKENS = 256  # tokens per prompt, the default of SD3's pipelines


class StableDiffusion3(Family):
    """SD3 and SD3.5: a transformer, two CLIP text encoders, and T5, which may be left out."""

    denoiser_name = "transformer"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    blocks = ("JointTransformerBlock",)
    guidance = 4.5

    def make_process(self):
        """Logit-normal times, as SD3 was trained (section 5.3.1 of arXiv:2403.03206), with the sampler's shift."""
        config = self.pipe.scheduler.config
        if "shift" not in config:
            raise ValueError("its scheduler is not one of flow matching")
        return Flow("logit_normal", 0.0, 1.0, self.shift())

    def shift(self, resolution=None):
        """The shift for a size of images in pixels (default: the model's own), as its pipeline computes it."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # SD3's is the same

        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.shift
        tokens = ((resolution or self.resolution()) // self.pipe.vae_scale_factor // self.latent_multiple()) ** 2
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(config[key] for key in keys))
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def set_times(self, args):
        self.process.shift = self.shift(args.resolution)
        if args.train_guidance is not None and not self.denoiser.config.get("guidance_embeds"):
            raise InputError("--train_guidance: this model takes no guidance as input")
        if args.timestep_sampling == "uniform" and (args.timestep_mean, args.timestep_scale) != (None, None):
            raise InputError("--timestep_mean and --timestep_scale belong to --timestep_sampling logit_normal")
        for name, value in vars(self.process).items():
            typed = getattr(args, f"timestep_{name}")
            setattr(self.process, name, value if typed is None else typed)
            setattr(args, f"timestep_{name}", getattr(self.process, name))
        if args.timestep_sampling == "uniform":
            args.timestep_mean = args.timestep_scale = None  # they are not used, and would be refused when it goes on

    def latent_multiple(self):
        return self.denoiser.config.patch_size

    def resolution(self, wanted=None, for_training=True):
        """The pipeline does not pad, so sampling has the same limits. A table of positions ends at some size."""
        side, positions = super().resolution(wanted), self.denoiser.config.get("pos_embed_max_size")
        most = (positions or math.inf) * self.latent_multiple() * self.pipe.vae_scale_factor
        if side > most:
            raise InputError(f"--resolution {side}: this model has positions for {most} pixels at most")
        return side

    def longest_tokenizer(self):
        if self.pipe.text_encoder_3:
            return self.pipe.tokenizer_3, T5_TOKENS
        return super().longest_tokenizer()

    def encode_prompt(self, prompts, device):
        prompt_embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}        # [B, 77 + 256, E], [B, P]

    def conditioning(self, embeds, time_ids):
        images = time_ids.shape[1]
        return {"encoder_hidden_states": embeds["prompt_embeds"].float().repeat(images, 1, 1),
                "pooled_projections": embeds["pooled_prompt_embeds"].float().repeat(images, 1)}

    def predict(self, network, x_t, t, cond):
        """The network takes thousandths of t in (0, 1)."""
        return network(x_t, timestep=1000 * t, **cond, return_dict=False)[0]


class Flux(StableDiffusion3):
    """FLUX.1: latents in packs of 2 x 2, a position for each pack, and in dev an embedding of the distilled guidance.

    train_guidance  the guidance that the network is told in training
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    guidance = 3.5
    train_guidance = 1.0

    def schedule(self):
        return super().schedule() | {"train_guidance": self.train_guidance}

    def set_times(self, args):
        if self.denoiser.config.guidance_embeds:
            args.train_guidance = 1.0 if args.train_guidance is None else args.train_guidance
            self.train_guidance = args.train_guidance
        super().set_times(args)

    def latent_multiple(self):
        return 2

    def own_sample_size(self):
        return self.pipe.default_sample_size

    def longest_tokenizer(self):
        return self.pipe.tokenizer_2, 512  # T5's tokens, by the default of the pipeline

    def encode_prompt(self, prompts, device):
        prompt_embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=device)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}        # [B, 512, E], [B, P]

    def sampling_embeds(self, prompts, dtype=torch.float32):
        """The guidance is an input of the network, so sampling needs no embedding of the empty prompt."""
        return self.encode_prompts(prompts, dtype)

    def predict(self, network, x_t, t, cond):
        count, channels, height, width = x_t.shape
        pack, position_ids = self.pipe._pack_latents, self.pipe._prepare_latent_image_ids
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full_like(t, self.train_guidance)
        prediction = network(
            pack(x_t, count, channels, height, width), timestep=t, guidance=guidance, **cond,
            img_ids=position_ids(count, height // 2, width // 2, x_t.device, x_t.dtype),
            txt_ids=x_t.new_zeros(cond["encoder_hidden_states"].shape[1], 3), return_dict=False)[0]
        return self.unpack(prediction, height, width)

    def unpack(self, packed, height, width):
        """[N, h w / 4, 4 C] -> [N, C, h, w]."""
        return self.pipe._unpack_latents(packed, height, width, 1)

    def sample(self, *inputs, height, width, **more):
        packed = super().sample(*inputs, height=height, width=width, **more)
        scale = self.pipe.vae_scale_factor
        return self.unpack(packed, height // scale, width // scale)
