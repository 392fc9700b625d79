"""Make preference pairs of a style, as in arXiv:2406.06382, from any diffusers model, and train on them.

    python style_pairs.py --model sdxl --prompts prompts.txt --style van-gogh --held_out 1000 --out van-gogh
    torchrun --nproc_per_node=8 style_pairs.py ...                                              on eight GPUs
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

import resume  # first, to know the launcher

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
from loss import cast_for_autocast

STYLES = {  # of the paper, in words of ours; anything else with a {} for the prompt is a style, too
    "van-gogh": "{}, an oil painting in the style of Vincent van Gogh, swirling thick brush strokes",
    "sketch": "{}, a black and white pencil sketch, line drawing on paper",
    "winter": "{}, in deep winter, covered in snow and frost",
}
SHARD = 100  # pairs in a parquet file; Arrow takes 2 GB of them, and a picture may have 5 MB


def files(out, i):
    """The plain and the styled image of prompt i."""
    return [out / "images" / f"{i:05d}-{kind}.png" for kind in ("plain", "styled")]


def pack(out, prompts, held_out, words, model):
    """The parquet files, the reference images and their prompts, from the images that were made."""
    import datasets

    def row(i):
        plain, styled = files(out, i)
        return {"caption": prompts[i], "jpg_0": styled.read_bytes(), "jpg_1": plain.read_bytes(),
                "label_0": 1.0, "label_1": 0.0, "are_different": True, "has_label": True,
                "model_0": f"{model}: {words}", "model_1": model}

    paired = [i for i in range(len(prompts)) if i not in held_out]
    for folder in ("pairs", "reference"):
        (out / folder).mkdir(exist_ok=True)
    for k in tqdm(range(0, len(paired), SHARD), "parquet files"):
        file = out / "pairs" / f"train-{k // SHARD:05d}.parquet"
        shard = datasets.Dataset.from_list([row(i) for i in paired[k:k + SHARD]])
        shard.to_parquet(part := file.with_suffix(".part"))
        part.replace(file)
    for i in sorted(held_out):
        shutil.copy(files(out, i)[1], out / "reference" / f"{i:05d}.png")
    resume.write(out / "prompts.json", json.dumps([prompts[i] for i in sorted(held_out)], indent=1))


def main(argv=None):
    from diffusers import AutoPipelineForImage2Image

    p = argparse.ArgumentParser(prog="style_pairs.py", allow_abbrev=False)
    add = p.add_argument
    p.error = lambda message: sys.exit(f"style_pairs.py: {message}")
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
    add("--precision", choices=["fp32", "bf16", "fp16"], help="[bf16 on cuda, else fp32]")
    add("--device", help="cuda, mps or cpu [the best there is]")
    args = p.parse_args(argv)
    words = STYLES.get(args.style, args.style)
    if "{}" not in words:
        p.error(f"--style {args.style} is none of {', '.join(STYLES)} and has no {{}} for the prompt")
    if args.batch_size < 1:
        p.error(f"--batch_size must be at least 1, not {args.batch_size}")
    if not 0 < args.strength <= 1 or int(args.steps * args.strength) < 1:
        p.error(f"--strength {args.strength} of {args.steps} steps leaves none; it lies above 0, up to 1")
    # A prompt that stands there twice could be held out and in a pair.
    prompts = list(dict.fromkeys(evaluate.read_prompts(args.prompts)))
    if not 0 <= args.held_out < len(prompts):
        p.error(f"--held_out {args.held_out} leaves no pair of {len(prompts)} different prompts")
    order = torch.randperm(len(prompts), generator=data.keyed_generator(args.seed, "held out")).tolist()
    held_out = set(order[:args.held_out])

    (device, dtype), rank, out = evaluate.place(args), data.torchrun()[0], Path(args.out)
    resume.end_with_launcher()
    pipe = evaluate.load_model(args.model)
    side, guidance = evaluate.side_and_guidance(args, pipe)
    if rank == 0:
        made_by = {"style": words, "strength": args.strength, "seed": args.seed, "steps": args.steps,
                   "guidance": guidance, "resolution": side, "held_out": args.held_out,
                   "prompts": evaluate.digest(prompts), "weights": evaluate.fingerprint(pipe),
                   "precision": str(dtype), "scheduler": str(sorted(pipe.scheduler.config.items()))}
        file = out / "manifest.json"
        if not file.exists() and any(out.glob("*")):
            p.error(f"{out} holds something else; give another --out")
        before = evaluate.read_json(file) if file.exists() else made_by
        for key, value in made_by.items():
            if before.get(key) != value:
                p.error(f"{out} was begun with {key} {before.get(key)!r}, not {value!r}; give another --out")
        (out / "images").mkdir(parents=True, exist_ok=True)
        resume.write(file, json.dumps(made_by | {"model": args.model}, indent=1))
    evaluate.meet()
    cast_for_autocast(pipe.unet, dtype)
    pipe.to(device)
    restyle = AutoPipelineForImage2Image.from_pipe(pipe)
    restyle.set_progress_bar_config(disable=True)

    for batch in evaluate.still_to_make(len(prompts), args.batch_size, lambda i: files(out, i), "pairs"):
        def noise(name):
            return [data.keyed_generator(args.seed, name, i) for i in batch]

        plain = data.sample(pipe, [prompts[i] for i in batch], noise("sample"), args.steps, guidance, dtype,
                            height=side, width=side)
        styled = data.sample(restyle, [words.replace("{}", prompts[i]) for i in batch], noise("style"),
                             args.steps, guidance, dtype, image=plain, strength=args.strength)
        pictures = [evaluate.to_pil(data.decode_images(pipe.vae, latents)) for latents in (plain, styled)]
        for i, *pair in zip(batch, *pictures):
            for file, picture in zip(files(out, i), pair):
                evaluate.save_png(picture, file)
    evaluate.meet()
    if rank == 0:
        pack(out, prompts, held_out, words, args.model)
        print(f"{len(prompts) - len(held_out)} pairs in {out}/pairs, "
              f"{len(held_out)} images in {out}/reference")


if __name__ == "__main__":
    main()
