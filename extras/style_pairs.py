"""Make preference pairs of a style, as in arXiv:2406.06382, from any diffusers model, and train on them.

    python -m extras.style_pairs --model sdxl --prompts prompts.txt --style van-gogh --held_out 1000 --out van-gogh
    python -m extras.style_pairs --images photos --prompts captions.txt --editor timbrooks/instruct-pix2pix ...
    torchrun --nproc_per_node=8 -m extras.style_pairs ...                                       on eight GPUs
    python train.py --model sd15 --data van-gogh/pairs --steps 500 --batch_size 64 --lr 6.4e-7 --warmup 50 --out out/vg
    python evaluate.py generate --model sd15 --prompts van-gogh/prompts.json --out images/vg-base
    python evaluate.py generate --model out/vg/model --prompts van-gogh/prompts.json --out images/vg-rpo
    python evaluate.py style images/vg-rpo --reference van-gogh/reference --base images/vg-base

Every prompt gets two images. The rejected one is plain: --model draws it, or it comes from the folder --images. The
chosen one shows the same content in the style. There are two ways to make it:

- With --editor, an InstructPix2Pix model edits the plain image by an instruction. The paper made its sets in this way,
  with other editors, on Pick-a-Pic's images.
- Without --editor, --model makes it by image-to-image from the plain image's latents. The prompt is put in the words of
  the style, and --strength sets how far the image may change.

The command writes to --out:

    pairs/*.parquet  the pairs in Pick-a-Pic's schema; the caption is the plain prompt
    prompts.json     --held_out prompts that are in no pair, for evaluation
    reference/*.png  the styled images of these prompts
    images/          the plain and the styled image of every prompt

If it is killed, the same command resumes.
"""

import distributed  # first: it notes the launcher, before the imports that take seconds

import inspect
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image, ImageOps
from tqdm import tqdm

import common
import evaluate
import report
from common import InputError, keyed_generator
from extras.prompts import read_prompts
from flow_models import Flux, Flux2Klein, QwenImage, ZImage
from loading import load_model, load_pipeline, model_index, weights_digest
from models import StableDiffusion, StableDiffusionXL, cast_for_autocast
from pictures import read_image

STYLES = {  # the paper's styles, in our words; --style takes any other text with a {} for the prompt
    "van-gogh": "{}, an oil painting in the style of Vincent van Gogh, swirling thick brush strokes",
    "sketch": "{}, a black and white pencil sketch, line drawing on paper",
    "winter": "{}, in deep winter, covered in snow and frost",
}
EDITS = {  # the same styles as instructions to an editor; --style takes any other text
    "van-gogh": "turn it into an oil painting by Vincent van Gogh",
    "sketch": "turn it into a black and white pencil sketch",
    "winter": "make it deep winter, covered in snow and frost",
}
EDITORS = {  # pipelines that see the image beside the noise; the family that loads and runs each
    "StableDiffusionInstructPix2PixPipeline": StableDiffusion,
    "StableDiffusionXLInstructPix2PixPipeline": StableDiffusionXL,
}
UNTRIED = (Flux, Flux2Klein, QwenImage, ZImage)  # by image-to-image
SHARD = 100  # pairs in a parquet file: Arrow takes 2 GB at once, and a picture may have 5 MB
ADVICE = "The same command resumes with a smaller --batch_size; in another --out, --device cpu helps"


def parse_args(argv=None):
    """The options; the name of a style is replaced by its words. InputError if an option is wrong."""
    parser = common.Parser(prog="style_pairs.py", allow_abbrev=False)

    add = parser.add_argument
    add("--model", default="tiny", help="a preset's name, a diffusers folder or a hub id; only SD, SDXL and SD3 work without --editor [tiny]")
    add("--images", metavar="DIR", help="with --editor: plain images in the place of --model's, sorted by name, one per prompt")
    add("--editor", metavar="MODEL", help="an InstructPix2Pix model, folder or hub id, that makes the styled images")
    add("--prompts", required=True, metavar="PROMPTS", help="as for evaluate.py generate; a repeated one counts once")
    add("--style", required=True, help=f"{', '.join(STYLES)}, or your words: text with a {{}} for the prompt; with "
        "--editor, an instruction")
    add("--out", required=True, metavar="DIR")
    add("--strength", type=float, default=0.7, help="without --editor: how far to change the image, up to 1 [0.7]")
    add("--image_guidance", type=float, default=1.5, help="with --editor: how close to stay to the image [1.5]")
    add("--held_out", type=int, default=0, metavar="N", help="prompts to keep apart for the reference images")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50, help="denoising steps [50]")
    add("--guidance", type=float, help="classifier-free guidance [the model's own]")
    add("--resolution", type=int, help="side of the images in pixels [the model's own]")
    add("--batch_size", type=int, default=4, help="pairs at once [4]")
    add("--precision", choices=[*common.DTYPES], help="[bf16 on cuda, else fp32]")
    add("--device", help="cuda, mps or cpu [the best there is]")
    args = parser.parse_args(argv)

    name = args.style
    args.style = (EDITS if args.editor else STYLES).get(name, name)
    if "{}" not in args.style and not args.editor:
        parser.error(f"--style {name}: give {', '.join(STYLES)}, or words with a {{}} for the prompt")
    if args.images and not args.editor:
        parser.error("--images needs --editor, which makes the styled images")
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, not {args.batch_size}")
    if not 0 < args.strength <= 1 or int(args.steps * args.strength) < 1:
        parser.error(f"--strength {args.strength} leaves none of {args.steps} steps; it must be above 0 and at most 1")
    return args


def split_prompts(args):
    """(the different prompts, the numbers of the held-out ones, the files of their images or None).

    A repeated prompt counts once, with its first image. Otherwise it could be held out and also be in a pair.
    """
    listed = read_prompts(args.prompts)
    prompts, images = list(dict.fromkeys(listed)), None
    if args.images:
        found = report.image_files(args.images)
        if len(found) != len(listed):
            raise InputError(f"--images {args.images} holds {len(found)} images, but {args.prompts} has "
                             f"{len(listed)} prompts")
        first = dict(zip(reversed(listed), reversed(found)))  # a dict keeps the last value, here the first image
        images = [first[prompt] for prompt in prompts]
    if not 0 <= args.held_out < len(prompts):
        raise InputError(f"--held_out {args.held_out}: {len(prompts)} different prompts would leave no pair")
    order = torch.randperm(len(prompts), generator=keyed_generator(args.seed, "held out")).tolist()
    return prompts, sorted(order[:args.held_out]), images


def load_editor(source):
    """The InstructPix2Pix model of a diffusers folder or hub id, frozen and float32, as a model family."""
    try:
        kind = model_index(source)["_class_name"]
        if kind not in EDITORS:
            raise ValueError(f"it is a {kind}, not an InstructPix2Pix pipeline")
        return EDITORS[kind](load_pipeline(source, EDITORS[kind]))
    except Exception as error:
        raise InputError(f"--editor {source} cannot be loaded: {common.brief(error)}")


def files(out, i):
    """The files of the plain and of the styled image of prompt i."""
    return [out / "images" / f"{i:05d}-{kind}.png" for kind in ("plain", "styled")]


def claim_folder(out, args, models, prompts, images, dtype):
    """Writes the manifest: all that decides the images. InputError if `out` was begun with something else."""
    manifest = {"style": args.style, "seed": args.seed, "steps": args.steps, "guidance": args.guidance,
                "resolution": args.resolution, "held_out": args.held_out, "prompts": common.digest(prompts),
                "precision": str(dtype)}
    if images:
        manifest["images"] = common.digest([common.digest(file.read_bytes()) for file in images])
    if args.editor:
        manifest["image_guidance"] = args.image_guidance
    else:
        manifest["strength"] = args.strength
    for name, model in models.items():
        manifest[f"{name}: weights"] = weights_digest(model)
        manifest[f"{name}: scheduler"] = str(sorted(model.pipe.scheduler.config.items()))
    file = out / "manifest.json"
    if file.exists():
        before = report.read_json(file)
        for key, value in manifest.items():
            if before.get(key) != value:
                raise InputError(f"{out} was begun with {key} {before.get(key)!r}, not {value!r}; give another --out")
    elif any(out.glob("*")):
        raise InputError(f"{out} holds other files; give another --out")
    (out / "images").mkdir(parents=True, exist_ok=True)
    common.atomic_write(file, json.dumps(manifest | {"model": args.model, "editor": args.editor}, indent=1))


def read_square(file, side):
    """The middle square of a picture, resized to side x side pixels."""
    try:
        return ImageOps.fit(read_image(file.read_bytes()), (side, side), Image.Resampling.BICUBIC)
    except Exception as error:
        raise InputError(f"{file} cannot be read ({common.brief(error)}); remove it and its prompt")


def make_images(out, args, models, prompts, images, dtype):
    """Draws this process's share of the plain and styled images that are missing."""
    model, editor = models.get("model"), models.get("editor")
    if not editor:
        restyle = AutoPipelineForImage2Image.from_pipe(model.pipe)
        restyle.set_progress_bar_config(disable=True)
    for batch in distributed.pending_batches(len(prompts), args.batch_size, lambda i: files(out, i), "pairs"):
        plain_prompts = [prompts[i] for i in batch]
        styled_prompts = [args.style.replace("{}", prompt) for prompt in plain_prompts]
        plain_noise = [keyed_generator(args.seed, "sample", i) for i in batch]  # the noise of evaluate.py generate
        styled_noise = [keyed_generator(args.seed, "style", i) for i in batch]

        if images:
            plain_images = [read_square(images[i], args.resolution) for i in batch]
        else:
            plain = model.sample(plain_prompts, plain_noise, args.steps, args.guidance, dtype,
                                 height=args.resolution, width=args.resolution)
            plain_images = report.to_pil(model.decode(plain))
        if editor:
            # SDXL's editor draws its own size unless it is told one; SD's takes the image's.
            names = inspect.signature(editor.pipe.__call__).parameters
            size = {name: args.resolution for name in ("height", "width") if name in names}
            styled = editor.sample(styled_prompts, styled_noise, args.steps, args.guidance, dtype,
                                   image=plain_images, image_guidance_scale=args.image_guidance, **size)
            styled_images = report.to_pil(editor.decode(styled))
        else:
            styled = model.sample(styled_prompts, styled_noise, args.steps, args.guidance, dtype,
                                  pipe=restyle, image=plain, strength=args.strength)
            styled_images = report.to_pil(model.decode(styled))
        for i, plain_image, styled_image in zip(batch, plain_images, styled_images):
            plain_file, styled_file = files(out, i)
            report.save_png(plain_image, plain_file)
            report.save_png(styled_image, styled_file)


def pack(out, args, prompts, held_out):
    """Writes the parquet files, the reference images and their prompts, from the images that were made."""
    import datasets

    def row(i):
        plain, styled = files(out, i)
        return {"caption": prompts[i], "jpg_0": styled.read_bytes(), "jpg_1": plain.read_bytes(),
                "label_0": 1.0, "label_1": 0.0, "are_different": True, "has_label": True,
                "model_0": f"{args.editor or args.model}: {args.style}", "model_1": args.images or args.model}

    (out / "pairs").mkdir(exist_ok=True)
    paired = [i for i in range(len(prompts)) if i not in held_out]
    for start in tqdm(range(0, len(paired), SHARD), "parquet files"):
        file = out / "pairs" / f"train-{start // SHARD:05d}.parquet"
        part = file.with_suffix(".part")
        rows = [row(i) for i in paired[start:start + SHARD]]
        datasets.Dataset.from_list(rows).to_parquet(part)
        part.replace(file)

    (out / "reference").mkdir(exist_ok=True)
    for i in held_out:
        _, styled = files(out, i)
        shutil.copy(styled, out / "reference" / f"{i:05d}.png")
    held_out_prompts = [prompts[i] for i in held_out]
    common.atomic_write(out / "prompts.json", json.dumps(held_out_prompts, indent=1))


def main(argv=None):
    with common.one_line_errors("style_pairs.py", ADVICE):
        args = parse_args(argv)
        out = Path(args.out)
        prompts, held_out, images = split_prompts(args)
        device, dtype = evaluate.device_and_dtype(args)
        distributed.end_with_launcher()
        models = {}
        if not args.images:
            models["model"] = load_model(args.model)
            if isinstance(models["model"], UNTRIED) and not args.editor:
                raise InputError(f"--model {args.model}: image-to-image by its family is not supported; give --editor")
        if args.editor:
            models["editor"] = load_editor(args.editor)
        for model in models.values():
            model.check_scheduler()
        first, *_ = models.values()
        args.resolution = first.resolution(args.resolution, for_training=False)
        args.guidance = first.guidance if args.guidance is None else args.guidance
        rank, _, _ = distributed.torchrun_env()
        if rank == 0:
            claim_folder(out, args, models, prompts, images, dtype)
        distributed.wait_for_all()

        for model in models.values():
            cast_for_autocast(model.denoiser, dtype)
            model.pipe.to(device)
        make_images(out, args, models, prompts, images, dtype)
        distributed.wait_for_all()
        if rank == 0:
            pack(out, args, prompts, held_out)
            paired = len(prompts) - len(held_out)
            print(f"{paired} pairs in {out}/pairs, {len(held_out)} images in {out}/reference")


if __name__ == "__main__":
    main()
