"""Where a run's scalars go beside log.jsonl: TensorBoard if it is installed, Weights & Biases if WANDB_PROJECT is set."""

import json
import os
import secrets

from common import InputError, atomic_write, brief


def open_trackers(folder, start):
    """[track(step, scalars), ...] for a run's folder, from step `start` on.

    Weights & Biases keeps what it has of later steps. They come again, and they are the same.
    """
    trackers = []
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder / "tensorboard", purge_step=start)
        trackers.append(lambda step, scalars: write_board(board, step, scalars))
    except ImportError:
        pass
    wandb_run = begin_wandb(folder) if os.environ.get("WANDB_PROJECT") else None
    if wandb_run:
        trackers.append(lambda step, scalars: wandb_run.log(scalars, step=step))
    return trackers


def write_board(board, step, scalars):
    for name, value in scalars.items():
        if value is not None:
            board.add_scalar(name, value, step)


def begin_wandb(folder):
    """A run of Weights & Biases, None if it is not installed. A run that resumes continues its own."""
    try:
        import wandb
    except ImportError:
        return print("WANDB_PROJECT is set, but wandb is not installed: nothing is logged there")
    id_file = folder / "wandb-id"
    if not id_file.exists():
        atomic_write(id_file, secrets.token_hex(4))
    arguments = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return wandb.init(dir=folder, id=id_file.read_text(encoding="utf-8"), name=folder.name, resume="allow", config=arguments,
                          reinit="finish_previous")
    except Exception as error:
        raise InputError(f"WANDB_PROJECT is set, but wandb cannot begin a run: {brief(error)}. Log in to it, set "
                         "WANDB_MODE=offline, or unset WANDB_PROJECT")
