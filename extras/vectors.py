"""Vectors, the first task of the laboratory: conditional diffusion of 12 numbers.

The models are so small that a hundred train at once, in seconds. A vector stands for a picture:

    content   6 coordinates, near those of the prompt
    style     1 coordinate: near 1.5 in the wished style, near -1.5 in the other
    nuisance  5 coordinates, standard normal; nobody prefers any, so they should stay as they are

The base model has seen the wished style once in six. The policy is a multilayer perceptron that predicts the noise. The
two vectors of a pair differ in style, and in what the regime says. Losses, weights and the diffusion process are those
of loss.py and data.py. A run draws 240 samples:

    style     the share near the wished style
    content   the share near the prompt's content
    right     the share with both
    distance  Frechet distance to wished vectors of the same prompts; lost diversity costs, too
"""

import functools
import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from tqdm import tqdm

from common import atomic_write
from data import cross_pair_weights
from extras.style import frechet
from loss import DDPM, LOSSES, wants

CONTENT, NUISANCE = 6, 5
DIMENSIONS = CONTENT + 1 + NUISANCE
HIDDEN = 64
BASE_STEPS = 4000
STEPS, BATCH, GROUP, WARMUP = 120, 16, 8, 10
SFT_STEPS, SFT_RATE = 40, 4e-4  # the SFT stage of the arms "SFT, then ..."
SIDE_BY_SIDE = 96  # settings in one call of run(): models in one batched matrix product
SAMPLES, SAMPLE_STEPS = 240, 25
TIMESTEPS = 100
PROCESS = DDPM(torch.cumprod(1 - torch.linspace(1e-3, 0.08, TIMESTEPS), dim=0))

REGIMES = ("clean", "24 pairs", "30% swapped", "other content", "independent")
TUNING_SEEDS, REPORT_SEEDS = range(20, 23), range(16)
SEEDS = [*REPORT_SEEDS, *TUNING_SEEDS]
CHOSEN_BY = ("right", "distance")
RATES = tuple(3e-5 * 2 ** k for k in range(5))
BETAS = tuple(2.0 ** k for k in range(8))
SFT_RATES = tuple(1e-5 * 2 ** (k / 4) for k in range(len(RATES) * len(BETAS)))  # as many settings as other arms
FURTHER = 2  # values by which the grid grows at an edge


def make_prompts():
    """[32, 6]: four clusters of eight. Their distances are like those of captions about four subjects."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * F.normalize(torch.randn(4, CONTENT, generator=generator), dim=1)
    around = 0.7 * torch.randn(4, 8, CONTENT, generator=generator)
    return (centers[:, None] + around).flatten(0, 1)


PROMPTS = make_prompts()
HALVES = {  # each cluster has six prompts to train on, one to choose settings by and one to report
    "train": torch.tensor([i for i in range(32) if i % 8 < 6]),
    "tuning": torch.tensor([i for i in range(32) if i % 8 == 6]),
    "report": torch.tensor([i for i in range(32) if i % 8 == 7]),
}


def draw(prompt, style, generator):
    """Vectors [n, 12] of prompts [n] int64; style is 1.0 (wished) or -1.0, a number or [n]."""
    n = len(prompt)
    content = PROMPTS[prompt] + 0.25 * torch.randn(n, CONTENT, generator=generator)
    style = 1.5 * style + 0.25 * torch.randn(n, generator=generator)
    nuisance = torch.randn(n, NUISANCE, generator=generator)
    return torch.cat([content, style[:, None], nuisance], dim=1)


def draw_pairs(regime, seed):
    """The pairs of a regime for one seed: prompts [n] int64, winners [n, 12], losers [n, 12]."""
    generator = torch.Generator().manual_seed(100 + seed)
    train = HALVES["train"]
    if regime == "24 pairs":
        prompt = train[torch.randperm(len(train), generator=generator)]
    else:
        prompt = train[torch.randint(len(train), (600,), generator=generator)]
    n = len(prompt)
    winner = draw(prompt, 1.0, generator)
    loser = draw(prompt, -1.0, generator)
    if regime != "independent":  # winner and loser share content and nuisance and differ in style alone
        style = loser[:, CONTENT].clone()
        loser = winner.clone()
        loser[:, CONTENT] = style
    if regime == "30% swapped":
        is_swapped = (torch.rand(n, generator=generator) < 0.3)[:, None]
        winner, loser = torch.where(is_swapped, loser, winner), torch.where(is_swapped, winner, loser)
    if regime == "other content":  # half of the losers have the wished style, but another cluster's content
        is_other = (torch.rand(n, generator=generator) < 0.5)[:, None]
        loser = torch.where(is_other, draw((prompt + 16) % 32, 1.0, generator), loser)
    return prompt, winner, loser


# The model


def inputs(x_t, t, prompt):
    """The network's inputs [..., 34]: the noisy vector, 16 waves of the timestep, the prompt's content."""
    frequency = torch.logspace(0, 2, 8)
    angle = 3 * frequency * t[..., None] / TIMESTEPS
    return torch.cat([x_t, angle.sin(), angle.cos(), PROMPTS[prompt]], dim=-1)


def init(generator):
    """Weights [1, in, out] and biases [1, 1, out] of four layers. The first axis counts models."""
    widths = [DIMENSIONS + 16 + CONTENT, HIDDEN, HIDDEN, HIDDEN, DIMENSIONS]
    params = []
    for n_in, n_out in zip(widths, widths[1:]):
        params.append(torch.randn(1, n_in, n_out, generator=generator) / n_in ** 0.5)
        params.append(torch.zeros(1, 1, n_out))
    return params


def predict(params, seen):
    """The noise [R, N, 12] that R models predict from their inputs [R, N, 34]."""
    h = seen
    for k in range(0, len(params), 2):
        h = torch.baddbmm(params[k + 1], h, params[k])
        if k + 2 < len(params):
            h = F.silu(h)
    return h


def diffuse(x, eps, t):
    """x_t [n, 12] of vectors x and noise eps [n, 12] at t [n]."""
    x_t, _ = PROCESS.diffuse(x[:, :, None, None], eps[:, :, None, None], t)
    return x_t[:, :, 0, 0]


def prepare(out):
    """Trains one base model per seed, all at once, and keeps them in the folder `out`.

    The optimizer is Adam; the rate decays linearly over the second half of the steps. Each seed has its own initial
    weights and its own data, so the results do not rest on one model.
    """
    file = out / "base.safetensors"
    if file.exists():
        return
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    params = [torch.cat(of_seeds).requires_grad_() for of_seeds in zip(*map(init, generators))]
    optimizer = torch.optim.Adam(params)
    n = 128  # vectors per model and step
    for step in tqdm(range(BASE_STEPS), "base models"):
        warmup, decay = (step + 1) / 50, (BASE_STEPS - step) / (0.5 * BASE_STEPS)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, warmup, decay)
        seen, noise = [], []
        for generator in generators:
            prompt = torch.randint(len(PROMPTS), (n,), generator=generator)
            style = torch.where(torch.rand(n, generator=generator) < 1 / 6, 1.0, -1.0)
            x = draw(prompt, style, generator)
            t = torch.randint(TIMESTEPS, (n,), generator=generator)
            eps = torch.randn(n, DIMENSIONS, generator=generator)
            seen.append(inputs(diffuse(x, eps, t), t, prompt))
            noise.append(eps)
        loss = errors(params, torch.stack(seen), torch.stack(noise)).mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out.mkdir(parents=True, exist_ok=True)
    tensors = {str(i): param.detach() for i, param in enumerate(params)}
    atomic_write(file, save(tensors))


@functools.cache
def base_models(out):
    """The weights of all base models, a list of [seeds, ...], in the order of SEEDS."""
    tensors = load_file(out / "base.safetensors")
    return [tensors[str(i)] for i in range(len(tensors))]


# Training


def similar(x):
    """Stands for the CLIP embedding of an image. It shows content more than style, and style more than nuisance."""
    return x * torch.tensor([1.0] * CONTENT + [0.7] + [0.5] * NUISANCE)


def stream(regime, seed, options):
    """The batches of a run with one seed, {name: [steps, ...]}; winners come first, then losers.

    seen     [steps, 2 B, 34]  the network's inputs
    eps      [steps, 2 B, 12]  the noise
    weights  [steps, B / group, group, group], if `options` has a tau
    """
    prompt, winner, loser = draw_pairs(regime, seed)
    n = len(prompt)
    generator = torch.Generator().manual_seed(1000 + seed)
    if n < STEPS:  # 24 pairs: a batch holds none of them twice
        rows = torch.stack([torch.randperm(n, generator=generator)[:BATCH] for _ in range(STEPS)])
    else:
        rows = torch.randint(n, (STEPS, BATCH), generator=generator)
    t = torch.randint(TIMESTEPS, (STEPS, BATCH), generator=generator).repeat(1, 2)
    eps = torch.randn(STEPS, BATCH, DIMENSIONS, generator=generator).repeat(1, 2, 1)
    x = torch.cat([winner[rows], loser[rows]], dim=1)                                   # [steps, 2 B, 12]
    x_t = diffuse(x.flatten(0, 1), eps.flatten(0, 1), t.flatten()).view_as(x)
    batch = {"seen": inputs(x_t, t, prompt[rows].repeat(1, 2)), "eps": eps}
    if "tau" in options:
        ids = torch.arange(2 * GROUP).view(2, GROUP).T  # all images of a group are different ones
        weights = []
        for group in rows.view(-1, GROUP):
            weights.append(cross_pair_weights(PROMPTS[prompt[group]], similar(winner[group]), similar(loser[group]),
                                              options["tau"], options.get("similarity", "both"), ids))
        batch["weights"] = torch.stack(weights).view(STEPS, -1, GROUP, GROUP)
    return batch


def errors(params, seen, eps):
    """The errors [R, N] of R models: inputs `seen` [R, N, 34], target eps [R, N, 12]."""
    return (predict(params, seen) - eps).square().mean(dim=-1)


def losses(loss, options, values):
    """The loss of each of R runs, [R]. It is called per group of 8 if it takes weights, else per batch.

    loss     the name of a function in LOSSES
    options  {name: constant} for all runs, as weight_position
    values   {name: [R, ...]}: errors, weights and beta [R]
    """
    loss_fn = LOSSES[loss]
    names = wants(loss_fn).keys()
    groups = BATCH // GROUP if "weights" in names else 1
    of_groups = {}
    for name in names & values.keys():
        value = values[name]
        if name == "beta":
            of_groups[name] = value.repeat_interleave(groups)                           # [R groups]
        elif name == "weights":
            of_groups[name] = value.flatten(0, 1)                                       # [R groups, group, group]
        else:
            of_groups[name] = value.reshape(len(value) * groups, -1)                    # [R groups, group]
    constants = {name: options[name] for name in names & options.keys()}

    def loss_of_group(group):
        return loss_fn(**group, **constants)[0]

    return torch.vmap(loss_of_group)(of_groups).view(-1, groups).mean(dim=1)


def train(loss, options, start, batch, rates, betas, steps):
    """Trains R models at once by Adam, from the weights `start` [R, ...], with rates [R] and betas [R].

    batch  {name: [R, steps, ...]}: the streams of the runs, and ref_err [R, steps, 2 B] unless the loss is SFT
    """
    params = [param.clone().requires_grad_() for param in start]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in start]  # means of grad and of its square
    for step in range(steps):
        err = errors(params, batch["seen"][:, step], batch["eps"][:, step])             # [R, 2 B]
        values = {"beta": betas}
        values |= zip(("err_w", "err_l"), err.chunk(2, dim=1))
        if "ref_err" in batch:
            values |= zip(("ref_err_w", "ref_err_l"), batch["ref_err"][:, step].chunk(2, dim=1))
        if "weights" in batch:
            values["weights"] = batch["weights"][:, step]
        grads = torch.autograd.grad(losses(loss, options, values).sum(), params)

        # Adam with its usual constants. torch's has one rate for all parameters; here every run has its own.
        rate = rates.view(-1, 1, 1) * min(1, (step + 1) / WARMUP)
        correction_mean = 1 - 0.9 ** (step + 1)
        correction_square = 1 - 0.999 ** (step + 1)
        with torch.no_grad():
            for param, grad, (mean, square) in zip(params, grads, moments):
                mean.lerp_(grad, 0.1)
                square.lerp_(grad.square(), 0.001)
                scale = (square / correction_square).sqrt() + 1e-8
                param -= rate * (mean / correction_mean) / scale
    return [param.detach() for param in params]


@torch.no_grad()
def sample(params, prompt, seed=7):
    """DDIM samples [R, n, 12] of R models for prompts [n]. All models start from the same noise."""
    generator = torch.Generator().manual_seed(seed)
    models, n = len(params[0]), len(prompt)
    x = torch.randn(n, DIMENSIONS, generator=generator).expand(models, -1, -1)
    times = torch.linspace(TIMESTEPS - 1, 0, SAMPLE_STEPS).round().long()
    alphas = PROCESS.alphas_cumprod[times]
    alphas_next = torch.cat([alphas[1:], torch.ones(1)])
    for t, a_t, a_next in zip(times, alphas, alphas_next):
        seen = inputs(x, t.expand(models, n), prompt.expand(models, n))
        eps = predict(params, seen)
        clean = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
        x = a_next.sqrt() * clean + (1 - a_next).sqrt() * eps
    return x


def asked(half):
    """The prompts [240] of the samples: each prompt of a half equally often."""
    return HALVES[half].repeat(SAMPLES // len(HALVES[half]))


def measure(samples, half):
    """[{column: number}] of R models' samples [R, 240, 12] for the prompts `asked(half)`."""
    has_style = (samples[..., CONTENT] - 1.5).abs() < 0.8
    has_content = (samples[..., :CONTENT] - PROMPTS[asked(half)]).norm(dim=-1) < 1.1
    wished = draw(HALVES[half].repeat(1000), 1.0, torch.Generator().manual_seed(8))
    rows = []
    for vectors, style, content in zip(samples, has_style, has_content):
        distance = frechet(vectors, wished) if vectors.isfinite().all() else math.inf
        rows.append({"right": share(style & content), "style": share(style), "content": share(content),
                     "distance": distance})
    return rows


def share(flags):
    return flags.sum().item() / len(flags)


def run(arm, regime, settings, half, out):
    """[{column: number}], one per setting (rate, beta, seed), measured on the prompts of a half."""
    rates, betas, seeds = zip(*settings)
    rates, betas = torch.tensor(rates), torch.tensor(betas) * arm.pull                  # [R]
    run_seeds = sorted(set(seeds))
    start = [param[[SEEDS.index(seed) for seed in run_seeds]] for param in base_models(out)]
    of_run = torch.tensor([run_seeds.index(seed) for seed in seeds])  # setting -> row of `start`
    if arm.loss == "base":
        return measure(sample([param[of_run] for param in start], asked(half)), half)
    if arm.loss == "ideal":
        generators = [torch.Generator().manual_seed(3000 + seed) for seed in seeds]
        return measure(torch.stack([draw(asked(half), 1.0, generator) for generator in generators]), half)

    # The policy starts as the reference, so the reference's errors are those of the start.
    streams = [stream(regime, seed, arm.options) for seed in run_seeds]
    batch = {name: torch.stack([one[name] for one in streams]) for name in streams[0]}
    if arm.after_sft:
        sft_rates = torch.full((len(run_seeds),), SFT_RATE)
        start = train("sft", {}, start, batch, sft_rates, sft_rates, SFT_STEPS)
    with torch.no_grad():
        ref_err = errors(start, batch["seen"].flatten(1, 2), batch["eps"].flatten(1, 2))
    batch["ref_err"] = ref_err.view(batch["eps"].shape[:3])                             # [seeds, steps, 2 B]

    start = [param[of_run] for param in start]                                          # [R, ...]
    batch = {name: value[of_run] for name, value in batch.items()}                      # [R, steps, ...]
    params = train(arm.loss, arm.options, start, batch, rates, betas, STEPS)
    return measure(sample(params, asked(half)), half)
