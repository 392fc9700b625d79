"""Score images against prompts with the published scorers. A digest of the weights names what scored.

    clip         100 * cosine of CLIP ViT-H/14, or of any open_clip model              arXiv:2104.08718
    pickscore    PickScore v1: CLIP ViT-H/14 tuned on Pick-a-Pic v1; 100 * cosine      arXiv:2305.01569
    hpsv2        HPS v2.1: CLIP ViT-H/14 tuned on HPD v2; 100 * cosine                 arXiv:2306.09341
    hpsv2.0      HPS v2.0, which older papers call HPSv2; not comparable with v2.1     arXiv:2306.09341
    imagereward  ImageReward: BLIP with a head; mean 0, deviation 1 on its own data    arXiv:2304.05977
    aesthetic    LAION's predictor on CLIP ViT-L/14; about 1 to 10; reads no prompt    arXiv:2210.08402
    hpsv3        HPSv3: Qwen2-VL-7B with a head, in bfloat16; 17 GB; without bounds    arXiv:2508.03789

    name, score, identity = get_scorer("hpsv2=HPS_v2.1_compressed.pt", "cuda")
    score(images, prompts)  N pictures of mode RGB, N strings -> [N] float32 on the CPU
    identity                a dict of source, digest, scale, preprocessing; JSON keeps it as it is

To add a scorer, write a function from a source to `Parts`, an entry of SCORERS, and a test. `preprocess` makes
[3, h, w] from a picture, `rate` makes [N] from [N, 3, h, w] and N prompts, in `dtype`. Without `preprocess`, `rate` takes
the pictures themselves.
"""

import gc
import importlib
import json
from collections import namedtuple
from functools import partial
from pathlib import Path

import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import transformers
from safetensors.torch import load_file
from torch import nn

from common import InputError, brief, clip_tokenizer, digest, hub_id
from data import Clip
from options import H14

Parts = namedtuple("Parts", "network preprocess rate identity dtype", defaults=[torch.float32])
CROP = "bicubic on PIL to a short side of {}, centre crop, CLIP's mean and deviation"
LETTERBOX = "bicubic with antialias to a long side of {}, zero padding, CLIP's mean and deviation"
COSINE = "100 * cosine"


def find(source, repo, name):
    """The path of `source`: a file, or a folder with `name` in it. Without a source it is the hub's file."""
    path = Path(source or huggingface_hub.hf_hub_download(repo, name)).expanduser()
    return path / name if path.is_dir() else path


def load_weights(network, file, rename=lambda name: name):
    """Load a state dict. ValueError if, after `rename`, names or shapes are not the network's; None drops a tensor."""
    is_safe = Path(file).suffix == ".safetensors"
    content = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
    state = {rename(name): tensor for name, tensor in content.get("state_dict", content).items()}
    state.pop(None, None)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    reshaped = [name for name in shapes.keys() & state.keys() if shapes[name] != state[name].shape]
    refuse_names("it lacks", shapes.keys() - state.keys())
    refuse_names("it has another shape of", reshaped)
    refuse_names("it holds unknown", state.keys() - shapes.keys())
    network.load_state_dict(state)


def refuse_names(fault, names):
    """ValueError with the first three names of tensors, if there are any."""
    if names:
        raise ValueError(f"{fault} {', '.join(sorted(map(str, names))[:3])} ({len(names)} in all)")


def cosine_rate(model, tokenizer):
    def rate(pixels, prompts):
        text = model.encode_text(tokenizer(prompts).to(pixels.device))
        return 100 * F.cosine_similarity(model.encode_image(pixels), text)

    return rate


def letterbox(image, size):
    """[3, size, size] as HPS v2 sees a picture: all of it, between black bars. The float tensor is resized.

    We always use antialias. The authors' code leaves it to torchvision: off up to 0.16, on from 0.17.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = TF.resize(TF.to_tensor(image), [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    pixels = TF.pad(pixels, [left, top, size - width - left, size - height - top])
    return TF.normalize(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def clip(source):
    """`source` is ARCH:WEIGHTS or tiny, as for `data.Clip`."""
    loaded = Clip(source or H14)
    preprocess = f"open_clip's {json.dumps(loaded.model.visual.preprocess_cfg)}"
    identity = {"source": source or H14, "scale": COSINE, "preprocess": preprocess}
    return Parts(loaded.model, loaded.transform, cosine_rate(loaded.model, loaded.tokenizer), identity)


def pickscore(source):
    """`source` is a folder or a hub id in the format of transformers' CLIPModel."""
    source = source or "yuvalkirstain/PickScore_v1"
    folder = Path(source).expanduser()
    model, info = transformers.CLIPModel.from_pretrained(folder if folder.is_dir() else hub_id(source),
                                                         dtype=torch.float32, output_loading_info=True)
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = [name for name in info[fault] if not name.endswith("position_ids")]  # a constant, 0, 1, 2, ...
        refuse_names(f"{fault.replace('_', ' ')}:", names)
    tokenizer = clip_tokenizer(77)  # the published one is equal; from_pretrained would also accept an empty one

    def rate(pixels, prompts):
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        embeds = model(pixel_values=pixels, **tokens.to(pixels.device))
        return 100 * F.cosine_similarity(embeds.image_embeds, embeds.text_embeds)

    size = model.config.vision_config.image_size
    identity = {"source": source, "scale": COSINE, "preprocess": CROP.format(size),
                "logit_scale": model.logit_scale.exp().item()}
    return Parts(model, open_clip.image_transform(size, is_train=False), rate, identity)


def hps(source, file, arch="ViT-H-14"):
    """`source` is a checkpoint of HPS v2, or a folder with `file` in it."""
    model = open_clip.CLIP(**open_clip.get_model_config(arch))
    load_weights(model, find(source, "xswu/HPSv2", file))
    size = model.visual.image_size[0]
    identity = {"source": source or f"xswu/HPSv2 {file}", "scale": COSINE, "preprocess": LETTERBOX.format(size)}
    return Parts(model, partial(letterbox, size=size), cosine_rate(model, open_clip.get_tokenizer(arch)), identity)


def linear_head(width):
    """[N, width] to [N, 1] without activations: the head of ImageReward and of LAION's predictor."""
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
                         nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))


BLIP_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                   image_size=224, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6)
BLIP_TEXT = dict(vocab_size=30524, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, is_decoder=True,
                 num_attention_heads=12, hidden_act="gelu", max_position_embeddings=512, layer_norm_eps=1e-12)
BLIP_NAMES = {  # part of a name in ImageReward.pt: its replacement in transformers' BLIP; applied in this order
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.", "blip.text_encoder.": "text.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.", "mlp.layers.": "head.",
    ".attn.qkv.": ".self_attn.qkv.", ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2."}


def blip(vision={}, text={}):
    """ImageReward's network without its weights; `vision` and `text` override the published sizes."""
    vision = transformers.BlipVisionConfig(**BLIP_VISION | vision)
    text = transformers.BlipTextConfig(**BLIP_TEXT | {"encoder_hidden_size": vision.hidden_size} | text)
    return nn.ModuleDict({"vision": transformers.BlipVisionModel(vision), "head": linear_head(text.hidden_size),
                          "text": transformers.BlipTextModel(text, add_pooling_layer=False)})


def blip_name(name):
    """The name in `blip` of a tensor of ImageReward.pt; None if the score does not need it."""
    for old, new in BLIP_NAMES.items():
        name = name.replace(old, new)
    unused = ("text.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
    return None if name.startswith(unused) else name


def imagereward(source, **sizes):
    """`source` is ImageReward.pt or its folder. The vocab.txt of bert-base-uncased may lie beside it."""
    file = find(source, "THUDM/ImageReward", "ImageReward.pt")
    network = blip(**sizes)
    load_weights(network, file, blip_name)
    vocabulary = str(file.parent) if (file.parent / "vocab.txt").exists() else "bert-base-uncased"
    tokenizer = transformers.BertTokenizer.from_pretrained(vocabulary)
    words = network["text"].config.vocab_size - 2  # BLIP adds [DEC] and [ENC], which no prompt contains
    if len(tokenizer) != words:
        raise ValueError(f"the tokenizer of {vocabulary} has {len(tokenizer)} words, not {words}")
    mean, std = 0.16717362830052426, 1.0333394966054072

    def rate(pixels, prompts):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        ids, mask = tokens.input_ids.to(pixels.device), tokens.attention_mask.to(pixels.device)     # [N, 35]
        patches = network["vision"](pixel_values=pixels).last_hidden_state                          # [N, P, E']
        output = network["text"](ids, mask, encoder_hidden_states=patches)
        reward = network["head"](output.last_hidden_state[:, 0]).squeeze(1)                         # [N]
        return (reward - mean) / std

    size = network["vision"].config.image_size
    identity = {"source": source or "THUDM/ImageReward ImageReward.pt", "preprocess": CROP.format(size),
                "scale": f"(reward - {mean}) / {std}"}
    return Parts(network, open_clip.image_transform(size, is_train=False), rate, identity)


LAION = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
         "sac%2Blogos%2Bava1-l14-linearMSE.pth")
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


def laion_head():
    """The path of LAION's own file in torch.hub's folder. It is downloaded once."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / "sac+logos+ava1-l14-linearMSE.pth"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(LAION, str(file), LAION_SHA256, progress=False)
    return file


def aesthetic(source, backbone="ViT-L-14-quickgelu:openai", width=768):
    """`source` is the file of the head, for image embeddings [N, width]; `backbone` is a source of `clip`."""
    model, transform, _, identity, _ = clip(backbone)
    network = nn.ModuleDict({"layers": linear_head(width)})  # its tensors are named as in the file
    load_weights(network, Path(source).expanduser() if source else laion_head())
    network["clip"] = model

    def rate(pixels, prompts):
        embeds = F.normalize(model.encode_image(pixels))
        return network["layers"](embeds).squeeze(1)

    identity |= {"source": source or LAION, "backbone": backbone, "scale": "as rated, 1 to 10"}
    return Parts(network, transform, rate, identity)


def load(name, build, way_out, source=None, device="cpu", **options):
    """(score, identity) of the scorer whose `Parts` are build(source, **options); see the head of this file.

    raises  InputError if a file is missing or is not as published; its line says what `way_out` the user has. `score`
            raises it if pictures are not RGB or not as many as the prompts, and if a score is not finite
    """
    device = torch.device(device)
    gc.collect()  # the scorer before this one may still hold memory
    torch.cuda.empty_cache()
    try:
        network, preprocess, rate, identity, dtype = build(source, **options)
        network = network.to(dtype) if dtype else network  # None: each part has its own
        network.eval().requires_grad_(False)
        identity = {"scorer": name} | identity | {"digest": digest(network)}
        network.to(device)
    except Exception as error:
        raise InputError(f"{name}: {source or 'the published weights'}: {brief(error)}; give {name}={way_out}")

    @torch.inference_mode()
    def score(images, prompts):
        if len(images) != len(prompts):
            raise InputError(f"{name}: {len(images)} images, but {len(prompts)} prompts")
        for image in images:
            if image.mode != "RGB":
                raise InputError(f"{name}: a picture is {image.mode}, not RGB; read_image converts it")
        pixels = images
        if preprocess:
            pixels = torch.stack([preprocess(image) for image in images]).to(device)    # [N, 3, h, w]
        with torch.autocast(device.type, enabled=False):  # half precision would tie near-equal scores
            scores = rate(pixels, prompts).cpu()
        if not scores.isfinite().all():
            raise InputError(f"{name}: not a finite number: {dict(zip(prompts, scores.tolist()))}")
        return scores

    return score, identity


def hpsv3(source=None, device="cpu"):
    """`load` of a scorer that must know the device, because it asks for the room before it loads."""
    build = partial(importlib.import_module("extras.hpsv3").hpsv3, device=device)
    return load("hpsv3", build, "FILE, with the files of Qwen2-VL-7B-Instruct beside it", source, device)


SCORERS = {  # name: a function from a source and a device to (score, identity)
    "clip": partial(load, "clip", clip, "ARCH:TAG, ARCH:FILE or tiny"),
    "pickscore": partial(load, "pickscore", pickscore, "FOLDER of a CLIPModel"),
    "hpsv2": partial(load, "hpsv2", partial(hps, file="HPS_v2.1_compressed.pt"), "FILE"),
    "hpsv2.0": partial(load, "hpsv2.0", partial(hps, file="HPS_v2_compressed.pt"), "FILE"),
    "imagereward": partial(load, "imagereward", imagereward, "FILE, with BERT's vocab.txt beside it"),
    "aesthetic": partial(load, "aesthetic", aesthetic, "FILE; CLIP ViT-L/14 comes from the hub"),
    "hpsv3": hpsv3}


def get_scorer(spec, device="cpu"):
    """(name, score, identity) of NAME, with the published weights, or of NAME=SOURCE."""
    name, _, source = spec.partition("=")
    if name not in SCORERS:
        raise InputError(f"{name!r} is none of {', '.join(SCORERS)}")
    return name, *SCORERS[name](source or None, device)
