"""HPSv3, arXiv:2508.03789: Qwen2-VL-7B with a head that rates a picture for a prompt. A scorer of scorers.py."""

import math
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import nn

import scorers
from common import InputError

HPSV3_PROMPT = Path(__file__).with_name("hpsv3.txt")  # the authors' text, MIT license, MizzenAI/HPSv3
HPSV3_PIXELS, QWEN_MERGE = 256 * 28 * 28, 28  # an image's pixels; the side of what becomes a token
QWEN_CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}"
             "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")  # Qwen2-VL's template of a chat


def hpsv3(source, device="cpu", dtype=torch.bfloat16):
    """`source` is HPSv3.safetensors or its folder. Qwen2-VL-7B-Instruct's other files may lie beside it.

    The authors' forward gives the language model no positions, so an image's tokens are counted like words, and not by
    row and column as in Qwen2-VL. The weights are bfloat16, as published, which rounds scores to about one percent.
    While they are read, the host holds them twice.
    """
    file = scorers.find(source, "MizzenAI/HPSv3", "HPSv3.safetensors")
    base = str(file.parent) if (file.parent / "config.json").exists() else "Qwen/Qwen2-VL-7B-Instruct"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    to_patches = transformers.AutoImageProcessor.from_pretrained(base)
    config = transformers.AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(tokenizer)
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < 1.1 * file.stat().st_size:
            raise ValueError(f"it needs {1.1 * file.stat().st_size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    width = config.text_config.hidden_size
    network = nn.ModuleDict({
        "qwen": transformers.AutoModel.from_config(config, dtype=dtype),
        "head": nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(),
                              nn.Linear(16, 2))})
    scorers.load_weights(network, file, hpsv3_name)
    text_of = HPSV3_PROMPT.read_text(encoding="utf-8")
    image_id, reward_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|Reward|>"])

    def rate(images, prompts):
        language_model, device = network["qwen"].language_model, next(network.parameters()).device
        patches = to_patches([image.resize(hpsv3_size(*image.size), Image.BICUBIC) for image in images],
                             return_tensors="pt").to(device)
        tokens_of = (patches.image_grid_thw.prod(1) // 4).tolist()  # an image's patches, merged 2 by 2
        texts = [QWEN_CHAT.format(image="<|image_pad|>" * count, text=text_of.replace("{text_prompt}", prompt))
                 for count, prompt in zip(tokens_of, prompts)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(device)         # [N, L]
        if (tokens.input_ids == reward_id).sum() != len(prompts) or (tokens.input_ids == image_id).sum() != sum(tokens_of):
            raise InputError("hpsv3: a prompt holds a token of the template, such as <|Reward|>")
        seen = network["qwen"].visual(patches.pixel_values.to(dtype), grid_thw=patches.image_grid_thw)
        embeds = language_model.embed_tokens(tokens.input_ids)                          # [N, L, E]
        is_image = (tokens.input_ids == image_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(is_image, seen.pooler_output.to(embeds.dtype))
        output = language_model(inputs_embeds=embeds, attention_mask=tokens.attention_mask, use_cache=False)
        at_reward = output.last_hidden_state[tokens.input_ids == reward_id]             # [N, E]
        return network["head"](at_reward.float())[:, 0]  # mean and deviation of a score: the mean counts

    identity = {"source": source or "MizzenAI/HPSv3", "scale": "mean of the authors' head, without bounds",
                "preprocess": f"bicubic on PIL to about {HPSV3_PIXELS} pixels, sides of multiples of {QWEN_MERGE}",
                "precision": str(dtype), "note": "it has no bounds, and versions are not comparable"}
    return scorers.Parts(network, None, rate, identity, None)


def hpsv3_name(name):
    """The name in `hpsv3` of a tensor of HPSv3.safetensors, which has older names; None if the score does not need it."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return None
    if name.startswith("rm_head."):
        return name.replace("rm_head.", "head.")
    return f"qwen.{name}" if name.startswith(("visual.", "language_model.")) else f"qwen.language_model.{name}"


def hpsv3_size(width, height):
    """The (width, height) to which qwen-vl-utils scales a picture for HPSV3_PIXELS at least and at most."""
    if max(width, height) > 200 * min(width, height):
        raise InputError(f"hpsv3: a picture of {width} x {height} is more than 200 times as long as it is wide")
    sides = [max(QWEN_MERGE, round(side / QWEN_MERGE) * QWEN_MERGE) for side in (width, height)]
    if math.prod(sides) > HPSV3_PIXELS:
        scale = math.sqrt(width * height / HPSV3_PIXELS)
        sides = [math.floor(side / scale / QWEN_MERGE) * QWEN_MERGE for side in (width, height)]
    elif math.prod(sides) < HPSV3_PIXELS:
        scale = math.sqrt(HPSV3_PIXELS / (width * height))  # not 1 / scale: that rounds to other sides
        sides = [math.ceil(side * scale / QWEN_MERGE) * QWEN_MERGE for side in (width, height)]
    return tuple(sides)
