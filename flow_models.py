"""Flow-matching families: SD3/SD3.5, FLUX.1, Z-Image, FLUX.2 [klein], Qwen-Image. models.py has the contract of a family."""

import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from common import InputError
from loss import Flow
from models import Family

T5_TOKENS = 256  # tokens per prompt, the default of SD3's pipelines
QWEN_TOKENS = 512  # tokens per prompt, with those of the chat template: the default of the three pipelines that use Qwen


class StableDiffusion3(Family):
    """SD3 and SD3.5: a transformer, two CLIP text encoders, and T5, which may be left out."""

    denoiser_name = "transformer"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    blocks = ("JointTransformerBlock",)
    guidance = 4.5

    @staticmethod
    def widths(pipe):
        """FLUX.1 has the same: T5 reads the prompt as a sequence, the CLIPs give pooled embeddings."""
        texts = [part.config for name, part in pipe.components.items() if part and "text_encoder" in name]
        needed = {"joint_attention_dim": config.d_model for config in texts if hasattr(config, "d_model")}
        return needed | {"in_channels": pipe.vae.config.latent_channels}

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
            args.timestep_mean = args.timestep_scale = None  # they are not used, and would be refused when it resumes

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
        """The network expects t in (0, 1000)."""
        return network(x_t, timestep=1000 * t, **cond, return_dict=False)[0]


class Flux(StableDiffusion3):
    """FLUX.1: latents in packs of 2 x 2, a position for each pack, and in dev an embedding of the distilled guidance.

    train_guidance  the guidance that the network is told in training
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    guidance = 3.5
    train_guidance = 1.0

    @staticmethod
    def widths(pipe):
        return StableDiffusion3.widths(pipe) | {"in_channels": 4 * pipe.vae.config.latent_channels}

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


class QwenText(StableDiffusion3):
    """What the next three share: Qwen reads the prompt in a chat template. The network takes 2 x 2 latents as one token."""

    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    text_encoders = ("text_encoder",)
    guidance = 4.0
    enable_thinking = True  # an argument of the chat template

    def make_process(self):
        tokenizer = self.pipe.tokenizer
        if "<|im_start|>" not in tokenizer.get_vocab():
            raise ValueError("its tokenizer is not Qwen's")
        if not tokenizer.chat_template and not hasattr(self.pipe, "prompt_template_encode"):
            raise ValueError("its tokenizer has no chat template")
        return super().make_process()

    def latent_multiple(self):
        return 2

    def own_sample_size(self):
        return getattr(self.pipe, "default_sample_size", 1024 // self.pipe.vae_scale_factor)  # Z-Image: 1024 pixels

    def longest_tokenizer(self):
        """The template takes some of the tokens."""
        tokenizer = self.pipe.tokenizer
        template = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False,
                                                 add_generation_prompt=True, enable_thinking=self.enable_thinking)
        return tokenizer, QWEN_TOKENS - len(tokenizer(template).input_ids)


class ZImage(QwenText):
    """Z-Image: Qwen3 reads a prompt at its own length, and the network takes prompt and image as one sequence.

    The network counts its time from noise to image, and its output is x - eps.
    """

    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    blocks = ("ZImageTransformerBlock",)

    @staticmethod
    def widths(pipe):
        return {"in_channels": pipe.vae.config.latent_channels, "cap_feat_dim": pipe.text_encoder.config.hidden_size}

    def encode_prompt(self, prompts, device):
        embeds, _ = self.pipe.encode_prompt([*prompts], device, do_classifier_free_guidance=False)  # it changes its list
        mask = [prompt.new_ones(len(prompt)) for prompt in embeds]                      # B of [L]
        return {"prompt_embeds": pad_sequence(embeds, batch_first=True),                # [B, L, E]
                "prompt_embeds_mask": pad_sequence(mask, batch_first=True)}

    def sampling_embeds(self, prompts, dtype=torch.float32):
        embeds = super().sampling_embeds(prompts, dtype)
        return {name: without_padding(embeds[name], embeds[f"{name}_mask"])
                for name in ("prompt_embeds", "negative_prompt_embeds")}

    def conditioning(self, embeds, time_ids):
        prompts = without_padding(embeds["prompt_embeds"].float(), embeds["prompt_embeds_mask"])
        return {"cap_feats": prompts * time_ids.shape[1]}

    def predict(self, network, x_t, t, cond):
        frames = [*x_t.unsqueeze(2)]                                                    # N of [C, 1, h, w]
        predictions = network(frames, 1 - t, **cond, return_dict=False)[0]
        return -torch.stack(predictions).squeeze(2)


def without_padding(embeds, mask):
    """[B, L, E] -> B of [L of the prompt, E]."""
    return [prompt[:length] for prompt, length in zip(embeds, mask.sum(1).int().tolist())]


class Flux2Klein(QwenText):
    """FLUX.2 [klein]: three layers of Qwen3 beside each other, always padded to one length without a mask.

    The VAE's latents are normalised by a batch norm over packs of 2 x 2. Ours stay unpacked, [C, h, w].
    """

    vae_class = "AutoencoderKLFlux2"
    enable_thinking = False
    lora_targets = (rf".*\.({'|'.join(StableDiffusion3.lora_targets)}|to_qkv_mlp_proj)|"
                    r"single_transformer_blocks\.\d+\.attn\.to_out")
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")

    @staticmethod
    def widths(pipe):
        return {"in_channels": 4 * pipe.vae.config.latent_channels,
                "joint_attention_dim": 3 * pipe.text_encoder.config.hidden_size}

    def shift(self, resolution=None):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        side = (resolution or self.resolution()) // self.pipe.vae_scale_factor // 2
        return math.exp(compute_empirical_mu(side * side, num_steps=50))

    def latent_scale(self, latents):
        norm, (channels, height, width) = self.pipe.vae.bn, latents.shape[-3:]

        def tiled(values):  # [4 C] of a pack's places -> [C, h, w]
            return values.to(latents.device).view(channels, 2, 2).repeat(1, height // 2, width // 2)

        return tiled(norm.running_mean), tiled((norm.running_var + norm.eps).rsqrt())

    def encode_prompt(self, prompts, device):
        return {"prompt_embeds": self.pipe.encode_prompt(prompts, device)[0]}           # [B, 512, 3 E]

    def conditioning(self, embeds, time_ids):
        return {"encoder_hidden_states": embeds["prompt_embeds"].float().repeat(time_ids.shape[1], 1, 1)}

    def predict(self, network, x_t, t, cond):
        packed = self.pipe._patchify_latents(x_t)                                       # [N, 4 C, h / 2, w / 2]
        with x_t.device:  # so that the CPU need not wait for the GPU
            image_ids = self.pipe._prepare_latent_ids(packed)
            text_ids = self.pipe._prepare_text_ids(cond["encoder_hidden_states"])
        prediction = network(
            self.pipe._pack_latents(packed), timestep=t, **cond, img_ids=image_ids, txt_ids=text_ids,
            return_dict=False)[0]                                                       # [N, h w / 4, 4 C]
        return self.pipe._unpatchify_latents(prediction.mT.unflatten(2, packed.shape[2:]))

    def sample(self, *inputs, **more):
        return self.scale_latents(super().sample(*inputs, **more))


class QwenImage(QwenText):
    """Qwen-Image: Qwen2.5-VL reads a prompt at its own length, and the VAE is one of videos, which gets one frame."""

    vae_class, guidance_name, negative_prompt = "AutoencoderKLQwenImage", "true_cfg_scale", " "
    blocks = ("QwenImageTransformerBlock",)

    @staticmethod
    def widths(pipe):
        return {"in_channels": 4 * pipe.vae.config.z_dim,
                "joint_attention_dim": pipe.text_encoder.config.get_text_config().hidden_size}

    def latent_shape(self, resolution):
        side = resolution // self.pipe.vae_scale_factor
        return self.pipe.vae.config.z_dim, side, side

    def moments(self, vae, images):
        return [moment.squeeze(2) for moment in super().moments(vae, images.unsqueeze(2))]

    def decoded(self, latents):
        return self.pipe.vae.decode(latents.unsqueeze(2)).sample.squeeze(2)

    def latent_scale(self, latents):
        config = self.pipe.vae.config
        mean, std = (latents.new_tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean, 1 / std

    def longest_tokenizer(self):
        """The pipeline drops the first tokens of its template."""
        template = self.pipe.tokenizer(self.pipe.prompt_template_encode.format("")).input_ids
        return self.pipe.tokenizer, QWEN_TOKENS - len(template[self.pipe.prompt_template_encode_start_idx:])

    def encode_prompt(self, prompts, device):
        prompts = [prompt or self.negative_prompt for prompt in prompts]
        embeds, mask = self.pipe.encode_prompt(prompts, device, max_sequence_length=QWEN_TOKENS)
        mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask              # None: all have one length
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}                    # [B, L, E], [B, L]

    def conditioning(self, embeds, time_ids):
        """Lengths become multiples of 32, because --compile makes a graph for each."""
        prompts, images = embeds["prompt_embeds"].float(), time_ids.shape[1]
        more = -prompts.shape[1] % 32
        mask = F.pad(embeds["prompt_embeds_mask"], (0, more)).bool().to(prompts.device)
        return {"encoder_hidden_states": F.pad(prompts, (0, 0, 0, more)).repeat(images, 1, 1),
                "encoder_hidden_states_mask": mask.repeat(images, 1)}

    def predict(self, network, x_t, t, cond):
        count, channels, height, width = x_t.shape
        prediction = network(
            self.pipe._pack_latents(x_t, count, channels, height, width), timestep=t, **cond,
            img_shapes=[[(1, height // 2, width // 2)]] * count, return_dict=False)[0]
        return self.unpack(prediction, height, width)

    def unpack(self, packed, height, width):
        """[N, h w / 4, 4 C] -> [N, C, h, w]."""
        return self.pipe._unpack_latents(packed, height, width, 1).squeeze(2)

    def sample(self, prompts, generators, steps, guidance, dtype=torch.float32, *, height, width, **more):
        """Without a negative prompt the pipeline takes no guidance."""
        if prompts:
            more |= self.sampling_embeds(prompts, dtype)
        packed = super().sample(None, generators, steps, guidance, dtype, height=height, width=width, **more)
        scale = self.pipe.vae_scale_factor
        return self.unpack(packed, height // scale, width // scale)
