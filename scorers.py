"""Score images against prompts with the published scorers, in float32, from weights known by their digest.

    clip         100 * cosine of CLIP ViT-H/14, or of any open_clip model              arXiv:2104.08718
    pickscore    PickScore v1: CLIP ViT-H/14 tuned on Pick-a-Pic v1; 100 * cosine      arXiv:2305.01569
    hpsv2        HPS v2.1: CLIP ViT-H/14 tuned on HPD v2; 100 * cosine                 arXiv:2306.09341
    hpsv2.0      HPS v2.0, which older papers call HPSv2; not comparable with v2.1     arXiv:2306.09341
    imagereward  ImageReward: BLIP with a head; mean 0, deviation 1 on its own data    arXiv:2304.05977
    aesthetic    LAION's predictor on CLIP ViT-L/14; about 1 to 10; reads no prompt    arXiv:2210.08402

    name, score, identity = get_scorer("hpsv2=HPS_v2.1_compressed.pt", "cuda")
    score(images, prompts)  N pictures of mode RGB, N strings -> [N] float32 on the CPU
    identity                source, digest, scale, preprocess ...; the same before and after JSON

A new scorer is one function that gives (network, preprocess, rate, identity) of a source, one entry in
SCORERS, one test. `preprocess` makes [3, h, w] of a picture, `rate` [N] of [N, 3, h, w] and N prompts.
"""

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn

import data
import tiny

CROP = "bicubic on PIL to a short side of {}, centre crop, CLIP's mean and deviation"
LETTERBOX = "bicubic with antialias to a long side of {}, zero padding, CLIP's mean and deviation"
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
BLIP_NAMES = {  # in ImageReward.pt: in transformers' BLIP; replaced in this order
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.", "blip.text_encoder.": "text.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.", "mlp.layers.": "head.",
    ".attn.qkv.": ".self_attn.qkv.", ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2."}
BLIP_UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
LAION = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
         "sac%2Blogos%2Bava1-l14-linearMSE.pth")
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


def find(source, repo, name):
    """The path of `source`, a file or a folder with `name` in it; without a source, of the hub's file."""
    from huggingface_hub import hf_hub_download

    path = Path(source).expanduser() if source else Path(hf_hub_download(repo, name))
    return path / name if path.is_dir() else path


def fill(network, file, rename=lambda name: name):
    """Load a state dict that has the network's own names, after `rename`, and shapes; None drops a tensor."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = {rename(name): tensor for name, tensor in state.get("state_dict", state).items()}
    state.pop(None, None)
    own = network.state_dict()
    reshaped = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    for fault, names in (("lacks", own.keys() - state.keys()), ("has another shape of", reshaped),
                         ("holds unknown", state.keys() - own.keys())):
        if names:
            raise ValueError(f"it {fault} {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    network.load_state_dict(state)


def embedding(output):
    """[N, E] of transformers' get_*_features: up to version 4 the output itself, from 5 on a part of it."""
    return output if torch.is_tensor(output) else output.pooler_output


def cosine_rate(model, tokenizer):
    return lambda pixels, prompts: 100 * F.cosine_similarity(
        model.encode_image(pixels), model.encode_text(tokenizer(prompts).to(pixels.device)))


def letterbox(image, size):
    """[3, size, size] as HPS v2 sees a picture: all of it, between black bars. The float tensor is scaled.

    Always with antialias, which the authors' code leaves to torchvision: off up to 0.16, on from 0.17.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = TF.resize(TF.to_tensor(image), [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    pixels = TF.pad(pixels, [left, top, size - width - left, size - height - top])
    return TF.normalize(pixels, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def clip(source):
    """`source` is what `data.Clip` takes."""
    try:
        loaded = data.Clip(source := source or data.H14)
    except SystemExit as error:  # its advice is on train.py's --clip
        raise ValueError(str(error).removeprefix("clip: ").split("; give --clip")[0])
    return loaded.model, loaded.transform, cosine_rate(loaded.model, loaded.tokenizer), {
        "source": source, "scale": "100 * cosine",
        "preprocess": "open_clip's " + json.dumps(loaded.model.visual.preprocess_cfg)}


def pickscore(source):
    """`source` is a folder or a hub id in the format of transformers' CLIPModel."""
    from open_clip import image_transform
    from transformers import CLIPModel

    source = source or "yuvalkirstain/PickScore_v1"
    folder = Path(source).expanduser()
    model, info = CLIPModel.from_pretrained(folder if folder.is_dir() else data.hub_id(source),
                                            dtype=torch.float32, output_loading_info=True)
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info[fault])):
            raise ValueError(f"{fault.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)} in all)")
    tokenizer = tiny.clip_tokenizer(77)  # the published one is this; from_pretrained takes an empty one, too

    def rate(pixels, prompts):
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        text = embedding(model.get_text_features(**tokens.to(pixels.device)))
        return 100 * F.cosine_similarity(embedding(model.get_image_features(pixel_values=pixels)), text)

    size = model.config.vision_config.image_size
    return model, image_transform(size, is_train=False), rate, {
        "source": source, "scale": "100 * cosine", "preprocess": CROP.format(size),
        "logit_scale": model.logit_scale.exp().item()}


def hps(source, file, arch="ViT-H-14"):
    """`source` is a checkpoint of HPS v2 or a folder with `file` in it."""
    import open_clip

    path, model = find(source, "xswu/HPSv2", file), open_clip.CLIP(**open_clip.get_model_config(arch))
    fill(model, path)
    size = model.visual.image_size[0]
    return model, partial(letterbox, size=size), cosine_rate(model, open_clip.get_tokenizer(arch)), {
        "source": source or f"xswu/HPSv2 {file}", "scale": "100 * cosine",
        "preprocess": LETTERBOX.format(size)}


def linear_head(width):
    """[N, width] to [N, 1] without activations: the head of ImageReward and of LAION's predictor."""
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
                         nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))


def blip(vision={}, text={}):
    """ImageReward's network without its weights; `vision` and `text` say what differs from the published."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(**dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                     num_attention_heads=16, image_size=224, patch_size=16,
                                     hidden_act="gelu", layer_norm_eps=1e-6) | vision)
    text = BlipTextConfig(**dict(vocab_size=30524, hidden_size=768, intermediate_size=3072,
                                 num_hidden_layers=12, num_attention_heads=12, hidden_act="gelu",
                                 max_position_embeddings=512, layer_norm_eps=1e-12,
                                 encoder_hidden_size=vision.hidden_size, is_decoder=True) | text)
    return nn.ModuleDict({"vision": BlipVisionModel(vision), "head": linear_head(text.hidden_size),
                          "text": BlipTextModel(text, add_pooling_layer=False)})


def imagereward(source, **sizes):
    """`source` is ImageReward.pt or its folder; bert-base-uncased's vocab.txt may lie beside it."""
    from open_clip import image_transform
    from transformers import BertTokenizer

    def rename(name):
        for old, new in BLIP_NAMES.items():
            name = name.replace(old, new)
        return name

    file, network = find(source, "THUDM/ImageReward", "ImageReward.pt"), blip(**sizes)
    fill(network, file, lambda name: None if name.startswith(BLIP_UNUSED) else rename(name))
    vocabulary = str(file.parent) if (file.parent / "vocab.txt").exists() else "bert-base-uncased"
    tokenizer, words = BertTokenizer.from_pretrained(vocabulary), network["text"].config.vocab_size - 2
    if len(tokenizer) != words:  # BLIP's own two, [DEC] and [ENC], stand in no prompt
        raise ValueError(f"the tokenizer of {vocabulary} has {len(tokenizer)} words, not {words}")

    def rate(pixels, prompts):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        tokens, patches = tokens.to(pixels.device), network["vision"](pixel_values=pixels).last_hidden_state
        states = network["text"](input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                                 encoder_hidden_states=patches).last_hidden_state             # [N, 35, E]
        return (network["head"](states[:, 0]).squeeze(1) - REWARD_MEAN) / REWARD_STD

    size = network["vision"].config.image_size
    return network, image_transform(size, is_train=False), rate, {
        "source": source or "THUDM/ImageReward ImageReward.pt", "preprocess": CROP.format(size),
        "scale": f"(reward - {REWARD_MEAN}) / {REWARD_STD}"}


def laion_head():
    """The path of LAION's own file in torch.hub's folder, downloaded where it is not there yet."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / "sac+logos+ava1-l14-linearMSE.pth"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(LAION, str(file), LAION_SHA256, progress=False)
    return file


def aesthetic(source, backbone="ViT-L-14-quickgelu:openai", width=768):
    """`source` is the file of the head, on image embeddings of `width` values; `backbone` as for `clip`."""
    model, transform, _, identity = clip(backbone)
    network = nn.ModuleDict({"layers": linear_head(width)})  # its tensors are named as in the file
    fill(network, Path(source).expanduser() if source else laion_head())
    network["clip"] = model
    return network, transform, lambda pixels, prompts: network["layers"](
        F.normalize(model.encode_image(pixels))).squeeze(1), identity | {
        "source": source or LAION, "backbone": backbone, "scale": "as rated, 1 to 10"}


def load(name, build, way_out, source=None, device="cpu", **options):
    """(score, identity) of a scorer, see the head of this file; `options` are those of its own function.

    raises  SystemExit, in one line, where what it needs is missing or is not as it was published; `score`
            ValueError for pictures that are not RGB or not as many as prompts, and for a score of nan or inf
    """
    device = torch.device(device)
    try:
        network, preprocess, rate, identity = build(source, **options)
        network.float().eval().requires_grad_(False)
        identity = {"scorer": name} | identity | {"digest": data.digest(network)}
        network.to(device)
    except Exception as error:
        raise SystemExit(f"scorers: {name}: {source or 'the published weights'}: {data.brief(error)}; "
                         f"give {name}={way_out}")

    @torch.inference_mode()
    def score(images, prompts):
        if len(images) != len(prompts):
            raise ValueError(f"scorers: {name}: {len(images)} images, but {len(prompts)} prompts")
        if modes := {image.mode for image in images} - {"RGB"}:
            raise ValueError(f"scorers: {name}: a picture is {modes.pop()}, not RGB; see data.read_image")
        with torch.autocast(device.type, enabled=False):  # half precision makes ties of near-equal scores
            scores = rate(torch.stack([*map(preprocess, images)]).to(device), prompts).cpu()
        if not scores.isfinite().all():
            raise ValueError(f"scorers: {name}: not a finite number: {scores.tolist()}")
        return scores

    return score, identity


SCORERS = {  # name: function of a source and a device; last, what a source may be
    "clip": partial(load, "clip", clip, "ARCH:TAG, ARCH:FILE or tiny"),
    "pickscore": partial(load, "pickscore", pickscore, "FOLDER of a CLIPModel"),
    "hpsv2": partial(load, "hpsv2", partial(hps, file="HPS_v2.1_compressed.pt"), "FILE"),
    "hpsv2.0": partial(load, "hpsv2.0", partial(hps, file="HPS_v2_compressed.pt"), "FILE"),
    "imagereward": partial(load, "imagereward", imagereward, "FILE, with BERT's vocab.txt beside it"),
    "aesthetic": partial(load, "aesthetic", aesthetic, "FILE; CLIP ViT-L/14 comes from the hub"),
}


def get_scorer(spec, device="cpu"):
    """(name, score, identity) of NAME, for the published weights, or NAME=SOURCE."""
    name, _, source = spec.partition("=")
    if name not in SCORERS:
        raise SystemExit(f"scorers: {name!r} is none of {', '.join(SCORERS)}")
    return name, *SCORERS[name](source or None, device)
