"""HPSv3 at small width, in its published format: names of older transformers, Qwen2-VL's flat configuration."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import scorers
from common import InputError
from extras import hpsv3
from report import protocol

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PROMPTS = ["a red fox", "{a} {text_prompt} cat, two dogs", "a long prompt with many words " * 4]
WIDTH = 32


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with HPSv3.safetensors and Qwen2-VL's other files."""
    folder = tmp_path_factory.mktemp("hpsv3")
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:])
    tokenizer.save_pretrained(folder)
    config = {"model_type": "qwen2_vl", "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer) + 7,
              "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
              "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
              "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}))

    config = transformers.AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModel.from_config(config)
        state = {}
        for name, tensor in network.state_dict().items():
            values = torch.randn(tensor.shape) * 0.4 if tensor.ndim > 1 else 1 + torch.randn(tensor.shape) / 5
            state[name.replace("language_model.", "model.") if "language_model." in name else name] = values
        for layer, (n_in, n_out) in {0: (WIDTH, 1024), 3: (1024, 16), 5: (16, 2)}.items():
            state[f"rm_head.{layer}.weight"], state[f"rm_head.{layer}.bias"] = torch.randn(n_out, n_in) / 2, torch.randn(n_out)
        state["lm_head.weight"] = torch.randn(len(tokenizer) + 1, WIDTH)
    save_file(state, folder / "HPSv3.safetensors")
    return folder


@pytest.fixture(scope="module")
def score(published):
    return load(published)[0]


def load(source, dtype=torch.float32, **options):
    build = functools.partial(hpsv3.hpsv3, dtype=dtype, **options)
    return scorers.load("hpsv3", build, "FILE", str(source))


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((96, 96), (60, 128), (300, 200))]


def test_a_score_is_of_its_own_picture_and_prompt(score):
    """In any batch, although pictures have other numbers of tokens and prompts are padded."""
    images = pictures()
    scores = score(images, PROMPTS)
    one_by_one = torch.cat([score([image], [prompt]) for image, prompt in zip(images, PROMPTS)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-5, atol=1e-4)
    backwards = score(images[::-1], PROMPTS[::-1])
    torch.testing.assert_close(backwards.flip(0), scores, rtol=1e-5, atol=1e-4)
    assert (score(images, PROMPTS[::-1])[0] - scores[0]).abs() > 0.1 and len(set(scores.tolist())) == 3


def test_the_score_is_the_heads_mean_at_the_reward_token(published, score):
    """Computed here by transformers' own model, told plain positions, which the authors' forward leaves it with."""
    (image, *_), prompt = pictures(), PROMPTS[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    template = hpsv3.HPSV3_PROMPT.read_text()
    assert template.endswith("\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n")
    patches = transformers.AutoImageProcessor.from_pretrained(published)(
        [image.resize((448, 448))], return_tensors="pt")
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * 256 + "<|vision_end|>" + template.replace("{text_prompt}", prompt)
            + "<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text, return_tensors="pt").input_ids
    config = transformers.AutoConfig.from_pretrained(published)
    config.text_config.vocab_size = len(tokenizer)
    model = transformers.AutoModel.from_config(config).eval()
    state = load_file(published / "HPSv3.safetensors")
    model.load_state_dict({name.replace("model.", "language_model."): value for name, value in state.items()
                           if not name.startswith(("rm_head", "lm_head"))})
    positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
    with torch.no_grad():
        hidden = model(input_ids=ids, position_ids=positions, **patches).last_hidden_state
        x = hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
        for layer in (0, 3, 5):
            x = x @ state[f"rm_head.{layer}.weight"].T + state[f"rm_head.{layer}.bias"]
            x = x.relu() if layer < 5 else x
    torch.testing.assert_close(score([image], [prompt]), x[:, 0], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_names_of_newer_transformers_are_taken_too(published, score, tmp_path):
    state = load_file(published / "HPSv3.safetensors")
    renamed = {}
    for name, value in state.items():
        name = name.replace("model.", "model.language_model.") if name.startswith("model.") else name
        renamed[f"model.{name}" if name.startswith("visual.") else name] = value
    for file in published.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(renamed, tmp_path / "HPSv3.safetensors")
    assert torch.equal(load(tmp_path)[0](pictures(), PROMPTS), score(pictures(), PROMPTS))
    for damage, fault in (("rm_head.5.bias", "it lacks head.5.bias"), ("visual.merger.mlp.0.bias", "it lacks qwen.visual")):
        save_file({name: value for name, value in state.items() if name != damage}, tmp_path / "HPSv3.safetensors")
        with pytest.raises(InputError, match=f"hpsv3: .*{fault}.* give hpsv3=FILE"):
            load(tmp_path)
    save_file(state | {"extra": torch.ones(1)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(InputError, match="it holds unknown qwen.language_model.extra"):
        load(tmp_path)


@pytest.mark.slow
def test_the_published_precision_stays(published):
    """bfloat16, with the head in float32; the identity says so, and a table says that the score has no bounds."""
    score, identity = scorers.SCORERS["hpsv3"](str(published))
    exact = load(published)[0](pictures(), PROMPTS)
    rounded = score(pictures(), PROMPTS)
    assert not torch.equal(rounded, exact) and (rounded - exact).norm() < 0.1 * exact.norm()
    assert identity["precision"] == "torch.bfloat16" and len(identity["digest"]) == 16
    assert "it has no bounds, and versions are not comparable" in protocol({}, {"hpsv3": identity})


def test_a_card_without_the_room_is_told_before_it_loads(published, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(scorers, "load_weights", None)  # calling it would raise
    with pytest.raises(ValueError, match=r"it needs 0.0 GB, and 0.0 GB are free"):
        hpsv3.hpsv3(str(published), device="cuda")


@pytest.mark.parametrize("prompt", ["<|Reward|>", "an <|image_pad|>"])
def test_a_prompt_with_a_token_of_the_template_is_refused(score, prompt):
    with pytest.raises(InputError, match="a prompt holds a token of the template"):
        score(pictures()[:1], [prompt])


@pytest.mark.parametrize("size, scaled", [
    ((512, 512), (448, 448)), ((448, 448), (448, 448)), ((1024, 768), (504, 364)), ((64, 48), (532, 392)),
    ((640, 300), (672, 308)), ((10, 2000), (56, 6356)),
    ((136, 136), (448, 448)), ((360, 360), (448, 448))])  # where another order of rounding gives 476
def test_pictures_are_scaled_to_the_authors_size(size, scaled):
    """qwen-vl-utils: sides of multiples of 28; a picture above 256 x 28 x 28 pixels is rounded down, one below up."""
    assert hpsv3.hpsv3_size(*size) == scaled


def test_a_picture_too_long_is_refused():
    with pytest.raises(InputError, match="more than 200 times"):
        hpsv3.hpsv3_size(3000, 10)
