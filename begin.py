"""What comes before the first step of train.py: the pairs, the model and the checks of a run, fastest failure first."""

import numpy as np
import torch

import distributed
import reference
import run
from common import DTYPES, InputError
from data import COLUMNS, ImagePairs
from encode import EncodedPairs, check_cache
from loading import EMBEDDED, find_model, fuse_lora, load_model
from loss import LOSSES, wants
from models import cast_for_autocast
from options import H14, hyperparameters, needs_groups
from sources import is_cache

MICRO_BATCHES = (1, 2, 4, 8, 16)  # what --micro_batch auto tries


def open_parts(args, out, state, device):
    """(pairs, held-out pairs or None, model) of a run. Options that depend on the model get their values."""
    distributed.init_processes(device)
    run.check_shared(out)
    if not args.random_init and args.model not in EMBEDDED:  # these are built below, once the data are found good
        find_model(args.model, args.config)
    if is_cache(args.data):
        pairs = EncodedPairs(args.data, args.seed, args.prompt_dropout)
    else:
        pairs = ImagePairs(args.data, args.resolution, args.seed, args.random_crop, args.random_flip,
                           args.prompt_dropout)
    held_out = reference.open_held_out(args, pairs) if args.validate else None
    if state and state["pairs"] != len(pairs):
        raise InputError(f"{out} was begun with {state['pairs']} pairs, but {args.data} now holds {len(pairs)}")
    pairs.check_columns(wants(LOSSES[args.loss]).keys() & set(COLUMNS))

    model = load_model(args.model, args.random_init, args.config)
    if args.init_lora:
        fuse_lora(model, args.init_lora)
    for source in (args.data, args.validate):
        if source and is_cache(source):
            check_cache(source, model, args.model)
    if args.sample_every:
        model.check_scheduler()
    args.resolution = pairs.resolution = model.resolution(args.resolution)
    if held_out:
        held_out.resolution = args.resolution
        reference.check_held_out(args)
    model.vae_dtype = DTYPES[args.vae_precision]
    model.set_times(args)
    args.optimizer = args.optimizer or model.optimizer
    args.clip = args.clip or ("tiny" if model.is_toy else H14)
    check_coupling(args, pairs, model.process)
    return pairs, held_out, model


def check_coupling(args, pairs, process):
    """InputError if a loss couples pairs but names neither `weights` nor `group_size`.

    Such a loss would depend on --micro_batch. It is called on the same random errors of eight pairs, whole and in halves,
    at several scales, because a saturated sigmoid may hide the difference at one scale.
    """
    loss_fn, generator = LOSSES[args.loss], torch.Generator().manual_seed(0)
    if needs_groups(loss_fn):
        return
    t = torch.stack([process.sample_t(generator) for _ in range(8)])
    fixed = {"t": t, "snr": process.snr(t)}
    for name, values in pairs.columns.items():
        fixed[name] = torch.from_numpy(np.resize(values[pairs.rows], 8))
    for scale in (1, 1e-2, 1e-4, 1e-6):
        values = dict(fixed)
        for name in ("err_w", "err_l", "ref_err_w", "ref_err_l"):
            values[name] = 0.5 + scale * torch.rand(8, generator=generator, dtype=torch.float64)
        losses = []
        for part in (slice(8), slice(4), slice(4, 8)):
            inputs = {name: value[part] for name, value in values.items() if name in wants(loss_fn)}
            losses.append(loss_fn(**inputs, **hyperparameters(args))[0])
        whole, halves = losses[0], (losses[1] + losses[2]) / 2
        if not torch.isclose(whole, halves, rtol=1e-4, atol=0, equal_nan=True):
            raise InputError(f"--loss {args.loss} couples pairs: on eight pairs it is {whole:.6g}, but the mean of its "
                             f"halves is {halves:.6g}. Let it take `group_size` or `weights` as an argument; then it is "
                             "called on one whole group of --group_size pairs")


def check_same_run(out, state, now):
    """InputError if a checkpoint belongs to another run than this code and this command.

    now  what `Trainer.identity` gives for the steps that the checkpoint has taken
    """
    for name, value in state["digests"].items():
        if now["digests"].get(name) != value:
            raise InputError(f"{out} was begun with another {name} ({value}, now {now['digests'].get(name)}). Give back "
                             "what it was begun with, or pass another --out")
    reference.check_draws(f"{out} was trained", state["draw_ids"], now["draw_ids"], state["step"] - 1)
    if now["learning_rates"] != state["learning_rates"]:
        raise InputError(f"with this --steps the learning rates of the {state['step']} steps that {out} has taken would "
                         "be others. Pass the --steps that it was begun with, or another --out")


def place_encoders(args, model, device):
    """Puts VAE and text encoders on the device. For an adapter, text encoders are stored as autocast casts them."""
    for name, network in model.networks().items():
        if args.lora_rank and name in model.text_encoders:
            cast_for_autocast(network, DTYPES[args.precision], device)
        elif network is not model.denoiser:
            network.to(device)


def release_encoders(model, keeps_vae):
    """Takes off the device what only the samples' prompts and the held-out pairs needed."""
    vars(model).pop("encoding_vae", None)
    for name, network in model.networks().items():
        if network is not model.denoiser and not (name == "vae" and keeps_vae):
            network.to("cpu")


def make_optimizer(args, params):
    settings = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(params, **settings, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(params, **settings)
    from transformers import Adafactor

    return Adafactor(params, **settings, scale_parameter=False, relative_step=False)


def describe(args, model, params, passes, has_clip, steps_taken):
    """One line on what runs."""
    trained = sum(param.numel() for param in params)
    line = (f"{args.loss} on {args.model}: trains {trained / 1e6:.1f} of {model.num_parameters / 1e6:.1f} M parameters; "
            f"{args.resolution} px, {args.device}, {args.precision}; {args.batch_size} pairs per step, "
            f"{args.micro_batch} per forward, processes: {distributed.torchrun_env()[2]}")
    wanted = wants(LOSSES[args.loss])
    if needs_groups(LOSSES[args.loss]):
        line += f"; groups of {args.group_size} in {'one pass' if passes == 1 else 'two passes'}"
    if "weights" in wanted:
        clip = args.clip if has_clip else "not loaded"
        line += f", weights {args.weight_position}, tau {args.tau:g}, clip {clip}"
    return line + (f"; going on after {steps_taken} steps" if steps_taken else "")


def largest_micro_batch(args, device, params, forward_backward):
    """The largest of MICRO_BATCHES for which every process has memory (--micro_batch auto).

    forward_backward  calls the forward and the backward of a number of pairs
    raises            InputError if one pair is too many
    """
    _, _, world_size = distributed.torchrun_env()
    largest = 0
    for micro_batch in MICRO_BATCHES:
        if args.batch_size % (micro_batch * world_size):
            break
        has_room = has_room_for(micro_batch, args, device, params, forward_backward)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not all(distributed.all_gather_list([has_room])):
            break
        largest = micro_batch
    if not largest:
        raise InputError("out of memory with one pair per forward. --gradient_checkpointing, --lora_rank 16, "
                         "--optimizer adafactor or a smaller --resolution help")
    return largest


def has_room_for(micro_batch, args, device, params, forward_backward):
    """Whether a forward and a backward fit beside the optimizer's state, the average, and 5% more."""
    copies = {"adamw": 2}.get(args.optimizer, 0) + bool(args.ema)
    try:
        held = [torch.empty_like(param) for param in params for _ in range(copies)]
        if device.type == "cuda":
            _, total = torch.cuda.mem_get_info(device)
            held.append(torch.empty(total // 20, dtype=torch.uint8, device=device))
        for param in params:
            param.grad = torch.zeros_like(param)
        forward_backward(micro_batch)
        return True
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        return False
    finally:
        for param in params:
            param.grad = None
