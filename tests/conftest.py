"""What the test files share: no network, a cache of their own, small models, processes."""

import copy
import functools
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # both before the libraries read them: nothing is ever looked up
hub_cache = tempfile.TemporaryDirectory()  # removed when the tests end
os.environ["HF_HOME"] = hub_cache.name

import pytest
import torch

import loading
from common import clip_tokenizer
from extras import random_models, tiny

torch.set_num_threads(1)  # as torchrun has it; the small models are no slower, and equal in every process
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


loaded = functools.cache(loading.load_model)


def fresh(folder, random_init=False, config=None):
    """What loading.load_model gives, read once: most of a small run's time is to read a vocabulary."""
    model = loaded(folder, random_init, config)
    tokenizers = [part for name, part in model.pipe.components.items() if "tokenizer" in name]
    return copy.deepcopy(model, {id(part): part for part in tokenizers})


@pytest.fixture
def quick_models(monkeypatch):
    """Wherever load_model was imported to, the copy of one that was read before."""
    for module in [*sys.modules.values()]:
        if getattr(module, "load_model", None) is loaded.__wrapped__:
            monkeypatch.setattr(module, "load_model", fresh)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        all_workers = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("XDG_CACHE_HOME", str(all_workers / "cache"))
        yield


forks = multiprocessing.get_context("forkserver")  # children of a process that has imported torch already
forks.set_forkserver_preload(
    "train encode conftest open_clip datasets diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl "
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion".split()
)


def in_child(rank, world, port, text, environment, function, args):
    os.environ.update(environment)
    if world > 1:  # as torchrun sets them
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        torch.set_num_threads(1)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(os.open(text, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's processes: it is quicker
    function(*args)


def launch(folder, world, function, *args):
    """(exit status, output) of each of `world` new processes that call an importable function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True, parents=True)
    texts = [folder / f"rank-{rank}.txt" for rank in range(world)]
    for text in texts:
        text.write_text("")
    environment = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")}
    children = [
        forks.Process(target=in_child, args=(rank, world, port, text, environment, function, args))
        for rank, text in enumerate(texts)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)  # seconds; a guard, not a promise
        if child.is_alive():
            for other in children:
                other.kill()
            pytest.fail(f"a process hangs: {[text.read_text()[-2000:] for text in texts]}")
    return [(child.exitcode, text.read_text()) for child, text in zip(children, texts)]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """small_model("sd" | "sdxl" | "sd-v" | "sd3" | "flux"): such a folder, random weights, 32 px to 8x8 latents."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text_encoder(kind, width):
        return kind(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=width,
            )
        )

    def build(kind):
        torch.manual_seed(0)
        xl = kind == "sdxl"
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.13025 if xl else 0.18215,
        )
        extra = (
            dict(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=48 + 6 * 8,
            )
            if xl
            else {}
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=32 + 48 if xl else 32,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **extra,
        )
        schedule = dict(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction" if kind == "sd-v" else "epsilon",
        )
        first, tokenizer = text_encoder(CLIPTextModel, 32), clip_tokenizer(77)
        if xl:
            return StableDiffusionXLPipeline(
                vae,
                first,
                text_encoder(CLIPTextModelWithProjection, 48),
                tokenizer,
                tokenizer,
                unet,
                EulerDiscreteScheduler(**schedule),
            )
        return StableDiffusionPipeline(
            vae,
            first,
            tokenizer,
            unet,
            PNDMScheduler(skip_prk_steps=True, steps_offset=1, **schedule),
            None,
            None,
            requires_safety_checker=False,
        )

    def build_flow(kind):
        clip = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        vae = dict(
            block_out_channels=(8, 8, 8),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
        t5 = dict(vocab_size=98, d_model=96, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
        if kind == "sd3":
            transformer = dict(
                sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=80, pos_embed_max_size=8,
                dual_attention_layers=(0,),
            )
            texts = [clip | dict(hidden_size=width, projection_dim=width) for width in (32, 48)]
            parts = dict(text_encoder=texts[0], text_encoder_2=texts[1], text_encoder_3=t5)
            return random_models.random_model("sd3.5-medium", transformer=transformer, vae=vae, **parts).pipe
        transformer = dict(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=96, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
        )
        parts = dict(text_encoder=clip | dict(hidden_size=32, projection_dim=32), text_encoder_2=t5)
        return random_models.random_model("flux-dev", transformer=transformer, vae=vae, **parts).pipe

    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = str(tmp_path_factory.mktemp(kind))
            pipe = build_flow(kind) if kind in ("sd3", "flux") else build(kind)
            pipe.save_pretrained(folders[kind])
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """A parquet folder in Pick-a-Pic's schema: 24 drawn pairs, a tie, an empty image and a HTML page."""
    rows = tiny.pair_rows(27)
    rows[3] |= {"label_0": 0.5, "label_1": 0.5}
    rows[5] |= {"jpg_0": b""}
    rows[9] |= {"jpg_1": b"<html>404</html>"}
    folder = tmp_path_factory.mktemp("pairs")
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000.parquet")
    return str(folder)
