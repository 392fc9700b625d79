"""What the losses promise: closed forms, and equalities between two ways of computing. Seconds on a CPU."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import loss as loss_file
from loss import DDPM, denoising_error, dpo_loss, rpo_loss, sft_loss, wants
from models import frozen_reference

OWN = {"sft": sft_loss, "dpo": dpo_loss, "rpo": rpo_loss}  # not LOSSES: a fork may add losses that take anything
BETA = 3.0
close = dict(rtol=1e-6, atol=1e-6)


def errors(n, seed=0):
    """err_w, err_l, ref_err_w, ref_err_l, each [n]; the policy's take gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).requires_grad_(k < 2) for k in range(4)]


def softmax_rows(n, seed=1):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


def call(name, inputs, beta=BETA, weights=None, **more):
    """A loss with what it names of four errors [n], beta, weights and more."""
    given = dict(zip(("err_w", "err_l", "ref_err_w", "ref_err_l"), inputs))
    given |= {"beta": beta, "weights": softmax_rows(len(inputs[0])) if weights is None else weights} | more
    return OWN[name](**{key: value for key, value in given.items() if key in wants(OWN[name])})


def nlog_sigmoid(x):
    return math.log(1 + math.exp(-x))


class Net(torch.nn.Module):
    """A denoiser with parameters that autocast casts (Conv, Linear) and leaves (Norm)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = (
            torch.nn.Conv2d(4, 8, 3, 1, 1),
            torch.nn.GroupNorm(2, 8),
            torch.nn.Conv2d(8, 4, 1),
        )
        self.text = torch.nn.Linear(6, 8)

    def forward(self, x, t, cond):
        h = self.norm(self.conv(x) + self.text(cond)[:, :, None, None] + t.view(-1, 1, 1, 1) / 1000)
        return self.out(F.silu(h))


def predict(network, x_t, t, cond):
    return network(x_t, t, cond)


def net_and_inputs(n=6, seed=0):
    torch.manual_seed(seed)
    inputs = dict(
        process=DDPM(torch.linspace(0.999, 0.005, 1000)),
        x=torch.randn(n, 4, 8, 8),
        eps=torch.randn(n, 4, 8, 8),
        t=torch.randint(1000, (n,)),
        cond=torch.randn(n, 6),
    )
    return Net(), inputs


# Closed forms


def test_sft_is_the_mean_winner_error():
    err_w, *_ = errors(4)
    loss, metrics = sft_loss(err_w)
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


@pytest.mark.parametrize("name, more", [("dpo", {}), ("rpo", {}), ("rpo", {"weight_position": "inside"})])
def test_sft_weight_adds_the_winners_errors(name, more):
    """It adds sft_weight * beta/2 * mean D^w, logs it, and pulls each winner alike and no loser."""
    inputs = w, l, rw, _ = errors(4)
    plain, metrics = call(name, inputs, **more)
    held, held_metrics = call(name, inputs, sft_weight=0.3, **more)
    by_hand = 0.3 * BETA / 2 * sum((w - rw).tolist()) / 4
    assert (held - plain).item() == pytest.approx(by_hand, abs=1e-6)
    assert metrics["loss/sft"] == 0 and held_metrics["loss/sft"].item() == pytest.approx(by_hand, abs=1e-6)
    assert {**held_metrics, "loss/sft": 0} == metrics
    winners, losers = (a - b for a, b in zip(torch.autograd.grad(held, [w, l]), torch.autograd.grad(plain, [w, l])))
    torch.testing.assert_close(winners, torch.full((4,), 0.3 * BETA / 2 / 4), **close)
    assert (losers == 0).all()


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_log_2_where_the_policy_is_the_reference(name):
    w, l, *_ = errors(4)
    loss, metrics = call(name, [w, l, w.detach(), l.detach()], beta=5000)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["reward/margin"] == 0 and metrics["reward/accuracy"] == 0.5  # a tie counts one half


# Equalities


@pytest.mark.parametrize("position", ["inside", "outside"])
def test_rpo_with_one_pair_is_dpo(position):
    inputs = errors(1)
    rpo, dpo = rpo_loss(*inputs, BETA, torch.ones(1, 1), position)[0], dpo_loss(*inputs, BETA)[0]
    torch.testing.assert_close(rpo, dpo, **close)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs[:2]) for loss in (rpo, dpo)), **close)


def test_inside_identity_weights_have_dpos_gradient_over_the_group_size():
    """What tau -> 0 tends to: the off-diagonal logits vanish, and log 2 each is what they leave."""
    inputs, n = errors(4), 4
    rpo, dpo = rpo_loss(*inputs, BETA, torch.eye(n), "inside")[0], dpo_loss(*inputs, BETA)[0]
    torch.testing.assert_close(rpo, dpo / n + (n - 1) / n * math.log(2), **close)
    for a, b in zip(torch.autograd.grad(rpo, inputs[:2]), torch.autograd.grad(dpo, inputs[:2])):
        torch.testing.assert_close(a, b / n, **close)


def test_outside_identity_weights_are_dpo():
    """The limit of a small tau, bit for bit: beta means what it means in DPO."""
    inputs = errors(4)
    rpo, dpo = rpo_loss(*inputs, BETA, torch.eye(4))[0], dpo_loss(*inputs, BETA)[0]
    assert torch.equal(rpo, dpo)
    for a, b in zip(torch.autograd.grad(rpo, inputs[:2]), torch.autograd.grad(dpo, inputs[:2])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OWN)
def test_permuting_pairs_permutes_only_the_order(name):
    inputs, weights, order = errors(5), softmax_rows(5), torch.tensor([3, 0, 4, 1, 2])
    shuffled = [err.detach()[order].requires_grad_(err.requires_grad) for err in inputs]
    a, metrics_a = call(name, inputs, weights=weights)
    b, metrics_b = call(name, shuffled, weights=weights[order][:, order])
    torch.testing.assert_close(a, b, **close)
    for key in metrics_a:
        torch.testing.assert_close(metrics_a[key], metrics_b[key], **close)
    a.backward(), b.backward()
    torch.testing.assert_close(inputs[0].grad[order], shuffled[0].grad, **close)


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_swapping_winner_and_loser_negates_the_margin(name):
    w, l, rw, rl = errors(4)
    a, b = call(name, [w, l, rw, rl])[1], call(name, [l, w, rl, rw])[1]
    torch.testing.assert_close(a["reward/margin"], -b["reward/margin"], **close)
    torch.testing.assert_close(a["reward/accuracy"], 1 - b["reward/accuracy"], **close)


def test_the_metrics_of_rpo_are_those_of_dpo():
    """Margin and accuracy are over a pair's own two images, so that runs can be compared."""
    inputs = errors(4)
    rpo, dpo = rpo_loss(*inputs, BETA, softmax_rows(4))[1], dpo_loss(*inputs, BETA)[1]
    assert {name: rpo[name] for name in dpo} == dpo


def test_weight_metrics_of_one_hot_and_of_equal_weights():
    """They are 1 and 1 where each winner has its own loser alone, and 1 / B and B where all losers count alike."""
    for weights, own, losers in ((torch.eye(4), 1, 1), (torch.full((4, 4), 0.25), 0.25, 4)):
        metrics = rpo_loss(*errors(4), BETA, weights)[1]
        assert metrics["weights/own"] == own and metrics["weights/losers"] == pytest.approx(losers)


def test_outside_at_zero_margins_a_loser_is_pushed_by_its_column_sum():
    """To first order dL/derr_i^w = beta/4 / B, for any rows; dL/derr_j^l = -beta/4 / B * sum_i w_ij."""
    w, l, *_ = errors(5)
    weights = softmax_rows(5)
    loss, _ = rpo_loss(w, l, w.detach(), l.detach(), BETA, weights)
    loss.backward()
    torch.testing.assert_close(w.grad, torch.full((5,), BETA / 4 / 5), **close)
    # The margins of other pairs are zero, too: every D is.
    torch.testing.assert_close(l.grad, -BETA / 4 / 5 * weights.sum(dim=0), **close)


# Gradients


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_the_gradient_lowers_winners_and_raises_losers(name):
    inputs = errors(4)
    loss, metrics = call(name, inputs)
    loss.backward()
    assert (inputs[0].grad > 0).all() and (inputs[1].grad < 0).all()
    assert not any(value.requires_grad for value in metrics.values())


def test_rpo_refuses_weights_of_another_group_and_unknown_positions():
    with pytest.raises(ValueError, match="do not fit a group of 4"):
        rpo_loss(*errors(4), BETA, softmax_rows(3))
    with pytest.raises(ValueError, match="neither outside nor inside"):
        rpo_loss(*errors(4), BETA, softmax_rows(4), weight_position="between")


# A loss names what it wants


def test_the_readmes_own_loss_is_whole():
    """The README's hinge, pasted as it stands there, is a hinge, and its LOSSES keeps the losses that we ship."""
    text = Path(__file__).with_name("README.md").read_text()
    names = dict(vars(loss_file))
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert OWN.items() <= loss_file.LOSSES.items()
    assert names["LOSSES"] == OWN | {"hinge": names["hinge_loss"]}
    w, l, *_ = errors(4)
    assert names["hinge_loss"](w, l, w.detach(), l.detach(), 5000)[0] == 1


def test_every_parameter_of_a_loss_is_known():
    """The step or an option gives it. The user would be asked for a misspelt one."""
    from options import VECTORS, train_args

    options = vars(train_args(["--device", "cpu"]))
    for loss_fn in OWN.values():
        assert wants(loss_fn).keys() <= VECTORS | options.keys()


# The denoising error


def test_error_is_zero_for_the_right_prediction_of_either_type():
    """A network that knows x can compute eps and v from x_t; then the error is 0, so target and x_t agree."""
    _, inputs = net_and_inputs()
    alphas_cumprod, x = inputs["process"].alphas_cumprod, inputs["x"]
    a_t = alphas_cumprod[inputs["t"]].view(-1, 1, 1, 1)

    def eps(network, x_t, t, cond):
        return (x_t - a_t.sqrt() * x) / (1 - a_t).sqrt()

    def v(network, x_t, t, cond):  # v = (sqrt(a_t) x_t - x) / sqrt(1 - a_t)
        return (a_t.sqrt() * x_t - x) / (1 - a_t).sqrt()

    for right, prediction_type in ((eps, "epsilon"), (v, "v_prediction")):
        inputs["process"] = DDPM(alphas_cumprod, prediction_type)
        torch.testing.assert_close(denoising_error(right, None, **inputs), torch.zeros(6), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="epsilon or v_prediction"):
        DDPM(alphas_cumprod, "sample")


def test_target_and_x_t_are_diffusers_own():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="v_prediction")
    _, inputs = net_and_inputs()
    process = inputs["process"] = DDPM(scheduler.alphas_cumprod, "v_prediction")
    x, eps, t = inputs["x"], inputs["eps"], inputs["t"]
    x_t, target = process.diffuse(x, eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x, eps, t))
    torch.testing.assert_close(target, scheduler.get_velocity(x, eps, t))
    err = denoising_error(lambda network, x_t, *_: torch.zeros_like(x_t), None, **inputs)
    torch.testing.assert_close(err, target.square().mean(dim=(1, 2, 3)))


def test_the_snr_is_that_of_the_schedule():
    process = DDPM(torch.tensor([0.8, 0.5, 0.1]))
    torch.testing.assert_close(process.snr(torch.tensor([0, 1, 2])), torch.tensor([4.0, 1.0, 1 / 9]))


def test_timesteps_are_uniform():
    process, generator = DDPM(torch.linspace(0.999, 0.005, 1000)), torch.Generator().manual_seed(0)
    t = torch.stack([process.sample_t(generator) for _ in range(4000)]).float()
    assert 0 <= t.min() < 5 and 995 <= t.max() < 1000 and abs(t.mean() - 499.5) < 3 * 288.7 / 4000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_and_reference_agree_to_the_last_bit(dtype):
    """A reference that is held whole in half precision, as others hold it, is off by many logits at beta 5000."""
    net, inputs = net_and_inputs()
    reference = frozen_reference(net, dtype)
    err = denoising_error(predict, net, **inputs, dtype=dtype)
    ref_err = denoising_error(predict, reference, **inputs, dtype=dtype)
    assert err.dtype == ref_err.dtype == torch.float32 and err.requires_grad and not ref_err.requires_grad
    assert torch.equal(err, ref_err)
    if dtype != torch.float32:
        whole = copy.deepcopy(net).to(dtype)

        def peers(network, x_t, t, cond):
            return network(x_t.to(dtype), t.to(dtype), cond.to(dtype))

        assert not torch.equal(err, denoising_error(peers, whole, **inputs))  # so the test can fail


def test_reference_shares_nothing_with_the_policy():
    net, inputs = net_and_inputs()
    reference = frozen_reference(net)
    before = denoising_error(predict, reference, **inputs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(before, denoising_error(predict, reference, **inputs))
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_the_error_is_averaged_in_float32():
    """1 + 2^-9 is 1 in bf16: a half-precision reduction of this prediction would give exactly 1."""
    _, inputs = net_and_inputs()
    inputs["eps"] = torch.full((6, 4, 8, 8), -(2.0**-9))
    err = denoising_error(lambda network, x_t, *_: torch.ones_like(x_t).bfloat16(), None, **inputs)
    torch.testing.assert_close(err, torch.full((6,), (1 + 2.0**-9) ** 2), **close)
