"""Relative Preference Optimization for diffusion models, next to Diffusion-DPO and SFT.

Pair i is a prompt c_i, the latent x_i^w of its preferred image (winner) and x_i^l of the other (loser). Both get
the same timestep t_i and the same noise eps_i, by `DDPM` or, for flow-matching models, by `Flow`.

    err(theta; x, c, t, eps) = mean over the latent's elements of (prediction - target)^2
    D_i^w = err_policy(x_i^w) - err_ref(x_i^w)        D_j^l = err_policy(x_j^l) - err_ref(x_j^l)

    SFT   L = mean_i   err_policy(x_i^w)
    DPO   L = mean_i  -log sigmoid( -beta/2 * (D_i^w - D_i^l) )                     Eq. (14) of arXiv:2311.12908
    RPO   L = mean_i sum_j  w_ij * -log sigmoid( -beta/2 * (D_i^w - D_j^l) )        weights outside: arXiv:2406.06382
          L = mean_ij  -log sigmoid( -beta/2 * w_ij * (D_i^w - D_j^l) )             weights inside: arXiv:2402.10958
          w_ij = softmax over j of ( -d_ij / tau ),  see cross_pair_weights in data.py
    DPO and RPO add   sft_weight * beta/2 * mean_i D_i^w    which holds the winner, as in arXiv:2404.19733 (0: the paper)

Our beta is the product beta T omega(lambda_t) of Eq. (14), with constant omega. The 1/2 and the mean over a latent's
elements are those of Diffusion-DPO's published code, so beta = 5000 means here what it means there.

To add a loss, write a function and add it to LOSSES; then `--loss NAME` runs it. The trainer computes only what its
parameters name: without ref_err_* no reference runs, without err_l no loser is encoded.

    err_w, err_l            [B] float32, the policy's errors above, with gradient
    ref_err_w, ref_err_l    [B] float32, the reference's errors
    weights                 [B, B] float32, RPO's w_ij
    group_size              int, B
    t                       [B] timesteps: int64 in [0, T) for DDPM, float32 in (0, 1) for Flow
    snr                     [B] float32, a_t / (1 - a_t) for DDPM, ((1 - t) / t)^2 for Flow
    a name in data.COLUMNS  [B] float32, a number per pair out of the data
    any other name          a hyperparameter: the value of the option of that name, else of --loss_args NAME=VALUE

A loss must be the mean of what each pair contributes: the trainer may call it on any number of pairs at a time. A
loss that couples pairs must name `weights` or `group_size`; then it is called on one whole group of --group_size
pairs. It returns a scalar, and a dict of detached 0-dim tensors with the same keys in every call, for the log.
"""

import inspect

import torch
import torch.nn.functional as F


class DDPM:
    """The diffusion process of SD 1.x, SD 2.x and SDXL: x_t = sqrt(a_t) x + sqrt(1 - a_t) eps.

    alphas_cumprod   [T] float32, the schedule's a_t
    prediction_type  "epsilon" (the network predicts eps) or "v_prediction" (v, section 4 of arXiv:2202.00512)
    """

    def __init__(self, alphas_cumprod, prediction_type="epsilon"):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r}: this method needs epsilon or v_prediction")
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type

    def to(self, device):
        return DDPM(self.alphas_cumprod.to(device), self.prediction_type)

    def sample_t(self, generator, low=0.0, high=1.0):
        """A pair's timestep, int64 in [0, T), uniform as in Eq. (14). Held-out pairs pass quarters as low, high."""
        num_steps = len(self.alphas_cumprod)
        return torch.randint(int(low * num_steps), int(high * num_steps), (), generator=generator)

    def snr(self, t):
        a_t = self.alphas_cumprod[t]
        return a_t / (1 - a_t)

    def diffuse(self, x, eps, t):
        """(x_t, target) of clean latents x and noise eps [N, C, h, w] at t [N], each [N, C, h, w]."""
        a_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)                      # [N, 1, 1, 1]
        x_t = a_t.sqrt() * x + (1 - a_t).sqrt() * eps
        target = eps
        if self.prediction_type == "v_prediction":
            target = a_t.sqrt() * eps - (1 - a_t).sqrt() * x
        return x_t, target


class Flow:
    """The rectified flow of SD3 and FLUX (arXiv:2403.03206): x_t = (1 - t) x + t eps, target eps - x.

    sampling     how t is drawn before the shift: "uniform", or "logit_normal": sigmoid(mean + scale * normal)
    shift        t -> shift t / (1 + (shift - 1) t), section 5.3.2; above 1 it favours noisy times
    """

    def __init__(self, sampling="logit_normal", mean=0.0, scale=1.0, shift=1.0):
        self.sampling, self.mean, self.scale, self.shift = sampling, mean, scale, shift

    def to(self, device):
        return self  # it holds no tensor

    def sample_t(self, generator, low=0.0, high=1.0):
        """A pair's time, float32 in (0, 1); low, high: a part of the distribution, ordered by noise."""
        t = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)
        if self.sampling == "logit_normal":
            t = (self.mean + self.scale * torch.special.ndtri(t)).sigmoid()  # ndtri: inverse of the normal's cdf
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.float().clamp(1e-4, 1 - 1e-4)  # keeps snr finite and above 0

    def snr(self, t):
        return ((1 - t) / t).square()

    def diffuse(self, x, eps, t):
        t = t.view(-1, 1, 1, 1)                                             # [N, 1, 1, 1]
        return (1 - t) * x + t * eps, eps - x


def denoising_error(predict, network, process, x, eps, t, cond, dtype=torch.float32):
    """err(theta; x, c, t, eps) of each sample, [N] float32. Policy and reference are both measured by this function.

    The forward runs under autocast to `dtype`. The difference is taken and averaged in float32, because a preference
    logit is a small difference of errors times thousands. `network.enable_gradient_checkpointing()` takes less
    memory and a third more time: activations are recomputed in the backward pass. The gradients stay the same.

    predict   predict(network, x_t, t, cond) -> [N, C, h, w]: the family's way to call its network
    process   a DDPM or a Flow
    x, eps    [N, C, h, w] float32: scaled clean latents, standard normal noise
    t         [N] timesteps
    cond      conditioning of the network, N rows each
    """
    x_t, target = process.diffuse(x, eps, t)                                # [N, C, h, w]
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        prediction = predict(network, x_t, t, cond)
    return (prediction.float() - target).square().mean(dim=(1, 2, 3))       # [N]


def sft_loss(err_w):
    """Supervised fine-tuning on the winners: mean_i err_policy(x_i^w)."""
    return err_w.mean(), {"mse/policy_w": err_w.detach().mean()}


def dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, sft_weight=0.0):
    """Diffusion-DPO, Eq. (14) of arXiv:2311.12908: mean_i -log sigmoid( -beta/2 * (D_i^w - D_i^l) ).

    beta        the strength of the pull to the reference
    sft_weight  the weight of the term that holds the winner; 0.5 pulls as much along D^w as DPO does at the start
    """
    d_w = err_w - ref_err_w                                                 # [B]
    d_l = err_l - ref_err_l                                                 # [B]
    logits = -beta / 2 * (d_w - d_l)                                        # [B]
    hold = sft_weight * beta / 2 * d_w.mean()
    metrics = preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta)
    return -F.logsigmoid(logits).mean() + hold, metrics | {"loss/sft": hold.detach()}


def rpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, weights, weight_position="outside", sft_weight=0.0):
    """Diffusion-RPO, arXiv:2406.06382: every winner of a group of B pairs against every loser of the group.

    Each pair keeps its own timestep and noise, so D_i^w and D_j^l differ in them, unless --group_noise shares them.
    The weights stand outside the log-sigmoid, as in the paper, or inside; the head of this file has both equations.
    Outside, beta means what it means in DPO, whatever B. Inside, a logit's effective beta is beta * w_ij, about
    beta / B, so choose beta and B together; the term of sft_weight keeps beta. With B = 1 both are DPO.

    weights  [B, B], row i = winner i, column j = loser j, rows sum to 1; constants
    raises   ValueError if weight_position is unknown or weights has another shape
    """
    if weights.shape != (len(err_w), len(err_l)):
        raise ValueError(f"weights {tuple(weights.shape)} do not fit a group of {len(err_w)} pairs")
    d_w = err_w - ref_err_w                                                 # [B]
    d_l = err_l - ref_err_l                                                 # [B]
    logits = -beta / 2 * (d_w[:, None] - d_l[None, :])          # [B, B], row i = winner i, column j = loser j
    if weight_position == "outside":
        loss = -(weights * F.logsigmoid(logits)).sum(dim=1).mean()
    elif weight_position == "inside":
        loss = -F.logsigmoid(weights * logits).mean()
    else:
        raise ValueError(f"weight_position {weight_position!r} is neither outside nor inside")
    hold = sft_weight * beta / 2 * d_w.mean()
    losers = torch.special.entr(weights).sum(dim=1).exp()       # [B], exp of a row's entropy: 1 where RPO is DPO
    metrics = preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta)
    metrics |= {"weights/own": weights.diagonal().mean(), "weights/losers": losers.mean(), "loss/sft": hold.detach()}
    return loss + hold, metrics


@torch.no_grad()
def preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta):
    """The usual metrics of preference papers, on each pair's own two images; all inputs [B].

    reward/chosen, reward/rejected   mean of -beta/2 D^w and of -beta/2 D^l: the gain over the reference
    reward/margin, reward/accuracy   chosen - rejected; the share of positive margins, a zero counts half
    mse/{policy,ref}_{w,l}           the mean errors
    """
    chosen = -beta / 2 * (err_w - ref_err_w)                                # [B]
    rejected = -beta / 2 * (err_l - ref_err_l)                              # [B]
    margin = chosen - rejected                                              # [B]
    accuracy = (margin > 0).float() + (margin == 0).float() / 2             # [B]
    return {"reward/chosen": chosen.mean(), "reward/rejected": rejected.mean(),
            "reward/margin": margin.mean(), "reward/accuracy": accuracy.mean(),
            "mse/policy_w": err_w.mean(), "mse/policy_l": err_l.mean(),
            "mse/ref_w": ref_err_w.mean(), "mse/ref_l": ref_err_l.mean()}


LOSSES = {"sft": sft_loss, "dpo": dpo_loss, "rpo": rpo_loss}


def wants(loss_fn):
    """The parameters of a loss by name, those with a default too."""
    return inspect.signature(loss_fn).parameters
