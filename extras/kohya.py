"""Writes an adapter of SD or SDXL with kohya's names, which ComfyUI and A1111 read.

    python -m extras.kohya out/sd15-rpo/model                       writes out/sd15-rpo/model-kohya.safetensors
    python -m extras.kohya adapter.safetensors --out kohya.safetensors

An adapter that was trained with --init_lora needs the first one, too. The file then holds both as one adapter, whose rank
is the sum of their ranks: B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2].

ComfyUI reads the adapters of SD3 and FLUX.1 as train.py writes them. Its `model_lora_keys_unet` (comfy/lora.py) knows their
layers as "transformer." plus diffusers' name, which it gets from `mmdit_to_diffusers` and `flux_to_diffusers`.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

import common
from common import InputError
from loading import LOWER_LORA, lora_file, lower_lora, refuse_other_adapters


def read_adapter(source):
    """{name of a layer: (A [rank, in], B [out, rank])} of an adapter as diffusers writes it for a UNet.

    B is multiplied by alpha / rank, which is 1 for an adapter of ours.

    source  a folder or a file
    raises  InputError if it is not such an adapter
    """
    if not Path(source).exists():
        raise InputError(f"{source}: there is no such folder or file. Download an adapter of the hub first")
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    name = lora_file(source)
    if not name or not name.endswith(".safetensors"):
        raise InputError(f"{source} does not hold one .safetensors file of LoRA weights")
    try:
        refuse_other_adapters(str(folder), name)
        with safe_open(folder / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except Exception as error:
        raise InputError(f"LoRA weights {source} cannot be read: {common.brief(error)}")
    if any(key.startswith("transformer.") for key in tensors):
        raise InputError(f"{source} is an adapter of a transformer; kohya's names are for UNets. ComfyUI reads {folder / name} "
                         "as it is if it is of SD3 or FLUX.1")
    if any(config.get(f"unet.{key}") for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")):
        raise InputError(f"{source}: its layers have other scales than alpha / rank. Fuse it with diffusers instead")

    layers = {}
    for key, tensor in tensors.items():
        for word, place in {".lora.down.weight": 0, ".lora_A.weight": 0, ".lora.up.weight": 1, ".lora_B.weight": 1}.items():
            if key.startswith("unet.") and key.endswith(word):
                layers.setdefault(key.removesuffix(word), [None, None])[place] = tensor.float()
                break
        else:
            raise InputError(f"{source}: {key} is no tensor of a UNet's adapter as diffusers names it")
    for name, (a, b) in layers.items():
        if a is None or b is None or a.ndim != 2:
            raise InputError(f"{source}: {name} is no adapter of a linear layer")
        layers[name] = a, b * (config.get("unet.lora_alpha", len(a)) / len(a))
    return layers


def with_lower(source):
    """The layers of an adapter, together with those of the adapter that it was trained above."""
    layers = read_adapter(source)
    below = lower_lora(source)
    if below:
        if not Path(below).exists():
            folder = Path(source) if Path(source).is_dir() else Path(source).parent
            raise InputError(f"{source} was trained above {below}, which is not here. Name its folder in "
                             f"{folder / LOWER_LORA}")
        for name, (a, b) in with_lower(below).items():
            if name in layers:
                a, b = torch.cat([a, layers[name][0]]), torch.cat([b, layers[name][1]], dim=1)
            layers[name] = a, b
    return layers


def parse_args(argv=None):
    parser = common.Parser(prog="kohya.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter", help="LoRA weights: a folder such as out/x/model, or a .safetensors file")
    parser.add_argument("--out", metavar="FILE", help="the file to write [FOLDER-kohya.safetensors]")
    return parser.parse_args(argv)


def main(argv=None):
    with common.one_line_errors("kohya.py"):
        from diffusers.utils import convert_state_dict_to_kohya

        args = parse_args(argv)
        if not args.out and not Path(args.adapter).is_dir():
            raise InputError(f"{args.adapter} is no folder, so pass --out FILE")
        folder = Path(os.path.abspath(args.adapter))
        out = Path(args.out or folder.with_name(f"{folder.name}-kohya.safetensors"))  # two files in a folder confuse diffusers
        if out.with_name(LOWER_LORA).exists():  # the file will hold both, and a reader would add the lower one again
            raise InputError(f"--out {out} lies beside {LOWER_LORA}; pass a file in another folder")
        weights = {}
        for name, (a, b) in with_lower(args.adapter).items():
            weights |= {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}
        out.parent.mkdir(parents=True, exist_ok=True)
        common.atomic_write(out, save(convert_state_dict_to_kohya(weights)))
        print(f"{out}: {len(weights) // 2} layers")


if __name__ == "__main__":
    main()
