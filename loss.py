"""Relative Preference Optimization for diffusion models, next to Diffusion-DPO and SFT.

Pair i is a prompt c_i, the latent x_i^w of its preferred image (winner) and x_i^l of the other (loser). Both
are noised with one timestep t_i and one noise eps_i:  x_t = sqrt(a_t) x + sqrt(1 - a_t) eps.

    err(theta; x, c, t, eps) = mean over the latent's elements of (prediction - target)^2
    D_i^w = err_policy(x_i^w) - err_ref(x_i^w)        D_j^l = err_policy(x_j^l) - err_ref(x_j^l)

    SFT   L = mean_i   err_policy(x_i^w)
    DPO   L = mean_i  -log sigmoid( -beta/2 * (D_i^w - D_i^l) )             Eq. (14) of arXiv:2311.12908
    RPO   L = mean_ij -log sigmoid( -beta/2 * w_ij * (D_i^w - D_j^l) )      arXiv:2406.06382, arXiv:2402.10958
          w_ij = softmax over j of ( -d_ij / tau )                          cross_pair_weights in data.py

beta stands for beta T omega(lambda_t) of Eq. (14), omega constant. The 1/2 and the mean, not sum, over a
latent's elements are those of Diffusion-DPO's published code: beta = 5000 means here what it means there.

A new loss is one function with the signature of these, one entry in LOSSES, one test; `--loss NAME` runs it.
What has a default in its signature is not computed for it: sft sees no loser, no reference; dpo no weights.
A loss that couples pairs must ask for weights: only then is it given one group of --group_size at a time.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F


def denoising_error(unet, latents, noise, timesteps, conditioning, alphas_cumprod,
                    prediction_type="epsilon", dtype=torch.float32):
    """err(theta; x, c, t, eps) of every sample: the one way in which policy and reference are measured.

    The forward runs under autocast to `dtype`; the difference is taken and averaged in float32, because a
    preference logit is a small difference of errors times thousands. With gradient checkpointing, that is
    after `unet.enable_gradient_checkpointing()`, activations are recomputed in the backward pass: less
    memory, a third more time, the same gradients.

    unet            diffusers' UNet2DConditionModel, or anything called like it
    latents, noise  [N, C, h, w] float32: scaled clean latents x, standard normal eps
    timesteps       [N] int64, in [0, T)
    conditioning    the UNet's keyword arguments (encoder_hidden_states, added_cond_kwargs), N rows each
    alphas_cumprod  [T] float32, the schedule's a_t
    returns         [N] float32
    raises          ValueError where prediction_type is neither "epsilon" nor "v_prediction"
    """
    a_t = alphas_cumprod[timesteps].view(-1, 1, 1, 1)                       # [N, 1, 1, 1]
    x_t = a_t.sqrt() * latents + (1 - a_t).sqrt() * noise                   # [N, C, h, w]
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":                                 # section 4 of arXiv:2202.00512
        target = a_t.sqrt() * noise - (1 - a_t).sqrt() * latents
    else:
        raise ValueError(f"prediction_type {prediction_type!r}: this method needs epsilon or v_prediction")
    with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
        prediction = unet(x_t, timesteps, **conditioning, return_dict=False)[0]
    return (prediction.float() - target).square().mean(dim=(1, 2, 3))       # [N]


def cast_for_autocast(network, dtype):
    """`network`, its frozen Linear and Conv weights cast in place, as autocast would in every forward.

    All other parameters stay float32, as autocast leaves them, so that under autocast to `dtype` the numbers
    are the very same: a reference held whole in bf16 would move logits at step 0 by 1. So do those that train
    (an adapter's): in bf16 a learning rate of 1e-5 would not move them.
    """
    for module in network.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype)
    return network


def frozen_reference(unet, dtype=torch.float32):
    """A copy of `unet` that takes no gradient and, under autocast to `dtype`, computes the same numbers."""
    return cast_for_autocast(copy.deepcopy(unet).eval().requires_grad_(False), dtype)


@contextlib.contextmanager
def adapter_off(unet):
    """`unet` without its LoRA adapter, the reference of a policy that is one; on again on any way out."""
    unet.disable_adapters()
    try:
        yield unet
    finally:
        unet.enable_adapters()


def sft_loss(err_w, err_l=None, ref_err_w=None, ref_err_l=None, beta=None, weights=None):
    """Supervised fine-tuning on the winners: mean_i err_policy(x_i^w). Only `err_w`, [B], is used.

    returns  (loss scalar, metrics: {"mse/policy_w"} detached)
    """
    return err_w.float().mean(), {"mse/policy_w": err_w.detach().float().mean()}


def dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, weights=None):
    """Diffusion-DPO, Eq. (14) of arXiv:2311.12908: mean_i -log sigmoid( -beta/2 * (D_i^w - D_i^l) ).

    err_w, err_l, ref_err_w, ref_err_l  [B] errors of policy and reference; the reference gets no gradient
    beta                                strength of the pull to the reference; `weights` is not used
    returns                             (loss scalar, metrics: detached scalars, see `preference_metrics`)
    """
    d_w = err_w.float() - ref_err_w.detach().float()                        # [B]
    d_l = err_l.float() - ref_err_l.detach().float()                        # [B]
    logits = -beta / 2 * (d_w - d_l)                                        # [B]
    return -F.logsigmoid(logits).mean(), preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta)


def rpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, weights, position="inside"):
    """Diffusion-RPO, arXiv:2406.06382: every winner of a group of B pairs against every loser of it.

    position="inside"   mean_ij -log sigmoid( -beta/2 * w_ij * (D_i^w - D_j^l) )      as in arXiv:2402.10958
    position="outside"  mean_i sum_j w_ij * -log sigmoid( -beta/2 * (D_i^w - D_j^l) )

    With B = 1 both are DPO. Inside, a logit's effective beta is beta * w_ij, about beta / B: choose the two
    together.

    err_w, err_l, ref_err_w, ref_err_l  [B] errors of policy and reference; the reference gets no gradient
    weights                             [B, B], row i = winner i, column j = loser j, rows sum to 1; constants
    returns                             (loss scalar, metrics: detached scalars, see `preference_metrics`)
    raises                              ValueError where position or the shape of weights is none of these
    """
    if weights.shape != (len(err_w), len(err_l)):
        raise ValueError(f"weights {tuple(weights.shape)} do not fit a group of {len(err_w)} pairs")
    d_w = err_w.float() - ref_err_w.detach().float()                        # [B]
    d_l = err_l.float() - ref_err_l.detach().float()                        # [B]
    logits = -beta / 2 * (d_w[:, None] - d_l[None, :])          # [B, B], row i = winner i, column j = loser j
    weights = weights.detach().float()
    if position == "inside":
        loss = -F.logsigmoid(weights * logits).mean()
    elif position == "outside":
        loss = -(weights * F.logsigmoid(logits)).sum(dim=1).mean()
    else:
        raise ValueError(f"position {position!r} is neither inside nor outside")
    return loss, preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta)


@torch.no_grad()
def preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta):
    """What readers of preference papers look for, over each pair's own two images; all inputs [B].

    reward/chosen, reward/rejected   mean of -beta/2 D^w, of -beta/2 D^l: the gain over the reference
    reward/margin, reward/accuracy   chosen - rejected; the share of positive margins, a zero counting half
    mse/{policy,ref}_{w,l}           the mean errors themselves
    """
    err_w, err_l, ref_err_w, ref_err_l = (err.float() for err in (err_w, err_l, ref_err_w, ref_err_l))
    chosen, rejected = -beta / 2 * (err_w - ref_err_w), -beta / 2 * (err_l - ref_err_l)     # [B], [B]
    margin = chosen - rejected
    return {"reward/chosen": chosen.mean(), "reward/rejected": rejected.mean(),
            "reward/margin": margin.mean(),
            "reward/accuracy": ((margin > 0).float() + (margin == 0).float() / 2).mean(),
            "mse/policy_w": err_w.mean(), "mse/policy_l": err_l.mean(),
            "mse/ref_w": ref_err_w.mean(), "mse/ref_l": ref_err_l.mean()}


# All can be called alike: LOSSES[name](err_w, err_l, ref_err_w, ref_err_l, beta, weights).
LOSSES = {"sft": sft_loss, "dpo": dpo_loss, "rpo": rpo_loss}
