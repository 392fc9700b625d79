"""What the losses promise: closed forms, and equalities between two ways of computing. Seconds on a CPU."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from loss import LOSSES, denoising_error, dpo_loss, frozen_reference, rpo_loss, sft_loss

BETA = 3.0
close = dict(rtol=1e-6, atol=1e-6)


def errors(n, seed=0):
    """err_w, err_l, ref_err_w, ref_err_l, each [n]; the policy's take gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).requires_grad_(k < 2) for k in range(4)]


def softmax_rows(n, seed=1):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


def nlog_sigmoid(x):
    return math.log(1 + math.exp(-x))


class Net(torch.nn.Module):
    """Called like diffusers' UNet; with parameters that autocast casts (Conv, Linear) and leaves (Norm)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = (
            torch.nn.Conv2d(4, 8, 3, 1, 1),
            torch.nn.GroupNorm(2, 8),
            torch.nn.Conv2d(8, 4, 1),
        )
        self.text = torch.nn.Linear(6, 8)

    def forward(self, x, t, encoder_hidden_states, return_dict):
        h = self.norm(
            self.conv(x) + self.text(encoder_hidden_states)[:, :, None, None] + t.view(-1, 1, 1, 1) / 1000
        )
        return (self.out(F.silu(h)),)


def net_and_inputs(n=6, seed=0):
    torch.manual_seed(seed)
    inputs = dict(
        latents=torch.randn(n, 4, 8, 8),
        noise=torch.randn(n, 4, 8, 8),
        timesteps=torch.randint(1000, (n,)),
        conditioning={"encoder_hidden_states": torch.randn(n, 6)},
        alphas_cumprod=torch.linspace(0.999, 0.005, 1000),
    )
    return Net(), inputs


# Closed forms


def test_sft_is_the_mean_winner_error():
    err_w, *rest = errors(4)
    loss, metrics = sft_loss(err_w, *rest, BETA, None)
    assert loss.item() == pytest.approx(sum(err_w.tolist()) / 4, abs=1e-6)
    assert metrics.keys() == {"mse/policy_w"}


def test_dpo_by_hand():
    w, l, rw, rl = errors(2)
    by_hand = sum(nlog_sigmoid(-BETA / 2 * ((w[i] - rw[i]) - (l[i] - rl[i])).item()) for i in range(2)) / 2
    assert dpo_loss(w, l, rw, rl, BETA)[0].item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("position", ["inside", "outside"])
def test_rpo_by_hand_on_a_2x2(position):
    """Row i is winner i, column j loser j, and the weights stand where they are said to stand."""
    w, l, rw, rl = errors(2)
    weights = [[0.7, 0.3], [0.2, 0.8]]
    total = 0
    for i in range(2):
        for j in range(2):
            logit = -BETA / 2 * ((w[i] - rw[i]) - (l[j] - rl[j])).item()
            if position == "inside":
                total += nlog_sigmoid(weights[i][j] * logit) / 4  # mean over the matrix
            else:
                total += weights[i][j] * nlog_sigmoid(logit) / 2  # mean over the winners of a weighted sum
    loss, _ = rpo_loss(w, l, rw, rl, BETA, torch.tensor(weights), position)
    assert loss.item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_log_2_where_the_policy_is_the_reference(name):
    w, l, *_ = errors(4)
    loss, metrics = LOSSES[name](w, l, w.detach(), l.detach(), 5000, softmax_rows(4))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["reward/margin"] == 0 and metrics["reward/accuracy"] == 0.5  # a tie counts one half


# Equalities


@pytest.mark.parametrize("position", ["inside", "outside"])
def test_rpo_with_one_pair_is_dpo(position):
    inputs = errors(1)
    rpo, dpo = rpo_loss(*inputs, BETA, torch.ones(1, 1), position)[0], dpo_loss(*inputs, BETA)[0]
    torch.testing.assert_close(rpo, dpo, **close)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs[:2]) for loss in (rpo, dpo)), **close)


def test_rpo_with_identity_weights_has_dpos_gradient_over_the_group_size():
    """What tau -> 0 tends to: the off-diagonal logits vanish, and log 2 each is what they leave."""
    inputs, n = errors(4), 4
    rpo, dpo = rpo_loss(*inputs, BETA, torch.eye(n))[0], dpo_loss(*inputs, BETA)[0]
    torch.testing.assert_close(rpo, dpo / n + (n - 1) / n * math.log(2), **close)
    for a, b in zip(torch.autograd.grad(rpo, inputs[:2]), torch.autograd.grad(dpo, inputs[:2])):
        torch.testing.assert_close(a, b / n, **close)


@pytest.mark.parametrize("name", LOSSES)
def test_permuting_pairs_permutes_only_the_order(name):
    inputs, weights, order = errors(5), softmax_rows(5), torch.tensor([3, 0, 4, 1, 2])
    shuffled = [err.detach()[order].requires_grad_(err.requires_grad) for err in inputs]
    (a, metrics_a), (b, metrics_b) = (
        LOSSES[name](*inputs, BETA, weights),
        LOSSES[name](*shuffled, BETA, weights[order][:, order]),
    )
    torch.testing.assert_close(a, b, **close)
    for key in metrics_a:
        torch.testing.assert_close(metrics_a[key], metrics_b[key], **close)
    a.backward(), b.backward()
    torch.testing.assert_close(inputs[0].grad[order], shuffled[0].grad, **close)


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_swapping_winner_and_loser_negates_the_margin(name):
    w, l, rw, rl = errors(4)
    a, b = (
        LOSSES[name](w, l, rw, rl, BETA, softmax_rows(4))[1],
        LOSSES[name](l, w, rl, rw, BETA, softmax_rows(4))[1],
    )
    torch.testing.assert_close(a["reward/margin"], -b["reward/margin"], **close)
    torch.testing.assert_close(a["reward/accuracy"], 1 - b["reward/accuracy"], **close)


def test_the_metrics_of_rpo_are_those_of_dpo():
    """Margin and accuracy are over a pair's own two images, so that runs can be compared."""
    inputs = errors(4)
    assert rpo_loss(*inputs, BETA, softmax_rows(4))[1] == dpo_loss(*inputs, BETA)[1]


# Gradients


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_the_gradient_lowers_winners_raises_losers_and_spares_the_reference(name):
    inputs = [err.detach().requires_grad_() for err in errors(4)]
    weights = softmax_rows(4).requires_grad_()
    loss, metrics = LOSSES[name](*inputs, BETA, weights)
    loss.backward()
    assert (inputs[0].grad > 0).all() and (inputs[1].grad < 0).all()
    assert inputs[2].grad is None and inputs[3].grad is None and weights.grad is None
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_reduced_in_float32(name, dtype):
    """The same rounded numbers, in half or in float32, make the same loss: nothing is added up in half."""
    inputs, weights = [err.detach().to(dtype) for err in errors(4)], softmax_rows(4).to(dtype)
    half = LOSSES[name](*inputs, 5000.0, weights)[0]
    full = LOSSES[name](*(err.float() for err in inputs), 5000.0, weights.float())[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, **close)


def test_rpo_refuses_weights_of_another_group_and_unknown_positions():
    with pytest.raises(ValueError, match="do not fit a group of 4"):
        rpo_loss(*errors(4), BETA, softmax_rows(3))
    with pytest.raises(ValueError, match="neither inside nor outside"):
        rpo_loss(*errors(4), BETA, softmax_rows(4), position="between")


def test_every_loss_has_the_one_signature():
    names = ["err_w", "err_l", "ref_err_w", "ref_err_l", "beta", "weights"]
    for loss in LOSSES.values():
        assert list(inspect.signature(loss).parameters)[:6] == names


# The denoising error


def test_error_is_zero_for_the_right_prediction_of_either_type():
    """A network that knows x can compute eps and v from x_t; then the error is 0, so target and x_t agree."""
    _, inputs = net_and_inputs()
    a_t = inputs["alphas_cumprod"][inputs["timesteps"]].view(-1, 1, 1, 1)
    x = inputs["latents"]

    def eps(x_t, t, return_dict, **_):
        return ((x_t - a_t.sqrt() * x) / (1 - a_t).sqrt(),)

    def v(x_t, t, return_dict, **_):  # v = (sqrt(a_t) x_t - x) / sqrt(1 - a_t)
        return ((a_t.sqrt() * x_t - x) / (1 - a_t).sqrt(),)

    for predict, prediction_type in ((eps, "epsilon"), (v, "v_prediction")):
        err = denoising_error(predict, **inputs, prediction_type=prediction_type)
        torch.testing.assert_close(err, torch.zeros(6), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="epsilon or v_prediction"):
        denoising_error(eps, **inputs, prediction_type="sample")


def test_target_and_x_t_are_diffusers_own():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="v_prediction")
    _, inputs = net_and_inputs()
    inputs["alphas_cumprod"] = scheduler.alphas_cumprod
    seen = {}

    def net(x_t, t, return_dict, **_):
        seen["x_t"] = x_t
        return (torch.zeros_like(x_t),)

    err = denoising_error(net, **inputs, prediction_type="v_prediction")
    x, noise, t = inputs["latents"], inputs["noise"], inputs["timesteps"]
    torch.testing.assert_close(seen["x_t"], scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(err, scheduler.get_velocity(x, noise, t).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_and_reference_agree_to_the_last_bit(dtype):
    """Invariant 4: the peers' reference, held whole in half precision, is off by many logits at beta 5000."""
    net, inputs = net_and_inputs()
    reference = frozen_reference(net, dtype)
    err, ref_err = (
        denoising_error(net, **inputs, dtype=dtype),
        denoising_error(reference, **inputs, dtype=dtype),
    )
    assert err.dtype == ref_err.dtype == torch.float32 and err.requires_grad and not ref_err.requires_grad
    assert torch.equal(err, ref_err)
    if dtype != torch.float32:
        whole = copy.deepcopy(net).to(dtype)

        def peers(x, t, encoder_hidden_states, return_dict):
            return whole(x.to(dtype), t.to(dtype), encoder_hidden_states.to(dtype), return_dict)

        assert not torch.equal(err, denoising_error(peers, **inputs))  # so the test can fail


def test_reference_shares_nothing_with_the_policy():
    net, inputs = net_and_inputs()
    reference = frozen_reference(net)
    before = denoising_error(reference, **inputs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(before, denoising_error(reference, **inputs))
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_the_error_is_averaged_in_float32():
    """1 + 2^-9 is 1 in bf16: a half-precision reduction of this prediction would give exactly 1."""
    _, inputs = net_and_inputs()
    inputs["noise"] = torch.full((6, 4, 8, 8), -(2.0**-9))
    err = denoising_error(lambda x, t, return_dict, **_: (torch.ones_like(x).bfloat16(),), **inputs)
    torch.testing.assert_close(err, torch.full((6,), (1 + 2.0**-9) ** 2), **close)
