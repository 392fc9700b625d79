"""How close images are to a style: the measurements behind `python evaluate.py style`.

    python evaluate.py style images/rpo --reference paintings --base images/base
"""

import argparse
import functools
import json

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from common import InputError, atomic_write, brief
from data import Clip
from distributed import get_device
from report import cells_of, comparable_folders, image_files, open_batches, table, writable_file
from stats import TAILS

STYLE = {  # {heading: how the cell is written from the numbers of a row}
    "images": "{images}{base}", "CMMD": "{cmmd:.3f}", "95%": "{cmmd_95[0]:.3f} to {cmmd_95[1]:.3f}",
    "as published": "{cmmd_published:.3f}", "FID": "{fid:.2f}", "Gram": "{gram:.4g}", "CLIP score": "{clip:.2f}",
    "diversity": "{diversity:.4f}", "N": "{n}"}


def add_options(add):
    add("--reference", metavar="DIR", required=True, help="images in the style that training did not see")
    add("--base", metavar="DIR", help="images of the model before training")
    add("--clip", metavar="ARCH:WEIGHTS", help="CLIP for CMMD [ViT-L-14-336-quickgelu:openai; for a toy model tiny]")
    add("--fid", action=argparse.BooleanOptionalAction, default=True, help="FID, if torch-fidelity is installed [yes]")
    add("--gram", action=argparse.BooleanOptionalAction, help="distance of VGG-19's Gram matrices [yes; toy model no]")
    add("--seed", type=int, default=0, help="seed of the reference's split and of the bootstrap [%(default)s]")
    add("--out", metavar="FILE.json", help="write the table's numbers to this file")


def measure_style(args):
    """Measure how close images are to a style: CMMD, FID and Gram distance to a reference.

    The reference is split at random. Every set of images is compared with the first half; comparing the second half
    with it gives the floor, which a perfect model would reach. All sets have the same size N, the largest possible.
    """
    device = get_device(args.device)
    paths = args.folders + ([args.base] if args.base else [])
    folders = comparable_folders(paths)
    first = folders[0]
    is_toy = first.manifest.get("toy")
    reference = image_files(args.reference)
    n = min(len(reference) // 2, len(first.files))
    if n < 2:
        raise InputError(f"--reference {args.reference} holds {len(reference)} images, {first.path} "
                         f"{len(first.files)}; at least 4 and 2 are needed")
    out = writable_file(args.out) if args.out else None

    # The choice is random because lists of prompts are sorted by kind.
    rng = np.random.default_rng(args.seed)
    reference = [reference[i] for i in rng.permutation(len(reference))]
    chosen = sorted(rng.permutation(len(first.files))[:n])
    sets = [(path, [folder.files[i] for i in chosen]) for path, folder in zip(paths, folders)]
    sets.append(("floor", reference[n:2 * n]))

    spec = args.clip or ("tiny" if is_toy else "ViT-L-14-336-quickgelu:openai")
    clip = Clip(spec, device)
    fid = inception(device) if args.fid else None
    gram = style_statistics(device) if args.gram or (args.gram is None and not is_toy) else None
    measure = functools.partial(embed, clip=clip, fid=fid, gram=gram, batch_size=args.batch_size)
    prompts = [first.prompts[i] for i in chosen]
    text = torch.cat([clip.embed_texts(prompts[i:i + args.batch_size]).cpu() for i in range(0, n, args.batch_size)])
    target, target_features, target_moments = measure("reference", reference[:n])
    rows = []
    for name, files in sets:
        x, features, moments = measure(name, files)
        value, interval = cmmd(x, target, draws=1000, seed=args.seed)
        rows.append({
            "images": name, "base": name == args.base, "n": n, "cmmd": value, "cmmd_95": interval,
            "cmmd_published": published_cmmd(x, target),
            "fid": frechet(features, target_features) if fid else None, "diversity": diversity(x),
            "gram": mean_squared_distance(moments, target_moments) if gram else None,
            "clip": None if name == "floor" else 100 * F.cosine_similarity(x, text).mean().item()})

    print(table([cells_of(row | {"base": " (base)" * row["base"]}, STYLE) for row in rows]))
    fid_by = "FID by torch-fidelity" if fid else "no FID: --no-fid, or torch-fidelity is not installed"
    gram_by = "Gram by torchvision's VGG-19, all images against all" if gram else "no Gram: --gram"
    print(f"Lower CMMD, FID and Gram mean closer to {args.reference}; the floor compares its two halves. CMMD is "
          "unbiased: compare with papers only as published, at their number of images. CLIP score (with the prompt) "
          f"and diversity fall if a model collapses. CLIP is {spec}; {fid_by}; {gram_by}.")
    if out:
        numbers = {"clip": spec, "reference": args.reference, "rows": rows}
        atomic_write(out, json.dumps(numbers, indent=1))


def embed(title, files, clip, fid, gram, batch_size):
    """(CLIP embeddings [N, E], FID's features [N, 2048], moments of the Gram vectors) of N images.

    The moments are the vectors' mean [D] and mean squared norm. Features and moments are None without `fid`, `gram`.
    """
    embeddings, features, total, squares = [], [], 0, 0
    for images in open_batches(files, batch_size, f"embedding {title}"):
        pixels = torch.stack([clip.transform(image) for image in images])               # [B, 3, h, w]
        embeddings.append(clip.embed_images(pixels).cpu())
        if fid:
            features.append(fid(images))
        if gram:  # only moments are kept: an image has D = 610,000 values
            vectors = gram(images).double()                                             # [B, D]
            total = total + vectors.sum(0)
            squares = squares + vectors.square().sum()
    moments = (total / len(files), squares / len(files)) if gram else None
    return torch.cat(embeddings), torch.cat(features) if fid else None, moments


def cmmd(x, y, draws=0, seed=0):
    """CMMD between two sets of images, unbiased, and its 95% interval over `draws` bootstrap samples of both sets.

    CMMD is 1000 times the squared MMD of unit vectors under the kernel exp(-|x - y|^2 / (2 * 10^2)); see
    arXiv:2401.09603. The paper has the biased estimate, we the U-statistic (Gretton et al. 2012, lemma 6). At this
    bandwidth it is close to 10 times the squared distance of the means: it misses a collapse that keeps the mean.
    A bootstrap sample never pairs an image with its own copy, and one of a single image is left out.

    x, y     embeddings [N, E] and [M, E], normalised here in float64
    returns  value, (low, high); the value may be negative. Without draws or four images the interval is None
    """
    x = F.normalize(x.double(), dim=-1)
    y = F.normalize(y.double(), dim=-1)
    rng = np.random.default_rng(seed)
    u = draw_counts(len(x), draws, rng)                                                 # [1 + draws, N]
    v = draw_counts(len(y), draws, rng)                                                 # [1 + draws, M]
    between = (u @ gaussian_kernel(x, y) * v).sum(1) / (u.sum(1) * v.sum(1))
    values = 1000 * (mean_within(u, x) + mean_within(v, y) - 2 * between)               # [1 + draws]
    if draws == 0 or min(len(x), len(y)) < 4:
        return values[0].item(), None
    low, high = np.nanquantile(values[1:], TAILS)
    return values[0].item(), (float(low), float(high))


def published_cmmd(x, y):
    """CMMD by the V-statistic of arXiv:2401.09603 and its code, to stand beside published numbers.

    It pairs an image with itself, too, and so is biased upward: by about 0.2 at 30 images and 0.005 at 1,000.
    """
    x = F.normalize(x.double(), dim=-1)
    y = F.normalize(y.double(), dim=-1)
    within = gaussian_kernel(x, x).mean() + gaussian_kernel(y, y).mean()
    return (1000 * (within - 2 * gaussian_kernel(x, y).mean())).item()


def draw_counts(n, draws, rng):
    """[1 + draws, n]: how often a sample holds each of n images. Row 0 is the set itself, the others are drawn."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn])).double()


def gaussian_kernel(x, y, bandwidth=10):
    """[N, M]: the kernel of unit vectors [N, E] and [M, E]. For these |x - y|^2 = 2 - 2 x.y."""
    return torch.exp((x @ y.T - 1) / bandwidth ** 2)


def mean_within(counts, x):
    """The kernel's mean over pairs of different images, for samples that hold image i of x counts[:, i] times."""
    same = (counts * counts).sum(1)  # pairs of an image with itself or its copy; their kernel is 1
    total = (counts @ gaussian_kernel(x, x) * counts).sum(1)
    return (total - same) / (counts.sum(1) ** 2 - same)


def frechet(x, y):
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [N, E] and [M, E], in float64.

    See arXiv:1706.08500. It is strongly biased at small N: compare only values of the same N.
    """
    x, y = x.double(), y.double()
    c_x, c_y = x.T.cov(), y.T.cov()                                                     # [E, E]
    # C_x C_y has the eigenvalues of the symmetric matrix C_x^(1/2) C_y C_x^(1/2).
    eigenvalues, vectors = torch.linalg.eigh(c_x)
    root = vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T                        # C_x^(1/2)
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + c_x.trace() + c_y.trace() - 2 * cross).item()


def inception(device):
    """A function from PIL pictures to FID's features [N, 2048]; None if torch-fidelity is not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except Exception as error:
        raise InputError(f"style: the network of FID cannot be loaded ({brief(error)}); give --no-fid")

    def features(images):
        pixels = [torch.tensor(np.array(image)).permute(2, 0, 1)[None] for image in images]     # [1, 3, H, W]
        return torch.cat([network(x.to(device))[0].cpu() for x in pixels])  # one at a time: they may differ in size

    return features


def style_statistics(device):
    """A function from PIL pictures to [N, D]. Squared distances of its rows are the style loss of arXiv:1508.06576.

    A Gram matrix is G = F F^T / (c h w), F [c, h w] being VGG-19's features after relu1_1, 2_1, 3_1, 4_1 or 5_1.
    The loss is the sum over these layers of 1/5 * 1/4 * |G - G'|^2. Weights and preprocessing are torchvision's.
    """
    try:
        weights = torchvision.models.VGG19_Weights.DEFAULT
        layers = torchvision.models.vgg19(weights=weights).features.to(device).eval()
    except Exception as error:
        raise InputError(f"style: VGG-19 cannot be loaded ({brief(error)}); give --no-gram")
    preprocess = weights.transforms()
    style_layers = (1, 6, 11, 20, 29)  # relu1_1, 2_1, 3_1, 4_1, 5_1

    @torch.inference_mode()
    def statistics(images):
        x, grams = torch.stack([preprocess(image) for image in images]).to(device), []
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in style_layers:
                features = x.flatten(2)                                                 # [N, c, h w]
                gram = features @ features.mT / features[0].numel()                     # [N, c, c]
                grams.append(gram.flatten(1).cpu())
        return torch.cat(grams, dim=1) / (4 * len(style_layers)) ** 0.5                 # [N, D]

    return statistics


def mean_squared_distance(x, y):
    """Mean of |a - b|^2 over all pairs of two sets of vectors, each given by its mean [D] and mean squared norm."""
    (mean_x, square_x), (mean_y, square_y) = x, y
    return (square_x + square_y - 2 * mean_x @ mean_y).item()


def diversity(x):
    """Mean cosine distance of two different images of [N, E]. It is 0 for a model that always draws the same image."""
    n = len(x)
    x = F.normalize(x.double(), dim=-1)
    total = x.sum(0).square().sum()  # the sum of all N^2 cosines; N of them are 1, an image with itself
    return (1 - (total - n) / (n * (n - 1))).item()
