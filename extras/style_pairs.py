"""Make preference pairs of a style, as in arXiv:2406.06382, from any diffusers model, and train on them.

    python -m extras.style_pairs --model sdxl --prompts prompts.txt --style van-gogh --held_out 1000 --out van-gogh
    torchrun --nproc_per_node=8 -m extras.style_pairs ...                                       on eight GPUs
    python train.py --model sd15 --data van-gogh/pairs --steps 500 --batch_size 64 --lr 6.4e-7 --out out/vg
    python evaluate.py generate --model sd15 --prompts van-gogh/prompts.json --out images/vg-base
    python evaluate.py generate --model out/vg/model --prompts van-gogh/prompts.json --out images/vg-rpo
    python evaluate.py style images/vg-rpo --reference van-gogh/reference --base images/vg-base

For each prompt a plain image, the rejected one, and the chosen: image-to-image from the plain one's latents
with the prompt put in the words of the style, so that content stays and style changes, by --strength. It
leaves in --out: pairs/*.parquet in Pick-a-Pic's schema, the prompt as caption; reference/*.png, styled images
of --held_out prompts that are in no pair, and prompts.json, these prompts, for evaluation; images/, what both
were made of. Killed and given again, the same command goes on.
"""

import common  # first: it notes the launcher, before the imports that take seconds

import argparse
import json
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from common import InputError, keyed_generator
from models import cast_for_autocast

STYLES = {  # of the paper, in words of ours; anything else with a {} for the prompt is a style, too
    "van-gogh": "{}, an oil painting in the style of Vincent van Gogh, swirling thick brush strokes",
    "sketch": "{}, a black and white pencil sketch, line drawing on paper",
    "winter": "{}, in deep winter, covered in snow and frost",
}
SHARD = 100  # pairs in a parquet file; Arrow takes 2 GB of them, and a picture may have 5 MB
ADVICE = "A smaller --batch_size, or --device cpu, may go on"


def parse_args(argv=None):
    """The options; --style in its words. InputError on any that will not do."""
    parser = argparse.ArgumentParser(prog="style_pairs.py", allow_abbrev=False)

    def refuse(message):
        raise InputError(message)

    parser.error = refuse
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, sd15, sdxl, or a diffusers folder or hub id")
    add("--prompts", required=True, metavar="PROMPTS", help="as of evaluate.py generate; each is used once")
    add("--style", required=True, help=f"{', '.join(STYLES)}, or your words with a {{}} for the prompt")
    add("--out", required=True, metavar="DIR")
    add("--strength", type=float, default=0.7, help="how far the styled image goes from the plain")
    add("--held_out", type=int, default=0, metavar="N", help="prompts kept apart for the reference images")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance", type=float, help="classifier-free guidance [7.5; SDXL 5.0; a toy model 3.0]")
    add("--resolution", type=int, help="side of the images, pixels [the model's own]")
    add("--batch_size", type=int, default=4, help="pairs at once")
    add("--precision", choices=[*common.DTYPES], help="[bf16 on cuda, else fp32]")
    add("--device", help="cuda, mps or cpu [the best there is]")
    args = parser.parse_args(argv)

    name, args.style = args.style, STYLES.get(args.style, args.style)
    if "{}" not in args.style:
        refuse(f"--style {name} is none of {', '.join(STYLES)} and has no {{}} for the prompt")
    if args.batch_size < 1:
        refuse(f"--batch_size must be at least 1, not {args.batch_size}")
    if not 0 < args.strength <= 1 or int(args.steps * args.strength) < 1:
        refuse(f"--strength {args.strength} of {args.steps} steps leaves none; it lies above 0, up to 1")
    return args


def read_prompts(args):
    """(the different prompts, the numbers of those that are in no pair).

    A prompt that stands in the list twice could be held out and in a pair.
    """
    prompts = list(dict.fromkeys(evaluate.read_prompts(args.prompts)))
    if not 0 <= args.held_out < len(prompts):
        raise InputError(f"--held_out {args.held_out} leaves no pair of {len(prompts)} different prompts")
    order = torch.randperm(len(prompts), generator=keyed_generator(args.seed, "held out")).tolist()
    return prompts, sorted(order[:args.held_out])


def files(out, i):
    """The plain and the styled image of prompt i."""
    return [out / "images" / f"{i:05d}-{kind}.png" for kind in ("plain", "styled")]


def claim_folder(out, args, model, prompts, dtype):
    """Writes the manifest, all that makes the images; InputError where `out` was begun with anything else."""
    scheduler = sorted(model.pipe.scheduler.config.items())
    manifest = {"style": args.style, "strength": args.strength, "seed": args.seed, "steps": args.steps,
                "guidance": args.guidance, "resolution": args.resolution, "held_out": args.held_out,
                "prompts": common.digest(prompts), "weights": evaluate.weights_digest(model),
                "precision": str(dtype), "scheduler": str(scheduler)}
    file = out / "manifest.json"
    if file.exists():
        before = evaluate.read_json(file)
        for key, value in manifest.items():
            if before.get(key) != value:
                raise InputError(f"{out} was begun with {key} {before.get(key)!r}, not {value!r}; "
                                 "give another --out")
    elif any(out.glob("*")):
        raise InputError(f"{out} holds something else; give another --out")
    (out / "images").mkdir(parents=True, exist_ok=True)
    common.atomic_write(file, json.dumps(manifest | {"model": args.model}, indent=1))


def make_images(out, args, model, prompts, dtype):
    """Draws the plain and the styled images that are not there yet: this process's share."""
    from diffusers import AutoPipelineForImage2Image

    restyle = AutoPipelineForImage2Image.from_pipe(model.pipe)
    restyle.set_progress_bar_config(disable=True)
    for batch in evaluate.pending_batches(len(prompts), args.batch_size, lambda i: files(out, i), "pairs"):
        plain_prompts = [prompts[i] for i in batch]
        styled_prompts = [args.style.replace("{}", prompt) for prompt in plain_prompts]
        plain_noise = [keyed_generator(args.seed, "sample", i) for i in batch]  # that of evaluate.py generate
        styled_noise = [keyed_generator(args.seed, "style", i) for i in batch]

        plain = model.sample(plain_prompts, plain_noise, args.steps, args.guidance, dtype,
                             height=args.resolution, width=args.resolution)
        styled = model.sample(styled_prompts, styled_noise, args.steps, args.guidance, dtype,
                              pipe=restyle, image=plain, strength=args.strength)

        plain_images = evaluate.to_pil(model.decode(plain))
        styled_images = evaluate.to_pil(model.decode(styled))
        for i, plain_image, styled_image in zip(batch, plain_images, styled_images):
            plain_file, styled_file = files(out, i)
            evaluate.save_png(plain_image, plain_file)
            evaluate.save_png(styled_image, styled_file)


def pack(out, args, prompts, held_out):
    """The parquet files, the reference images and their prompts, from the images that were made."""
    import datasets

    def row(i):
        plain, styled = files(out, i)
        return {"caption": prompts[i], "jpg_0": styled.read_bytes(), "jpg_1": plain.read_bytes(),
                "label_0": 1.0, "label_1": 0.0, "are_different": True, "has_label": True,
                "model_0": f"{args.model}: {args.style}", "model_1": args.model}

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
        prompts, held_out = read_prompts(args)
        device, dtype = evaluate.device_and_dtype(args)
        common.end_with_launcher()
        model = evaluate.load_for_sampling(args.model)
        args.resolution, args.guidance = evaluate.resolution_and_guidance(args, model)
        rank, _, _ = common.torchrun_env()
        if rank == 0:
            claim_folder(out, args, model, prompts, dtype)
        evaluate.barrier()

        cast_for_autocast(model.denoiser, dtype)
        model.pipe.to(device)
        make_images(out, args, model, prompts, dtype)
        evaluate.barrier()
        if rank == 0:
            pack(out, args, prompts, held_out)
            paired = len(prompts) - len(held_out)
            print(f"{paired} pairs in {out}/pairs, {len(held_out)} images in {out}/reference")


if __name__ == "__main__":
    main()
