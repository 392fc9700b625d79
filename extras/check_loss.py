"""The check that train.py makes of a loss before the first step: does it couple pairs without saying so?

    python -m extras.check_loss hinge               checks a loss of LOSSES on the embedded task; no training
"""

import sys

import numpy as np
import torch

from common import InputError, one_line_errors
from loss import LOSSES, wants
from options import hyperparameters, needs_groups


def check_coupling(args, pairs, process):
    """InputError if a loss couples pairs but names neither `weights` nor `group_size`.

    Such a loss would depend on --micro_batch. The loss and its gradient are computed on the same random errors of eight
    pairs, whole and in halves. Errors of seven scales are tried, because a sigmoid hides a batch's mean where it is
    saturated or nearly straight. A difference counts if it is larger than the rounding of the largest value.
    """
    loss_fn, generator = LOSSES[args.loss], torch.Generator().manual_seed(0)
    if needs_groups(loss_fn):
        return
    t = torch.stack([process.sample_t(generator) for _ in range(8)])
    given = {"t": t, "snr": process.snr(t)}
    for name in sorted(wants(loss_fn).keys() & pairs.columns.keys()):
        known = np.unique(pairs.columns[name][pairs.rows])  # the first rows may be all alike, or have no number
        known = torch.from_numpy(known[~np.isnan(known)])
        given[name] = known[torch.randint(len(known), (8,), generator=generator)]

    def value_and_gradient(part):
        inputs = {name: value[part] for name, value in given.items() if name in wants(loss_fn)}
        loss, _ = loss_fn(**inputs, **hyperparameters(args))
        errors = given["err_w"], given["err_l"]
        gradients = torch.autograd.grad(loss, errors, allow_unused=True, materialize_grads=True)
        return torch.cat([loss.detach()[None], *gradients])                             # [1 + 2 * 8]

    whole, halves = [], []
    for exponent in [*range(7)] * 4:
        for name in ("err_w", "err_l", "ref_err_w", "ref_err_l"):
            errors = 0.5 + 10.0 ** -exponent * torch.rand(8, generator=generator, dtype=torch.float64)
            given[name] = errors.requires_grad_()
        whole.append(value_and_gradient(slice(8)))
        halves.append((value_and_gradient(slice(4)) + value_and_gradient(slice(4, 8))) / 2)
    size, difference = torch.stack(whole).abs(), (torch.stack(whole) - torch.stack(halves)).abs()
    is_finite = (size + difference).isfinite().all(dim=1)                               # [28]
    for name, columns in (("value", slice(1)), ("gradient", slice(1, None))):
        if is_finite.any() and difference[is_finite, columns].max() > 1e-4 * size[is_finite, columns].max():
            raise InputError(f"--loss {args.loss} couples pairs: its {name} on eight pairs is not the mean of those on "
                             "its halves. Let it take `group_size` or `weights` as an argument; then it is called on "
                             "one whole group of --group_size pairs")


def main():
    from data import ImagePairs
    from loading import load_model
    from options import train_args

    with one_line_errors("check_loss.py"):
        for name in sys.argv[1:]:
            args = train_args(["--loss", name, "--out", "out/check_loss"])
            check_coupling(args, ImagePairs("tiny"), load_model("tiny").process)
            print(f"{name}: called on one whole group" if needs_groups(LOSSES[name]) else f"{name}: a mean over pairs")


if __name__ == "__main__":
    main()
