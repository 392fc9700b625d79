"""What the scorers promise. Each reads its published format, original names and all, from files made here."""

import functools
import hashlib
import itertools
import json
import urllib.error
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import data
import scorers
from common import InputError, clip_tokenizer, digest
from extras import tiny
from scorers import SCORERS, get_scorer, letterbox

LAION_FILE = (
    Path(torch.hub.get_dir()) / "checkpoints" / "sac+logos+ava1-l14-linearMSE.pth"
)  # the user's cache
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square on of the".split()
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=32)
TEXT = dict(vocab_size=len(WORDS) + 2, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
PROMPTS = ["a red circle", "a blue square on a red circle", "", "the square"]
NAMES = [name for name in SCORERS if name != "hpsv3"]  # that one has a file of its own, test_hpsv3.py
OWN_FILE = ("hpsv2", "hpsv2.0", "imagereward", "aesthetic")  # those whose state dict is read here
UNUSED = {"imagereward": "blip.vision_proj.weight", "pickscore": "vision_model.embeddings.position_ids"}


def pictures(n=4, size=(48, 48), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize(size) for _ in range(n)]


def blip_state():
    """ImageReward.pt at small width, name by name as its authors save it."""
    shapes, (v, t, patch) = {}, (32, 48, 16)

    def linear(name, i, o):
        shapes.update({f"{name}.weight": (o, i), f"{name}.bias": (o,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    eye, mouth = "blip.visual_encoder", "blip.text_encoder"
    shapes |= {f"{eye}.cls_token": (1, 1, v), f"{eye}.pos_embed": (1, 5, v)}
    shapes |= {f"{eye}.patch_embed.proj.weight": (v, 3, patch, patch), f"{eye}.patch_embed.proj.bias": (v,)}
    for k in range(2):
        block, layer = f"{eye}.blocks.{k}", f"{mouth}.encoder.layer.{k}"
        for name, i, o in (
            ("attn.qkv", v, 3 * v),
            ("attn.proj", v, v),
            ("mlp.fc1", v, 64),
            ("mlp.fc2", 64, v),
        ):
            linear(f"{block}.{name}", i, o)
        norm(f"{block}.norm1", v), norm(f"{block}.norm2", v)
        for part, width in (("attention", t), ("crossattention", v)):
            for name, i in (("query", t), ("key", width), ("value", width)):
                linear(f"{layer}.{part}.self.{name}", i, t)
            linear(f"{layer}.{part}.output.dense", t, t), norm(f"{layer}.{part}.output.LayerNorm", t)
        linear(f"{layer}.intermediate.dense", t, 96), linear(f"{layer}.output.dense", 96, t)
        norm(f"{layer}.output.LayerNorm", t)
    norm(f"{eye}.norm", v), norm(f"{mouth}.embeddings.LayerNorm", t)
    shapes |= {f"{mouth}.embeddings.word_embeddings.weight": (TEXT["vocab_size"], t)}
    shapes |= {f"{mouth}.embeddings.position_embeddings.weight": (512, t)}
    linear("blip.vision_proj", v, 8), linear("blip.text_proj", t, 8)
    for k, (i, o) in zip((0, 2, 4, 6, 7), itertools.pairwise((t, 1024, 128, 64, 16, 1))):
        linear(f"mlp.layers.{k}", i, o)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        small = "embed" in name and "LayerNorm" not in name  # so small that a wrong eps shows
        scale = (
            2e-4
            if "patch" in name
            else 4e-3
            if small
            else shape[-1] ** -0.5
            if name.endswith("weight") and len(shape) == 2
            else 0.3
        )
        state[name] = scale * tensor + ("norm" in name.lower() and name.endswith("weight"))
    state[f"{mouth}.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def reward_by_hand(w, pixels, ids, mask, eps=1e-6, heads=12, two_sided=True):
    """ImageReward from its original names, in plain torch: [N] of [N, 3, 32, 32], [N, L], [N, L]."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q, k, v, heads, mask=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    eye, mouth = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(
        pixels, *(w[f"{eye}.patch_embed.proj.{part}"] for part in ("weight", "bias")), stride=16
    )
    x = torch.cat([w[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    x = x + w[f"{eye}.pos_embed"]
    for block in (f"{eye}.blocks.{k}" for k in range(2)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, eps)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, 16))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, eps))))
    seen = norm(f"{eye}.norm", x, eps)

    allowed = mask[:, None, None, :].bool()
    allowed = allowed if two_sided else allowed & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    words = w[f"{mouth}.embeddings.word_embeddings.weight"][ids]
    h = words + w[f"{mouth}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(f"{mouth}.embeddings.LayerNorm", h, 1e-12)
    for layer in (f"{mouth}.encoder.layer.{k}" for k in range(2)):
        for part, other, kept in (("attention", None, allowed), ("crossattention", seen, None)):
            other = h if other is None else other
            qkv = [
                linear(f"{layer}.{part}.self.{name}", y)
                for name, y in zip(("query", "key", "value"), (h, other, other))
            ]
            out = linear(f"{layer}.{part}.output.dense", attend(*qkv, heads, kept))
            h = norm(f"{layer}.{part}.output.LayerNorm", out + h, 1e-12)
        out = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", h)))
        h = norm(f"{layer}.output.LayerNorm", out + h, 1e-12)
    r = h[:, 0]
    for k in (0, 2, 4, 6, 7):
        r = linear(f"mlp.layers.{k}", r)
    return (r[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as small as these only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{name: (state dict in the published names, options)} at small width, made once."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("arch")
    vision = dict(image_size=28, patch_size=14, width=32, head_width=16, layers=2)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (folder / "small-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    weights = [open_clip.CLIP(**config).state_dict() for _ in range(3)]
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(
        CLIPConfig(
            text_config=sizes, vision_config=sizes | dict(image_size=32, patch_size=8), projection_dim=16
        )
    )
    model.config.save_pretrained(folder)
    pickscore = {name: tensor * 3 for name, tensor in model.state_dict().items()}
    pickscore["logit_scale"] = torch.tensor(4.5)
    pickscore[UNUSED["pickscore"]] = torch.arange(17)[None]  # transformers 4.30 saved it
    head = {f"layers.{name}": tensor for name, tensor in scorers.linear_head(16).state_dict().items()}
    small = dict(arch="small-test-clip")
    return {
        "clip": (weights[0], {}),
        "pickscore": (pickscore, dict(config=(folder / "config.json").read_text())),
        "hpsv2": (weights[1], small),
        "hpsv2.0": (weights[2], small),
        "imagereward": (blip_state(), dict(vision=VISION, text=TEXT)),
        "aesthetic": (head, dict(width=16)),
    }


@pytest.fixture(scope="module")
def make(published, tmp_path_factory):
    """make(name, state=None) -> (score, identity) of a file with these tensors; without, with the usual."""

    def files(name, state=None, content=None):
        """(source, options) of a new file; `content` is all that it holds."""
        original, options = published[name]
        state = original if state is None else state
        options, folder = dict(options), tmp_path_factory.mktemp(name)
        own_name = {"pickscore": "pytorch_model.bin", "imagereward": "ImageReward.pt"}
        file = folder / own_name.get(name, "file.pt")
        if content is None:
            content = {"epoch": 3, "state_dict": state, "name": "x"} if name.startswith("hps") else state
        torch.save(content, file)
        if name == "pickscore":
            (folder / "config.json").write_text(options.pop("config"))
            return str(folder), options
        if name == "imagereward":
            (folder / "vocab.txt").write_text("\n".join(WORDS))
        if name == "aesthetic":
            options["backbone"] = files("clip")[0]
        return f"small-test-clip:{file}" if name == "clip" else str(file), options

    def build(name, state=None, content=None):
        if state is None and content is None:
            return whole(name)
        source, options = files(name, state, content)
        return SCORERS[name](source, **options)

    @functools.cache
    def whole(name):
        source, options = files(name)
        return SCORERS[name](source, **options)

    build.files, build.published = files, published
    with pytest.MonkeyPatch.context() as patch:  # they take longer to make than all else here
        patch.setattr(scorers, "clip_tokenizer", functools.cache(clip_tokenizer))
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield build


def refused(call):
    """The one line with which `call` ends."""
    with pytest.raises(InputError) as end:
        call()
    assert "\n" not in str(end.value)
    return str(end.value)


# What holds for all


@pytest.mark.parametrize("name", NAMES)
def test_scores_follow_their_pairs_and_do_not_depend_on_the_batch(make, name):
    """Scores of a pair that changed with its neighbours could not be compared between runs."""
    score, _ = make(name)
    images = pictures(2, (48, 30)) + pictures(2, (20, 48), seed=1)
    scores = score(images, PROMPTS)
    assert scores.shape == (4,) and scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.isfinite().all() and scores.unique().numel() == 4
    single = torch.cat([score([image], [prompt]) for image, prompt in zip(images, PROMPTS)])
    torch.testing.assert_close(scores, single, rtol=1e-4, atol=1e-4)
    order = [2, 0, 3, 1]
    moved = score([images[k] for k in order], [PROMPTS[k] for k in order])
    torch.testing.assert_close(moved, scores[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_counts_except_for_aesthetic(make, name):
    """With a causal mask, ImageReward's first token would not see the prompt at all."""
    score, _ = make(name)
    first, second = (score(pictures(1), [prompt]) for prompt in ("a red circle", "a blue square"))
    assert (first == second) == (name == "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_near_equal_pictures_do_not_tie(make, name):
    """Half precision, here an outer autocast, would tie them and distort win rates."""
    score, _ = make(name)
    image = pictures(1)[0]
    near = np.array(image)
    near[16:32, 16:32] ^= 4
    pair, prompts = [image, Image.fromarray(near)], ["a red circle"] * 2
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(pair, prompts)
    assert torch.equal(scores, score(pair, prompts)) and scores.dtype == torch.float32
    assert scores[0] != scores[1]


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_is_exact_and_survives_json(make, published, name):
    """Scores are reused where it is the same; so one changed weight must change it, and nothing else may."""
    (_, identity), state = make(name), published[name][0]
    assert json.loads(json.dumps(identity)) == identity
    assert identity["scorer"] == name and {"source", "scale", "preprocess"} < identity.keys()
    key = next(
        key for key in reversed(state) if key not in UNUSED.values() and state[key].is_floating_point()
    )
    changed = make(name, state=state | {key: state[key] + 1e-3})[1]
    again = make(name, state=dict(reversed(state.items())))[1]
    assert again["digest"] == identity["digest"] != changed["digest"]


def test_a_digest_is_that_of_all_tensors_in_the_order_of_their_names(make):
    """Another release of a library may order them otherwise; and the backbone makes the score, too."""
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    modules = {"a": one, "b": other}
    digests = [
        digest(torch.nn.ModuleDict(modules)) for modules in (modules, dict(reversed(modules.items())))
    ]
    assert digests[0] == digests[1]
    source, options = make.files("aesthetic")
    backbone = make.files("clip", state=make.published["hpsv2"][0])[0]
    identities = [SCORERS["aesthetic"](source, **options | more)[1] for more in ({}, {"backbone": backbone})]
    assert identities[0]["digest"] != identities[1]["digest"]


def test_half_precision_files_are_computed_in_float32(make, published):
    """The published HPS checkpoints are compressed; their digest is that of the float32 tensors."""
    half = {name: tensor.half() for name, tensor in published["hpsv2"][0].items()}
    scores = [
        make("hpsv2", state={name: cast(t) for name, t in half.items()})
        for cast in (lambda t: t, torch.Tensor.float)
    ]
    (one, first), (two, second) = scores
    assert first["digest"] == second["digest"]
    assert torch.equal(one(pictures(), PROMPTS), two(pictures(), PROMPTS))


def test_what_is_not_a_batch_of_rgb_pairs_is_refused(make):
    """zip() would drop images in silence; transparent pixels have colours that nobody sees."""
    score, _ = make("clip")
    with pytest.raises(ValueError, match="clip: 2 images, but 3 prompts"):
        score(pictures(2), PROMPTS[:3])
    for mode in ("RGBA", "L", "P"):
        with pytest.raises(ValueError, match=f"clip: a picture is {mode}, not RGB"):
            score([pictures(1)[0].convert(mode)], ["a"])


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_a_number(make, published, name):
    """A mean with one nan in it is nan, and of a sort nothing is right."""
    key = {
        "imagereward": "mlp.layers.7.bias",
        "aesthetic": "layers.7.bias",
        "pickscore": "visual_projection.weight",
    }
    key = key.get(name, "visual.proj")
    state = published[name][0] | {key: torch.full_like(published[name][0][key], torch.nan)}
    score, _ = make(name, state=state)
    with pytest.raises(ValueError, match=f"^{name}: not a finite number"):
        score(pictures(1), ["a"])


# Files that will not do


@pytest.mark.parametrize("damage", ["missing", "renamed", "unknown", "reshaped"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_other_tensors_is_refused(make, published, name, damage):
    """Loaded without strictness, such a file scores with random weights and says nothing."""
    state = dict(published[name][0])
    key = next(k for k in state if k.endswith(".weight") and k not in UNUSED.values() and state[k].ndim == 2)
    if damage in ("missing", "renamed"):
        tensor = state.pop(key)
    if damage == "renamed":
        state[f"other.{key}"] = tensor
    if damage == "unknown":
        state["other.weight"] = torch.zeros(2)
    if damage == "reshaped":
        state[key] = torch.zeros(3, 2)
    line = refused(lambda: make(name, state=state))
    assert line.startswith(f"{name}: ") and f"; give {name}=" in line
    if name in OWN_FILE:
        wanted = {"missing": "lacks", "renamed": "lacks", "unknown": "holds unknown other.weight"}
        assert wanted.get(damage, "has another shape of") in line


class Planted:
    """An object whose loading runs code."""

    def __reduce__(self):
        return Path.touch, (Path("planted"),)


@pytest.mark.parametrize("name", NAMES)
def test_code_in_a_file_is_not_run(make, tmp_path, monkeypatch, name):
    """Checkpoints come from strangers."""
    monkeypatch.chdir(tmp_path)
    line = refused(lambda: make(name, content={"state_dict": Planted()}))
    assert line.startswith(f"{name}: ") and not Path("planted").exists()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_ends_in_a_line_with_a_way_out(make, published, tmp_path, monkeypatch, name):
    """The tests are offline, as many machines with GPUs are."""

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    options = make.files(name)[1]
    for source in (None, str(tmp_path / "no-such")):
        line = refused(lambda: SCORERS[name](source, **options))
        assert line.startswith(f"{name}: ") and f"; give {name}=" in line
    if name == "aesthetic":
        assert "ViT-L-14-quickgelu:openai" in refused(lambda: SCORERS[name]())


def test_an_unknown_name_ends_with_the_known_ones():
    assert "'hps' is none of clip, pickscore, hpsv2" in refused(lambda: get_scorer("hps"))


# Each one


def test_clip_of_the_embedded_task(published, tmp_path, monkeypatch):
    """NAME=SOURCE is what the command line gives; tiny needs no download."""
    config = {"model_cfg": open_clip.get_model_config("small-test-clip"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(published["clip"][0], tmp_path / "open_clip_model.safetensors")
    monkeypatch.setattr(tiny, "part", lambda name: {"clip": tmp_path}[name])
    name, score, identity = get_scorer("clip=tiny")
    assert name == "clip" and identity["source"] == "tiny"
    assert score(pictures(2), PROMPTS[:2]).abs().max() <= 100


@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_clip_and_hps_are_a_hundred_times_the_cosine(make, published, name):
    """So are the tables of HPS v2; other code gives the cosine, or the logit."""
    model = open_clip.CLIP(**open_clip.get_model_config("small-test-clip"), output_dict=True).eval()
    model.load_state_dict(published[name][0])
    crop = open_clip.image_transform(28, is_train=False)
    images = pictures(4, (28, 28))  # where both transforms agree, to the rounding to 8 bits
    tokens = open_clip.get_tokenizer("small-test-clip")(PROMPTS)
    with torch.no_grad():
        out = model(torch.stack([crop(image) for image in images]), tokens)
    expected = 100 * (out["image_features"] * out["text_features"]).sum(1)
    torch.testing.assert_close(make(name)[0](images, PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_the_files_of_the_hub(make, monkeypatch):
    """v2.0 and v2.1 of HPS give different numbers under one name in many papers."""
    import huggingface_hub

    asked = []

    def download(repo, file):
        asked.append(f"{repo}/{file}")
        return make.files({"ImageReward.pt": "imagereward"}.get(file, "hpsv2"))[0]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("hpsv2", "hpsv2.0", "imagereward"):
        SCORERS[name](**make.files(name)[1])
    assert asked == [
        "xswu/HPSv2/HPS_v2.1_compressed.pt",
        "xswu/HPSv2/HPS_v2_compressed.pt",
        "THUDM/ImageReward/ImageReward.pt",
    ]


def test_pickscore_is_the_cosine_of_the_projected_embeddings(make):
    """By the model's parts: what get_*_features give differs between transformers 4 and 5."""
    from transformers import CLIPModel

    folder, _ = make.files("pickscore")
    model = CLIPModel.from_pretrained(folder).eval()
    inputs = clip_tokenizer(77)(PROMPTS, padding=True, return_tensors="pt")
    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in pictures()])
        image = model.visual_projection(model.vision_model(pixels).pooler_output)
        text = model.text_projection(model.text_model(**inputs).pooler_output)
    score, identity = make("pickscore")
    expected = 100 * F.cosine_similarity(image, text)
    torch.testing.assert_close(score(pictures(), PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert identity["logit_scale"] == pytest.approx(np.exp(4.5))


def test_each_scorer_has_its_own_tokenizer(make):
    """open_clip reads HTML entities, transformers' tokenizer does not; both cut what is too long."""

    def of(name, prompt):
        return make(name)[0](pictures(1), [prompt])

    assert of("clip", "fish &amp; chips") == of("clip", "fish & chips")
    assert of("pickscore", "fish &amp; chips") != of("pickscore", "fish & chips")
    assert all(of(name, "a red circle on the blue square " * 40).isfinite() for name in NAMES)


def test_hps_sees_the_whole_picture(make):
    """CLIP crops what is not square; HPS v2 was tuned on letterboxed pictures."""
    image = np.array(pictures(1, (96, 48))[0])
    edges = image.copy()
    edges[:, :20], edges[:, -20:] = 255 - edges[:, :20], 255 - edges[:, -20:]
    for name in NAMES:
        one, other = (make(name)[0]([Image.fromarray(picture)], ["a"]) for picture in (image, edges))
        assert (one != other) == name.startswith("hps")


@pytest.mark.parametrize("size", [(300, 150), (150, 300), (500, 1), (57, 101), (64, 64)])
def test_the_letterbox_is_black_and_centred(size):
    """Bars of another colour or place would be pixels that the model was not tuned on."""
    pixels = letterbox(Image.new("RGB", size, "white"), 64)
    pixels = (
        pixels * torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        + torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    )
    assert pixels.shape == (3, 64, 64)
    width, height = (max(1, round(side * 64 / max(size))) for side in size)
    top, left = (64 - height) // 2, (64 - width) // 2
    expected = torch.zeros(3, 64, 64)
    expected[:, top : top + height, left : left + width] = 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_the_letterbox_of_a_square_is_clips_own_transform():
    """For square pictures only the rounding to 8 bits differs; no antialias would be ten times that."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8))
    assert (letterbox(image, 224) - open_clip.image_transform(224, is_train=False)(image)).abs().max() < 0.15


def test_imagereward_is_what_its_authors_compute(make, published):
    """Heads, eps and mask of transformers' BLIP differ by default, and load without an error."""
    score, _ = make("imagereward")
    images, transform = pictures(), open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(image) for image in images])
    ids, mask = torch.zeros(4, 35, dtype=torch.long), torch.zeros(4, 35, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        tokens = [2, *map(WORDS.index, prompt.split()), 3]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    state = published["imagereward"][0]
    scores = score(images, PROMPTS)
    torch.testing.assert_close(scores, reward_by_hand(state, pixels, ids, mask), rtol=1e-4, atol=1e-5)
    for trap in (dict(eps=1e-5), dict(heads=8), dict(two_sided=False)):  # the check would see each of them
        assert (scores - reward_by_hand(state, pixels, ids, mask, **trap)).abs().max() > 1e-2


def test_imagereward_has_the_published_size():
    """620 of the file's 625 tensors, 446,665,953 parameters without the two projections that are not used."""
    with torch.device("meta"):
        network = scorers.blip()
    unused = 1024 * 256 + 256 + 768 * 256 + 256
    assert sum(tensor.numel() for tensor in network.parameters()) == 446_665_953 - unused
    assert len(network.state_dict()) == 620
    vision, text = network["vision"].config, network["text"].config
    assert (vision.num_attention_heads, vision.layer_norm_eps, vision.hidden_act) == (16, 1e-6, "gelu")
    assert (text.num_attention_heads, text.layer_norm_eps, text.hidden_act) == (12, 1e-12, "gelu")
    assert (text.encoder_hidden_size, text.max_position_embeddings, text.vocab_size) == (1024, 512, 30524)


def test_imagereward_does_not_read_the_padding(make, published):
    """Prompts are padded to 35 tokens, and cut there."""
    state = published["imagereward"][0]
    words = state["blip.text_encoder.embeddings.word_embeddings.weight"].clone()
    words[0] += 1
    other = make("imagereward", state=state | {"blip.text_encoder.embeddings.word_embeddings.weight": words})[
        0
    ]
    assert torch.equal(other(pictures(), PROMPTS), (score := make("imagereward")[0])(pictures(), PROMPTS))
    long = ["a " * 33 + "red", "a " * 33 + "blue", "a " * 32 + "red"]
    cut = score(pictures(1) * 3, long)
    assert cut[0] == cut[1] and cut[0] != cut[2]


def test_imagereward_wants_berts_vocabulary(make):
    """transformers makes a tokenizer without a vocabulary: every word is unknown to it."""
    source, options = make.files("imagereward")
    assert SCORERS["imagereward"](str(Path(source).parent), **options)  # the folder will do, too
    Path(source).with_name("vocab.txt").write_text("\n".join(WORDS[:-1]))
    assert "has 12 words, not 13" in refused(lambda: SCORERS["imagereward"](source, **options))
    Path(source).with_name("vocab.txt").unlink()
    assert "vocab.txt beside it" in refused(lambda: SCORERS["imagereward"](source, **options))


def test_the_aesthetic_head_is_linear_on_embeddings_of_length_one(make, published):
    """The other head of that repository has ReLUs; and a score must not grow with an embedding's length."""
    head, _ = published["aesthetic"]
    weight, bias = torch.eye(16), torch.zeros(16)
    for k in (0, 2, 4, 6, 7):
        weight, bias = (head[f"layers.{k}.weight"] @ x for x in (weight, bias))
        bias = bias + head[f"layers.{k}.bias"]
    clip = data.Clip(make.files("clip")[0])
    with torch.no_grad():
        image = clip.model.encode_image(torch.stack([clip.transform(image) for image in pictures()]))
    expected = (image / image.norm(dim=1, keepdim=True)) @ weight[0] + bias
    torch.testing.assert_close(make("aesthetic")[0](pictures(), PROMPTS), expected)


def test_the_aesthetic_head_is_downloaded_once_and_by_its_digest(make, tmp_path, monkeypatch):
    """A file from a repository's branch may change; torch.hub refuses it by the digest that it is given."""
    file, options, calls = *make.files("aesthetic"), []

    def download(url, path, sha256, progress):
        calls.append((url.rsplit("/")[-1], sha256[:8], len(sha256)))
        Path(path).write_bytes(Path(file).read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert SCORERS["aesthetic"](**options)[1]["digest"] == SCORERS["aesthetic"](**options)[1]["digest"]
    assert calls == [("sac%2Blogos%2Bava1-l14-linearMSE.pth", "21dd590f", 64)]


@pytest.mark.skipif(
    not LAION_FILE.exists(), reason="LAION's head is not in torch.hub's cache; tests download nothing"
)
def test_golden_values_of_laions_head():
    """Measured once with the authors' code on the published file."""
    assert hashlib.sha256(LAION_FILE.read_bytes()).hexdigest() == scorers.LAION_SHA256
    network = torch.nn.ModuleDict({"layers": scorers.linear_head(768)}).eval()
    scorers.load_weights(network, LAION_FILE)
    x = torch.stack(
        [F.normalize(torch.linspace(-1, 1, 768), dim=0), torch.full((768,), 768**-0.5), torch.zeros(768)]
    )
    expected = torch.tensor([4.2159486, 4.8832846, 5.2366457])
    torch.testing.assert_close(network["layers"](x).squeeze(1), expected, rtol=0, atol=1e-5)
