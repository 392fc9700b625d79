"""Preference pairs as the training step wants them, out of images, and RPO's cross-pair weights.

A batch has B pairs. Index 0 of every axis of length 2 is the winner, index 1 the loser.

    every batch       prompt, caption   B strings: the prompt to train on ("" after prompt dropout), the prompt itself
                      row               [B] int64, row numbers, counted over all files in the order of their names
                      image_ids         [B, 2] int64, a 64-bit hash of each image's stored bytes
                      time_ids          [B, 2, 6] float32, SDXL's (height, width, crop top, left, target height, width)
                      unreadable        [(row, why), ...]: pairs that could not be used and were replaced
                      names in COLUMNS  [B] float32 each
    from a `Stream`   position          [B] int64
                      t, noise          [B] as in loss.py, [B, C, h, w] float32
                      vae_noise         [B, 2, C, h, w] float32, unless the mean of the VAE's posterior is taken
                      draw_id           [B, 3] float64, (row, t, a sum over the noise): identifies what was drawn
    pairs of images   pixels            [B, 2, 3, H, W] uint8, one crop and one flip for both images of a pair
                      clip_pixels       [B, 2, 3, h, w] float32, preprocessed for CLIP; only if CLIP embeds images
    a cache           mean, std         [B, 2, C, h, w], the VAE's posterior; std only if it is sampled
                      clip_embeds       [B, 3, E'] of caption, winner, loser
                      what the family's encode_prompts returns: prompt_embeds [B, L, E], ...; where L is the longest
                      prompt's, prompt_embeds_mask [B, L] float32 is 1 at a prompt's tokens and 0 behind them
"""

import concurrent.futures
import importlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

from common import InputError, brief, digest, fingerprint, image_id, keyed_generator
from distributed import to_device
from pictures import Unreadable, read_image, reason_of, stored_bytes
from sources import file_identities, find_source, read_rows

# Names of further columns of the data, a number per pair, that a loss may take as an argument: ("confidence",). Do not
# use a name that stands above or in loss.py, nor the name of an option. Encode a cache again after a change.
COLUMNS = ()


class Pairs(torch.utils.data.Dataset):
    """An endless stream of pairs: item p is pair p % n in the shuffle of epoch p // n, and `len` is n.

    A pair that cannot be decoded is replaced by the next readable pair of the epoch's order. So an item is a function
    of (seed, p) alone, and a run can start at any position without decoding what lies before it.

    A subclass sets rows [n] (row numbers of its pairs), num_rows, ties, unlabelled, left_out, and columns, {name:
    [num_rows] float32} with nan where a row has no value. It defines load(row), which returns the pair or raises
    Unreadable; caption(row); content(row, pair, epoch, prompt), which returns the tensors; and digest().
    """

    def __init__(self, seed, prompt_dropout):
        self.seed, self.prompt_dropout = seed, prompt_dropout
        self.unreadable = {}  # {row: why}
        self.num_held_out = 0  # how many pairs reference.hold_out took away
        self.epoch, self.order = None, None  # the last item's epoch and its shuffle [n]

    def __len__(self):
        return len(self.rows)

    def use(self, rows):
        """Keeps only these rows from now on."""
        self.rows, self.epoch = rows, None
        kept = set(rows.tolist())
        self.unreadable = {row: why for row, why in self.unreadable.items() if row in kept}

    def check_columns(self, names):
        """InputError if a column that the loss names is not in the data, or a pair has no value there."""
        for name in names:
            values = self.columns.get(name, np.full(self.num_rows, np.nan))[self.rows]
            lacking = self.rows[np.isnan(values) & ~np.isin(self.rows, [*self.unreadable])]
            if len(lacking):
                raise InputError(f"the loss takes {name}, but row {lacking[0]} of the data has no number there "
                                 f"({len(lacking)} of {len(self)} pairs have none)")

    def report(self):
        """The content of data.json. `unreadable` lists the rows that were met so far, by reason."""
        report = {"rows": self.num_rows, "used": len(self) - len(self.unreadable), "ties": self.ties,
                  "unlabelled": self.unlabelled, "unreadable": by_reason(self.unreadable), "left_out": self.left_out}
        if self.num_held_out:
            report["held_out"] = self.num_held_out
        return report

    def summary(self):
        """The report in one line."""
        reasons = [f"{len(rows)} {reason}" for reason, rows in by_reason(self.unreadable).items()]
        line = ("{rows} rows, {used} pairs used, {ties} ties dropped, {unlabelled} without a label, {bad} that "
                "cannot be read".format(bad=len(self.unreadable), **self.report()))
        if reasons:
            line += f" ({', '.join(reasons)})"
        if self.num_held_out:
            line += f", {self.num_held_out} held out"
        for name, reason in self.left_out.items():
            line += f"; {name} left out ({reason})"
        return line

    def row_at(self, position):
        """The row of item `position`, if all pairs were readable."""
        epoch, index = divmod(position, len(self))
        if self.epoch != epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator).numpy()
        return int(self.rows[self.order[index]])

    def __getitem__(self, position):
        epoch, start = divmod(position, len(self))
        unreadable = []
        for k in range(min(len(self), 1000)):
            row = self.row_at(epoch * len(self) + (start + k) % len(self))
            try:
                pair = self.load(row)
                break
            except Unreadable as error:
                unreadable.append((row, str(error)))
                cause = brief(error.__cause__ or error)
        else:
            raise InputError(f"{k + 1} pairs in a row cannot be decoded ({cause}). Is the storage gone?")
        drop = augmentation(self.seed, epoch, row)[3]
        caption = self.caption(row)
        prompt = "" if drop < self.prompt_dropout else caption
        item = {"prompt": prompt, "caption": caption, "row": torch.tensor(row), "unreadable": unreadable}
        return item | self.content(row, pair, epoch, prompt)


class ImagePairs(Pairs):
    """Pairs of images. An item is decoded, cropped and flipped when it is asked for.

    resolution      side of the training square, pixels
    clip_transform  a function from a picture to its `clip_pixels`, or None; may be set later
    source_rows     the source's `Rows`, if they were read already
    raises          InputError if the source cannot be read, has a wrong label or holds no pair
    """

    def __init__(self, source, resolution=None, seed=0, random_crop=False, random_flip=False, prompt_dropout=0.0,
                 clip_transform=None, source_rows=None):
        super().__init__(seed, prompt_dropout)
        self.resolution, self.clip_transform = resolution, clip_transform
        self.random_crop, self.random_flip = random_crop, random_flip
        self.source = find_source(source)
        self.source_rows = source_rows or read_rows(self.source, COLUMNS)
        self.images, self.left_out = self.source_rows.images, self.source_rows.left_out
        table = self.source_rows.columns.combine_chunks()
        self.num_rows = len(table)
        self.captions = table["caption"].combine_chunks()  # one piece, which forked processes share
        self.read_labels(*(table[name].to_numpy() for name in ("label_0", "label_1", "has_label")))
        if len(self) == 0:
            raise InputError(f"--data {source} holds no usable pair: {self.report()}")
        values = {name: table[name].to_numpy().astype(np.float32) for name in COLUMNS if name in table.column_names}
        self.columns = {name: column for name, column in values.items() if not np.isnan(column).all()}

    def read_labels(self, label, other, has_label):
        """Sets rows, winner_side, ties and unlabelled. A missing label_0, label_1 or has_label [num_rows] is nan."""
        labelled = ~np.isnan(label) & (has_label != 0)
        contradicted = ~np.isnan(other) & (label + other != 1)
        wrong = np.flatnonzero(labelled & (~np.isin(label, (0, 0.5, 1)) | contradicted))
        if len(wrong):
            first = ", ".join(f"row {row} ({label[row]:g}, {other[row]:g})" for row in wrong[:5])
            raise InputError(f"{len(wrong)} rows of {self.source} have a label_0 other than 0, 0.5 or 1, or a label_1 "
                             f"that is not 1 - label_0: {first}")
        tied = labelled & (label == 0.5)
        self.rows = np.flatnonzero(labelled & ~tied)
        self.winner_side = (label == 0).astype(int)                                     # [num_rows], 0 or 1
        self.ties, self.unlabelled = int(tied.sum()), int((~labelled).sum())

    def scan(self):
        """Decodes every pair once, so that `report` is complete. InputError if none can be decoded."""
        def fault(row):
            try:
                self.load(row)
            except Unreadable as error:  # its traceback would keep the images in memory
                return str(error), brief(error.__cause__ or error)[:300]

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = {int(row): why for row, why in zip(self.rows, pool.map(fault, self.rows)) if why}
        self.unreadable = {row: reason for row, (reason, _) in faults.items()}
        if len(faults) == len(self):
            reason, first = next(iter(faults.values()))
            if reason in ("no such file", "File name too long"):
                first += ". A path names a file, with / between folders, and is no address"
            raise InputError(f"--data {self.source} holds no usable pair: {self.summary()}. The first error is: {first}")

    def digest(self):
        """16 hex digits of rows, winners, captions, COLUMNS, and the files' names, sizes and samples of bytes.

        It does not depend on where the files lie. It does not see a picture that was replaced by another one of the
        same size, nor a picture that a parquet file names by its path.
        """
        content = [self.rows.tolist(), self.winner_side[self.rows].tolist(), [self.caption(row) for row in self.rows],
                   {name: values[self.rows].tolist() for name, values in self.columns.items()}]
        return digest(content + file_identities(self.source_rows))

    def caption(self, row):
        return self.captions[int(row)].as_py() or ""

    def load(self, row):
        """[(picture, image_id)] of a row's winner and loser. Unreadable if one cannot be decoded."""
        return self.decode(row, self.images[int(row)])

    def decode(self, row, cells):
        """The same for a row whose image cells were read already."""
        winner = self.winner_side[row]
        if not self.caption(row).strip():  # empty, or no text
            raise Unreadable("no prompt")
        try:  # bad bytes may raise any error
            stored = [stored_bytes(cells[f"jpg_{side}"]) for side in (winner, 1 - winner)]
            return [(read_image(content), image_id(content)) for content in stored]
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable(reason_of(error)) from error

    def content(self, row, pair, epoch, prompt):
        """The tensors of a row's two images, cropped and flipped as in this epoch."""
        y, x, flip, _ = augmentation(self.seed, epoch, row)
        if not self.random_crop:
            y = x = 0.5
        flip = self.random_flip and flip < 0.5
        cropped = [crop_and_resize(image, self.resolution, y, x, flip) for image, _ in pair]
        item = {"pixels": torch.stack([pixels for pixels, _ in cropped]),
                "time_ids": torch.stack([time_ids for _, time_ids in cropped]),
                "image_ids": torch.tensor([number for _, number in pair])}
        item |= {name: torch.tensor(values[row]) for name, values in self.columns.items()}
        if self.clip_transform:
            squares = [self.clip_transform(middle_square(image)) for image, _ in pair]
            item["clip_pixels"] = torch.stack(squares)
        return item


def augmentation(seed, epoch, row):
    """Four uniform numbers for a pair in an epoch: crop y, crop x, flip, prompt dropout."""
    return torch.rand(4, generator=keyed_generator(seed, "augment", epoch, row)).tolist()


def crop_and_resize(image, size, y, x, flip):
    """The square of side `size` pixels at (y, x), in [0, 1], of the image scaled to that short side.

    It crops before it scales, so a picture of 3 x 4000 pixels is never scaled as a whole. Returns pixels
    [3, size, size] uint8 and SDXL's time_ids [6]. The crop is counted in the scaled, flipped image, as in SDXL's training.
    """
    image = ImageOps.mirror(image) if flip else image
    scale = size / min(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    top, left = round(y * (height - size)), round(x * (width - size))
    right, bottom = min((left + size) / scale, image.width), min((top + size) / scale, image.height)
    box = (min(left / scale, image.width), min(top / scale, image.height), right, bottom)
    pixels = np.array(image.resize((size, size), Image.LANCZOS, box=box))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return pixels, torch.tensor([image.height, image.width, top, left, size, size], dtype=torch.float32)


def middle_square(image):
    """What CLIP's own crop keeps. It is cut before open_clip scales, or 3 x 4000 pixels would become millions."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def crop_summary(time_ids):
    """One line on what the square crop cuts off, by the time_ids [n, S, 6] of some pairs."""
    height, width = time_ids[..., 0], time_ids[..., 1]                                  # [n, S]
    kept = torch.minimum(height / width, width / height)
    bad = (kept < 2 / 3).any(dim=1).sum()
    return (f"the square crop keeps {kept.mean():.0%} of the first pictures; in {bad} of {len(kept)} pairs it cuts "
            "more than a third off one")


def by_reason(unreadable):
    """{row: why} -> {why: [row, ...]}."""
    rows = {}
    for row, reason in sorted(unreadable.items()):
        rows.setdefault(reason, []).append(row)
    return rows


def collate(items):
    """A list of items -> the batch at the head of this file."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch["unreadable"] = [entry for entries in batch["unreadable"] for entry in entries]
    for key, value in batch.items():
        if key.startswith("prompt_embeds"):
            batch[key] = pad_sequence(value, batch_first=True)  # prompts may differ in length; zeros make them equal
        elif value and torch.is_tensor(value[0]):
            batch[key] = torch.stack(value)
    return batch


class Stream(torch.utils.data.Dataset):
    """Item p: the pair at position p of the endless stream, with its timestep and its noise.

    Position p is pair p % batch_size of step p // batch_size. All draws are functions of (seed, step, index in the
    batch), not of the process or the micro-batch. They are drawn on the CPU, so every device sees the same. Both
    images of a pair share one timestep and one noise; the VAE's noise is each image's own.

    pairs         a `Pairs`
    process       its sample_t draws a timestep
    latent_shape  (C, h, w)
    args          seed, batch_size, group_size; group_noise, what the pairs of a group share: "own" (nothing),
                  "timestep", or "both" (timestep and noise); vae_sample, "mean" or "sample", which needs vae_noise
    """

    def __init__(self, pairs, process, latent_shape, args):
        self.pairs, self.process, self.latent_shape = pairs, process, latent_shape
        self.seed, self.batch_size = args.seed, args.batch_size
        self.group_size, self.group_noise = args.group_size, args.group_noise
        self.vae_sample = args.vae_sample

    def draw(self, position):
        """{"t": one timestep, "noise": [C, h, w]} of a position, and "vae_noise": [2, C, h, w] if it is used."""
        step, index = divmod(position, self.batch_size)
        first = index - index % self.group_size  # what a group shares is drawn as for its first pair
        t_index = index if self.group_noise == "own" else first
        noise_index = first if self.group_noise == "both" else index
        t_generator = keyed_generator(self.seed, "timestep", step, t_index)
        noise_generator = keyed_generator(self.seed, "noise", step, noise_index)
        drawn = {"t": self.sample_t(t_generator, index),
                 "noise": torch.randn(self.latent_shape, generator=noise_generator)}
        if self.vae_sample == "sample":
            vae_generator = keyed_generator(self.seed, "vae", step, index)
            drawn["vae_noise"] = torch.randn((2, *self.latent_shape), generator=vae_generator)
        return drawn

    def sample_t(self, generator, index):
        return self.process.sample_t(generator)

    def __getitem__(self, position):
        item = self.pairs[position] | self.draw(position)
        item["draw_id"] = self.draw_id(item["row"], item["t"], item["noise"])
        item["position"] = torch.tensor(position)
        return item

    def draw_id(self, row, t, noise):
        """(row, t, a weighted sum of the noise) [3] float64. Another draw changes it; another rounding hardly does."""
        weights = torch.linspace(1, 2, noise.numel(), dtype=torch.float64)
        return torch.tensor([row, t, noise.flatten().double() @ weights], dtype=torch.float64)

    def draw_ids(self, step, count=32):
        """The draw_ids [n, 3] of a step's first pairs, if all pairs were readable. Nothing is decoded."""
        ids = []
        first = step * self.batch_size
        for position in range(first, first + min(count, self.batch_size)):
            drawn = self.draw(position)
            ids.append(self.draw_id(self.pairs.row_at(position), drawn["t"], drawn["noise"]))
        return torch.stack(ids)


class Clip:
    """An open_clip model that embeds captions and images for `cross_pair_weights`.

    spec    ARCH:WEIGHTS, where WEIGHTS is a tag of open_clip, a local file or "random"; or "tiny", the embedded one
    raises  InputError if it is unknown or cannot be loaded
    """

    def __init__(self, spec, device="cpu", dtype=torch.float32):
        import open_clip

        arch, _, weights = spec.partition(":")
        if spec == "tiny":
            folder = importlib.import_module("extras.tiny").part("clip")
            arch, weights = f"local-dir:{folder}", None
        elif arch not in open_clip.list_models() or not weights:
            raise InputError(f"--clip {spec} is neither tiny nor ARCH:WEIGHTS, where ARCH is one of open_clip's")
        elif weights == "random":  # for --random_init
            weights = None
            torch.manual_seed(0)
        published = open_clip.pretrained.get_pretrained_cfg(arch, weights) if weights else {}
        try:  # OpenAI's weights need QuickGELU, about which open_clip only warns
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                arch, weights, force_quick_gelu=published.get("quick_gelu", False), device=device)
            self.tokenizer = open_clip.get_tokenizer(arch)
        except Exception as error:
            raise InputError(f"--clip {spec} cannot be loaded ({brief(error)}). Pass another ARCH:TAG, ARCH:FILE, or "
                             "tiny")
        self.model.eval().requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype

    @torch.no_grad()
    def embed_texts(self, captions):
        """B captions -> [B, E] float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.encode_text(to_device(self.tokenizer(captions), self.device)).float()

    @torch.no_grad()
    def embed_images(self, pixels):
        """N pictures, stacked after `transform` -> [N, E] float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.encode_image(to_device(pixels, self.device)).float()

    def digest(self):
        """16 hex digits of all that embeds: weights, architecture, preprocessing, tokenizer."""
        tokenizer = [type(self.tokenizer).__name__, getattr(self.tokenizer, "context_length", None)]
        preprocess = str(self.model.visual.preprocess_cfg)
        return digest([fingerprint(self.model), str(self.model), preprocess, tokenizer])

    def embed(self, captions, clip_pixels=None):
        """[B, 3, E]: text, image_w, image_l of B captions and clip_pixels [B, 2, 3, h, w]; zeros without images."""
        text = self.embed_texts(captions)                                               # [B, E]
        images = torch.zeros_like(text)[:, None].repeat(1, 2, 1)                        # [B, 2, E]
        if clip_pixels is not None:
            images = self.embed_images(clip_pixels.flatten(0, 1)).unflatten(0, (-1, 2))
        return torch.cat([text[:, None], images], 1)


def cross_pair_weights(text, image_w, image_l, tau, similarity="both", image_ids=None):
    """How much winner i is contrasted with loser j: w_ij = softmax over j of ( -d_ij / tau ), arXiv:2406.06382.

    d_ij is the cosine distance of the two captions ("text"), of winner i's image to loser j's ("image"), or the mean
    of both ("both"). If one image wins pair i and loses pair j, it would be nearest to itself, and the term would hold
    no preference. There w_ij is 0 and the row is renormalised; a row with nothing left takes its own loser.

    text, image_w, image_l  [B, E] CLIP embeddings of captions, winners, losers; they are normalised here, in float32.
                            Those that `similarity` does not use are ignored and may be None
    tau                     temperature > 0. Toward 0 only the nearest losers count. inf gives uniform weights and
                            needs no embeddings
    image_ids               [B, 2] int64 of winners and losers, equal for the same image. None means that all differ;
                            with tau = inf they are needed
    returns                 [B, B] float32, row i = winner i, column j = loser j, rows sum to 1
    """
    def cosine(a, b):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T        # [B, B]

    if math.isinf(tau):
        distance = torch.zeros(len(image_ids), len(image_ids), device=image_ids.device)
    elif similarity == "text":
        distance = 1 - cosine(text, text)
    elif similarity == "image":
        distance = 1 - cosine(image_w, image_l)
    else:
        distance = 1 - (cosine(text, text) + cosine(image_w, image_l)) / 2
    logits = -distance / tau                                                            # [B, B]
    if image_ids is None:
        return logits.softmax(dim=1)
    is_same = image_ids[:, 0, None] == image_ids[None, :, 1]                            # [B, B]
    weights = logits.masked_fill(is_same, -math.inf).softmax(dim=1)
    own_loser = torch.eye(len(weights), device=weights.device)
    return torch.where(is_same.all(dim=1, keepdim=True), own_loser, weights)
