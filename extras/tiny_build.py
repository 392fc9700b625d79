"""Trains the networks of the embedded task, and writes them to extras/embedded/.

    python -m extras.tiny --build        about a quarter of an hour on two CPU cores

The files are float16. embedded.json says which versions and which machine made them, their digests, and what the judge
thinks of both models before and after rounding.
"""

import json
import math
import platform

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from common import digest
from extras import tiny, tiny_flow
from flow_models import T5_TOKENS

STEPS = {"vae": 800, "unet": 800, "flow": 2000, "clip": 250, "judge": 300}  # training steps of each network


def fit(name, steps, networks, lr, batch_loss):
    """Trains by AdamW with short memory: 50 steps of warm-up, linear decay over the last 40% of the steps."""
    params = [param for network in networks for param in network.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    for step in tqdm(range(steps), f"building the embedded task: {name:5}", mininterval=1):
        warmup, decay = (step + 1) / 50, (steps - step) / (0.4 * steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, warmup, decay)
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1)
        optimizer.step()


def train_vae(vae, pixels, steps):
    """Trains an AutoencoderKL on pixels [N, 3, 32, 32] in [-1, 1]. See tiny.make_vae."""
    vae.to(memory_format=tiny.LAST)

    def batch_loss():  # fixed noise and a pull to 0 replace the KL term, which starts slowly
        x = pixels[torch.randint(len(pixels), (8,))]
        posterior = vae.encode(x).latent_dist
        z = posterior.mean
        decoded = vae.decode(z + 0.1 * torch.randn_like(z)).sample
        pull = z.square() + (posterior.logvar - math.log(0.1 ** 2)).square()
        return F.mse_loss(decoded, x) + 1e-4 * pull.mean()

    fit("vae", steps, [vae], 2e-3, batch_loss)


@torch.no_grad()
def encode(vae, pixels):
    """The unscaled latents [N, 4, 8, 8] of pixels [N, 3, 32, 32]."""
    return torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])


def train_unet(pipe, latents, prompts, steps):
    """Trains the UNet and the text encoder of a pipeline on unscaled latents [N, 4, 8, 8] and their N prompts."""
    unet, text_encoder = pipe.unet.to(memory_format=tiny.LAST), pipe.text_encoder
    latents = latents * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids   # [N + 1, 16]

    def batch_loss():  # one prompt in ten is empty, for classifier-free guidance
        rows = torch.randint(len(prompts), (64,))
        t = torch.randint(1000, (64,))
        noise = torch.randn(64, 4, 8, 8)
        x_t = pipe.scheduler.add_noise(latents[rows], noise, t).contiguous(memory_format=tiny.LAST)
        is_empty = torch.rand(64) < 0.1
        prompt_embeds = text_encoder(ids[torch.where(is_empty, len(prompts), rows)])[0]         # [64, 16, 64]
        return F.mse_loss(unet(x_t, t, prompt_embeds).sample, noise)

    fit("unet", steps, [unet, text_encoder], 1e-3, batch_loss)


def train_flow(pipe, latents, prompts, steps):
    """Trains the transformer and the text encoders of a flow pipeline, on unscaled latents [N, 4, 8, 8] and N prompts."""
    networks = tiny.parts_of(pipe, tiny_flow.TRAINED)
    transformer, *text_encoders = networks.values()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids   # [N + 1, 16]

    def batch_loss():  # one prompt in ten is empty, for classifier-free guidance
        rows = torch.randint(len(prompts), (64,))
        t = torch.randn(64, 1, 1, 1).sigmoid()
        noise = torch.randn(64, 4, 8, 8)
        x_t = (1 - t) * latents[rows] + t * noise
        is_empty = torch.rand(64) < 0.1
        cond = encode_without_t5(text_encoders, ids[torch.where(is_empty, len(prompts), rows)])
        with AlikeTokens(T5_TOKENS):
            prediction = transformer(x_t, timestep=1000 * t.flatten(), **cond, return_dict=False)[0]
        return F.mse_loss(prediction, noise - latents[rows])

    fit("flow", steps, networks.values(), 2e-3, batch_loss)


def encode_without_t5(text_encoders, ids):
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


def train_clip(model, pixels, scenes, steps):
    """Trains an open_clip model on pixels [N, 3, 32, 32] in [-1, 1] and their N scenes."""
    pixels = normalize((pixels + 1) / 2, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    ids = open_clip.SimpleTokenizer(context_length=16)([tiny.caption(scene) for scene in scenes])
    scene_of = torch.tensor([tiny.SCENES.index(scene) for scene in scenes])

    def batch_loss():  # a batch may hold a caption twice; then both of its pictures are equally right
        rows = torch.randint(len(scenes), (128,))
        image, text, scale = model(pixels[rows], ids[rows])                                     # [128, 64] each
        target = (scene_of[rows][:, None] == scene_of[rows][None, :]).float()
        target /= target.sum(1, keepdim=True)
        logits = scale * image @ text.T                                                         # [128, 128]
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", steps, [model], 1e-3, batch_loss)


def train_judge(network, heads, pixels, targets, steps):
    """Trains a classifier of pixels [N, 3, 32, 32] with several heads; targets [N, heads] int64."""
    def batch_loss():  # with some pixel noise, because it will judge decoded samples
        rows = torch.randint(len(pixels), (64,))
        noise = torch.randn(64, 3, tiny.SIZE, tiny.SIZE) * 0.15 * torch.rand(64, 1, 1, 1)
        logits = network(pixels[rows] + noise).split(heads, dim=1)
        return sum(F.cross_entropy(head, targets[rows, i]) for i, head in enumerate(logits))

    fit("judge", steps, [network], 2e-3, batch_loss)


def build(folder=tiny.FILES, steps=STEPS, count=8192, samples=96):
    """Trains all networks and writes them with embedded.json to a folder.

    steps    training steps of each network
    count    how many drawings they train on
    samples  how many samples of each model the judge rates
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = tiny.judge_network(tiny.HEADS)
    pixels, _, targets = tiny.drawings(count, seed=3, sketches=0.5)
    train_judge(network, tiny.HEADS, pixels, targets, steps["judge"])
    tiny.pack({"judge": network}, folder / "judge.safetensors")

    torch.manual_seed(0)
    model = tiny.make_clip()
    pixels, scenes, _ = tiny.drawings(count, seed=2, sketches=0.5)
    train_clip(model, pixels, scenes, steps["clip"])
    tiny.pack({"clip": model}, folder / "clip.safetensors")

    torch.manual_seed(0)
    pixels, scenes, _ = tiny.drawings(count, seed=1, sketches=1 / 6)
    prompts = [tiny.caption(scene) for scene in scenes]
    vae = tiny.make_vae()
    train_vae(vae, pixels, steps["vae"])
    latents = encode(vae, pixels)
    numbers = {"shift_factor": latents.mean().item(), "scaling_factor": 1 / latents.std().item()}
    tiny.pack({"vae": vae}, folder / "vae.safetensors", numbers)

    # Both denoisers train on the latents of the rounded VAE.
    vae = tiny.embedded_vae(folder)
    latents = encode(vae, pixels)
    pipe = tiny.make_pipeline(vae)
    train_unet(pipe, latents, prompts, steps["unet"])
    tiny.pack(tiny.parts_of(pipe, tiny.TRAINED), folder / "tiny.safetensors")
    rounded = tiny.embedded_pipeline(folder)
    judged = {"tiny": tiny.measure(pipe, samples), "tiny, rounded": tiny.measure(rounded, samples)}

    torch.manual_seed(0)
    flow = tiny_flow.make_pipeline(tiny.embedded_vae(folder, is_shifted=True))
    train_flow(flow, latents, prompts, steps["flow"])
    tiny.pack(tiny.parts_of(flow, tiny_flow.TRAINED), folder / "tiny-flow.safetensors")
    rounded_flow = tiny_flow.embedded_pipeline(folder)
    judged |= {"tiny-flow": tiny.measure(flow, samples), "tiny-flow, rounded": tiny.measure(rounded_flow, samples)}
    models = {"clip": {"clip": tiny.embedded_clip(folder)},
              "tiny": tiny.parts_of(rounded, ("vae", *tiny.TRAINED)),
              "tiny-flow": tiny.parts_of(rounded_flow, ("vae", *tiny_flow.TRAINED))}
    write_note(folder, steps, judged, models)


def write_note(folder, steps, judged, models):
    """embedded.json. models: {name: {name of a part: network}}"""
    files = sorted(folder.glob("*.safetensors"))
    note = {
        "command": "python -m extras.tiny --build",
        "steps": steps,
        "versions": {"python": platform.python_version()} | {
            package.__name__: package.__version__ for package in (torch, open_clip)},
        "machine": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "digests": {file.name: digest(file.read_bytes()) for file in files},
        "models": {name: tiny.networks_digest(networks) for name, networks in models.items()},
        "judged": judged,
    }
    text = json.dumps(note, indent=1)
    (folder / "embedded.json").write_text(text + "\n", encoding="utf-8")
    print(text)
