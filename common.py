"""Small tools that every command shares: errors, keyed randomness, digests, and files that are never half written."""

import argparse
import contextlib
import csv
import errno
import hashlib
import importlib
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import filelock
import torch
from torch.utils._pytree import tree_map

IN_WORKER = "\nOriginal Traceback"  # marks the text of an exception that a DataLoader's process raised
BAD_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
LFS = b"version https://git-lfs"
POINTER = "it is a pointer of git-lfs; fetch the file by `git lfs pull`"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # the values of --precision


class InputError(ValueError):
    """A fault that the user can mend. A command prints it as one line; any other error keeps its traceback."""


class ReaderDied(BaseException):
    """A process that reads the data has died. No `except Exception` of a library catches it."""


RENAMED = {  # options of diffusers' scripts and those of its peers
    "learning_rate": "--lr", "max_train_steps": "--steps", "output_dir": "--out", "mixed_precision": "--precision",
    "train_batch_size": "--micro_batch; --batch_size counts the pairs of a step on all GPUs",
    "resume_from_checkpoint": "left out: the same command resumes", "checkpointing_steps": "--save_every",
    "pretrained_model_name_or_path": "--model", "dataset_name": "--data",
    "lr_warmup_steps": "--warmup", "rank": "--lora_rank"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError where argparse would print its usage and exit.

    It expands ~ in paths, because the shell leaves it in --out=~/run.
    """

    def parse_args(self, args=None, namespace=None):
        home = os.path.expanduser("~")
        args = sys.argv[1:] if args is None else args
        return super().parse_args([re.sub(r"^([\w.-]+=)?~(?=/|$)", rf"\g<1>{home}", arg) for arg in args], namespace)

    def error(self, message):
        for theirs, ours in RENAMED.items():
            if re.search(rf"--{theirs}\b", message):
                message += f". Here --{theirs} is {ours}"
        raise InputError(message)


def brief(error):
    """The first line of an exception's text, for messages of one line. A line that ends with a colon takes the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def cannot_read(file, error):
    """The InputError for data that cannot be read."""
    why = brief(error)[:300]
    if is_pointer(file):
        why = POINTER
    elif getattr(error, "errno", None) in NO_LOCKS:
        why += ". Set HF_HOME to a folder on a file system with locks"
    return InputError(f"--data {file} cannot be read: {why}")


def is_pointer(file):
    """Whether a file is what git leaves in the place of a large file, if git-lfs did not fetch it."""
    path = Path(file)
    return path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS)


def cache_folder():
    """The folder for files that are built or downloaded on first use."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-rpo"


def read_text(file):
    """The text of a file. ValueError if it is not UTF-8, or a pointer of git-lfs."""
    if is_pointer(file):
        raise ValueError(POINTER)
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"it is not UTF-8 ({error}); save it as UTF-8")


@contextlib.contextmanager
def one_line_errors(program, advice=""):
    """The body of a command: an error with a known meaning ends it with one line and exit code 1.

    Each process prints its own error, because it may be the only one that failed.

    advice  what helps when memory runs out
    """
    try:
        yield
        return
    except (Exception, ReaderDied) as error:
        message = one_line(error, advice)
        if message is None:
            raise
    rank = int(os.environ.get("RANK", 0))
    name = f"process {rank}: " if rank else ""
    sys.exit(f"{program}: {name}{message}")


def one_line(error, advice):
    """The line for an error with a known meaning; None for any other error."""
    text = str(error).strip()
    # torch's DataLoader puts the traceback of its process before the message.
    line = text.splitlines()[-1] if IN_WORKER in text else brief(error)
    if isinstance(error, (InputError, ReaderDied)):
        return line.removeprefix("common.InputError: ") if IN_WORKER in text else text
    line = line[:200]
    if isinstance(error, MemoryError) or re.search("out of memory|t allocate memory", text):
        return f"out of memory ({line}). {advice}"
    if re.search("No space left|os error 28|File too large|uota exceeded", text):
        return f"there is no room to write ({line}). Free some space, then the same command resumes"
    if isinstance(error, OSError) and error.errno in BAD_PATHS:
        return f"{line}. Is the path right, and may it be read and written?"


def hub_id(source):
    """`source` if it looks like NAMESPACE/NAME. FileNotFoundError otherwise: then it is a mistyped path."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError("there is no such file or folder")
    return source


def is_cache(source):
    file = Path(source) / "manifest.json"
    return file.is_file() and b'"encoders"' in file.read_bytes()


def read_manifest(source):
    """The manifest of a cache, finished or not. InputError if it is damaged."""
    file = Path(source) / "manifest.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error!r:.200}). Remove it and run the encode.py command that made "
                         "the cache once more: it writes the manifest anew")


def as_text(value):
    """A string, or UTF-8 bytes, as a string that can be written; None for anything else, also half a surrogate pair."""
    try:
        return value.decode() if isinstance(value, bytes) else value.encode().decode()
    except (AttributeError, UnicodeError):
        return None


def words_of(caption):
    """A prompt in lower case with single blanks: two prompts that differ in these alone count as one."""
    return " ".join(caption.casefold().split())


def is_hidden(path, marks="."):
    """Whether a part of a relative path begins with one of `marks`, as in .DS_Store, ._x or .ipynb_checkpoints."""
    return any(part[0] in marks for part in Path(path).parts)


def keyed_generator(*key):
    """A CPU random generator whose state is a function of its key (integers and strings) alone."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)


def digest(content):
    """16 hex digits of bytes, of a network's tensors (name, type, shape, values), or of anything's JSON."""
    sha = hashlib.sha256()
    if isinstance(content, torch.nn.Module):
        for name, tensor in sorted(content.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
            sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(content, bytes):
        sha.update(content)
    else:
        sha.update(json.dumps(content, sort_keys=True).encode())
    return sha.hexdigest()[:16]


def image_id(content):
    """A 64-bit hash of encoded bytes as a signed integer: equal only for the same file."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def fingerprint(network):
    """16 hex digits of a network: names and shapes of its tensors; their first, middle and last values in float32.

    It is quick at any size and does not depend on the layout of files. It misses a change of other values alone.
    """
    samples = []
    for name, tensor in sorted(network.state_dict().items()):
        flat, middle = tensor.flatten(), tensor.numel() // 2
        ends = torch.cat([flat[:16], flat[middle:middle + 16], flat[-16:]])
        samples.append([name, [*tensor.shape], ends.float().cpu().numpy().tobytes().hex()])
    return digest(samples)


def clip_tokenizer(length):
    """transformers' CLIPTokenizer with CLIP's own vocabulary, which open_clip ships."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    tokenizer = SimpleTokenizer()
    words = [*tokenizer.encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, [*tokenizer.bpe_ranks], model_max_length=length)


def atomic_write(file, content, suffix=""):
    """Writes text or bytes to a file. It is written aside, flushed and renamed, so nobody reads half of it.

    suffix  a name of this process, where several processes may write the same file
    """
    part = file.with_name(f"{file.name}{suffix}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_csv(file, names, rows):
    """Writes dicts as the rows of a csv file with these columns, atomically. None and missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(file, text.getvalue())


@contextlib.contextmanager
def locked(file, seconds=-1):
    """Holds a lock file. InputError if another process holds it for so long (-1: wait as long as it takes).

    On a file system without locks, a hidden file that names its owner is the lock. If the owner is dead, filelock
    removes it.
    """
    lock, way_out = filelock.FileLock(file, timeout=seconds), ""
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            soft = file.with_name(f".{file.name}")
            lock, way_out = filelock.SoftFileLock(soft, timeout=seconds), f". If there is none, remove {soft}"
            lock.acquire()
    except filelock.Timeout:
        raise InputError(f"another live run is writing to {file.parent}{way_out}")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def run_folder(folder):
    """Makes `folder` and keeps other live runs out of it. It leaves no trace if nothing else was written."""
    folder = Path(folder)
    nearest = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder} cannot be made: {nearest} is no folder that can be written to")
    is_new = not folder.exists()
    if int(os.environ.get("RANK", 0)) > 0:
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "lock", 2):
            try:
                yield folder
            finally:
                if {file.name for file in folder.iterdir()} <= {"lock", ".lock"}:
                    (folder / "lock").unlink()
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def newest_checkpoint(folder):
    """The file of a folder's last checkpoint, or None."""
    return max(folder.glob("checkpoint-*.pt"), default=None)


def save_checkpoint(folder, state):
    """Writes checkpoint-STEP.pt aside, flushes it, renames it, and removes the earlier ones."""
    file = folder / f"checkpoint-{state['step']:06d}.pt"
    part = file.with_suffix(".part")
    try:
        with open(part, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{file} cannot be written ({brief(error)[:200]}). Kept: "
                         f"{newest_checkpoint(folder) or 'no checkpoint'}. Free some space, then the same command "
                         "resumes")
    part.replace(file)
    for old in folder.glob("checkpoint-*.pt"):
        if old != file:
            old.unlink()


class CheckpointWriter:
    """Writes the checkpoints of a folder in a thread, one at a time, from copies in the host's memory."""

    def __init__(self, folder):
        self.folder, self.thread, self.error = folder, None, None

    def save(self, state):
        """Starts to write a state, once the one before is written."""
        self.wait()
        state = tree_map(lambda x: x.detach().to("cpu", copy=True) if torch.is_tensor(x) else x, state)
        self.thread = threading.Thread(target=self.write, args=(state,), daemon=True)  # Ctrl-C ends it, too
        self.thread.start()

    def write(self, state):
        try:
            save_checkpoint(self.folder, state)
        except Exception as error:
            self.error = error

    def check(self):
        """Raises the thread's error, if it had one."""
        error, self.error = self.error, None
        if error:
            raise error

    def wait(self):
        """Returns when all is written. InputError if it cannot be written."""
        if self.thread:
            self.thread.join()
        self.check()


def is_record(line, start):
    """Whether a line of log.jsonl is whole, of a step before `start`."""
    try:
        return json.loads(line)["step"] < start
    except (ValueError, TypeError, KeyError):
        return False


class Log:
    """log.jsonl, a line per step, and the trackers of extras/trackers.py (TensorBoard, Weights & Biases).

    Lines from step `start` on are cut off: these steps come again. So is half a line, as a full disk leaves it.
    """

    def __init__(self, folder, start):
        file = folder / "log.jsonl"
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        atomic_write(file, "".join(f"{line}\n" for line in text.splitlines() if is_record(line, start)))
        self.stream = open(file, "a", encoding="utf-8")
        self.trackers = importlib.import_module("extras.trackers").open_trackers(folder, start)

    def write(self, step, scalars):
        print(json.dumps({"step": step} | scalars), file=self.stream, flush=True)
        for track in self.trackers:
            track(step, scalars)

    def sync(self):
        os.fsync(self.stream.fileno())
