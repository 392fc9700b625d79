"""A family object out of a preset's name, a diffusers folder, a hub id or one file; LoRA weights in and out; digests.

What the libraries would replace by random values, or would silently leave out, is refused here.
"""

import contextlib
import functools
import importlib
import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from huggingface_hub import errors, hf_hub_download
from safetensors import safe_open

from common import InputError, brief, digest, fingerprint, hub_id
from flow_models import Flux, Flux2Klein, QwenImage, StableDiffusion3, ZImage
from models import StableDiffusion, StableDiffusionXL, cast_for_autocast

HUB_IDS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "z-image": "Tongyi-MAI/Z-Image",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "qwen-image": "Qwen/Qwen-Image",
}
EMBEDDED = {"tiny": "extras.tiny", "tiny-flow": "extras.tiny_flow"}  # the modules that build them
FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL,
            "StableDiffusion3Pipeline": StableDiffusion3, "FluxPipeline": Flux, "ZImagePipeline": ZImage,
            "Flux2KleinPipeline": Flux2Klein, "QwenImagePipeline": QwenImage}
LORA_OPTIONS = "LoRA weights are for --init_lora (train.py, encode.py) or --lora (evaluate.py)"
OTHER_ADAPTERS = {  # by a pattern in their tensors' names
    "dora_scale": "DoRA weights, and diffusers leaves out their magnitudes", "hada_w": "LoHa weights, not LoRA",
    "lokr_w": "LoKr weights, not LoRA",
    r"base_model\.model\.(?!double_blocks|single_blocks)":  # these two are fal's form for FLUX, which diffusers reads
        "in peft's own form, whose scale is in adapter_config.json. Save them by diffusers' save_lora_weights"}
LOWER_LORA = "init_lora.json"  # beside LoRA weights: names the LoRA weights that must be fused before them


def load_model(name, random_init=False, config=None):
    """The float32 model of a preset's name, a diffusers folder, a hub id or a checkpoint in one file.

    Its networks are frozen and on the CPU.

    random_init  for a preset: random weights of the published architecture; nothing is downloaded
    config       for a checkpoint in one file: a diffusers folder with its configuration and vocabularies
    raises       InputError if it cannot be read, is of no known family, or lacks a tensor or a vocabulary
    """
    quiet_libraries()
    if random_init:
        return importlib.import_module("extras.random_models").random_model(name)
    source, family = find_model(name, config)
    try:
        is_file = Path(source).is_file()
        pipe = load_single_file(source, family, config) if is_file else load_pipeline(source, family)
        check_tokenizers(pipe)
        check_widths(pipe, family)
        return family(pipe)
    except Exception as error:
        raise InputError(f"--model {source} cannot be loaded: {brief(error)}")


def quiet_libraries():
    """Turns off progress bars, reports of every prompt that is cut, and warnings about threads in forked readers."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def find_model(name, config=None):
    """(folder, hub id or file; family) of a model, by its model_index.json alone. InputError if it cannot be used."""
    if config and not Path(name).is_file():
        raise InputError(f"--config is for a --model in one file. {name} is no file, or has its own configuration")
    source = HUB_IDS.get(name, name)
    if name in EMBEDDED:
        source = str(importlib.import_module(EMBEDDED[name]).part("pipeline"))
    is_local, is_file = Path(source).is_dir(), Path(source).is_file()
    try:
        if is_file and any("lora" in name for name in tensor_names(source)[0]):
            raise ValueError(f"it holds LoRA weights. {LORA_OPTIONS}")
        described_by = (config or published_config(source)) if is_file else source
        index = model_index(described_by)
        kind = index["_class_name"]
    except Exception as error:
        raise InputError(f"--model {source} cannot be read as a diffusers pipeline: {brief(error).rstrip('.')}"
                         f"{way_out(source, config)}")
    if kind not in FAMILIES:
        raise InputError(f"--model {source} is a {kind}; known are {', '.join(FAMILIES)}")
    for part in FAMILIES[kind].parts:
        is_listed = part in index and index[part][0] is not None
        if not is_listed or is_local and not (Path(source) / part).is_dir():
            raise InputError(f"--model {source} lacks its {part}")
    return source, FAMILIES[kind]


def way_out(source, config):
    """What helps if a source is no pipeline."""
    if Path(source).is_file():
        return "" if config else ". Pass its configuration: --config DIR, a diffusers folder of such a model"
    if Path(source).is_dir():
        return (". A --model is a whole pipeline. A network alone is not enough: copy the pipeline, and put the network "
                f"into its folder there, such as unet/. {LORA_OPTIONS}")
    return ". HF_HUB_OFFLINE is set, so only what was downloaded before is found" if hub.HF_HUB_OFFLINE else ""


def model_index(source):
    """The content of model_index.json of a diffusers folder or a hub id."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.load_config(source if Path(source).is_dir() else hub_id(source))


def load_pipeline(source, family):
    """The pipeline of a folder or a hub id. ValueError if a tensor or a vocabulary is missing."""
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(source)
    networks = {name: None for name, part in index.items() if isinstance(part, list) and part[0] is None}
    for name in (family.denoiser_name, "vae", *family.text_encoders):
        if name in networks:
            continue  # a text encoder that is null in model_index.json
        library, class_name = index[name]
        network_class = getattr(importlib.import_module(library), class_name)
        networks[name], info = load_network(network_class, source, name)
        if info["missing_keys"]:
            raise ValueError(f"its {name} lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    if "safety_checker" in index:
        networks |= {"safety_checker": None, "requires_safety_checker": False}
    return DiffusionPipeline.from_pretrained(source, **networks)


def load_network(network_class, source, name):
    """(network in float32, the library's report), from the only variant of weights that a folder or hub id has."""
    variants = set()
    for file in Path(source, name).glob("*model*"):  # NAME[.VARIANT][-00001-of-00002].(safetensors|bin)[.index.json]
        match = re.fullmatch(r"[^.]+?(\.\w+?)?(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?", file.name)
        if match:
            variants.add((match[1] or match[5] or "").removeprefix("."))
    if len(variants) > 1 and "" not in variants:
        raise ValueError(f"its {name} has the variants {', '.join(sorted(variants))}; keep the files of one")
    variant = variants.pop() if len(variants) == 1 else None
    dtype = "torch_dtype" if network_class.__module__.startswith("diffusers") else "dtype"
    load = functools.partial(network_class.from_pretrained, source, subfolder=name, output_loading_info=True,
                             **{dtype: torch.float32})
    try:
        return load(variant=variant or None)
    except OSError as error:
        if Path(source).exists() or "appear to have a file named" not in str(error):
            raise
        return load(variant="fp16")  # the only one of some hub ids


@functools.cache  # it reads the whole file
def published_config(file):
    """The hub id of the published model that has the architecture of a checkpoint in one file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    return fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]


def load_single_file(file, family, config=None):
    """The pipeline of a checkpoint with the original names. ValueError if a tensor is missing."""
    import diffusers

    pipeline_class = getattr(diffusers, {kind: name for name, kind in FAMILIES.items()}[family])
    no_checker = {"safety_checker": None} if "safety_checker" in pipeline_class._optional_components else {}
    try:
        pipe = pipeline_class.from_single_file(str(file), config=config, torch_dtype=torch.float32, **no_checker)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to("cpu")
    except NotImplementedError:  # torch cannot move a tensor for which the file had no values
        raise ValueError("the file lacks a tensor of a network")
    pipe.scheduler = pipe.scheduler.from_config({**pipe.scheduler.config, **marked_schedule(file)})
    return pipe


@functools.cache
def tensor_names(file):
    """(the names of a file's tensors, its metadata) of a checkpoint in one file."""
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    if Path(file).suffix == ".safetensors":
        with safe_open(file, "pt") as weights:
            return {*weights.keys()}, weights.metadata() or {}
    return {*load_single_file_checkpoint(file)}, {}


def marked_schedule(file):
    """What a checkpoint in one file says of its noise schedule by the marks that ComfyUI and A1111 read, too.

    raises  ValueError for EDM's preconditioning
    """
    names, metadata = tensor_names(file)
    if any(name.startswith("edm_") for name in names):
        raise ValueError("it is marked as an EDM model, which is not one of epsilon or v")
    marks = {}
    if "v_pred" in names or metadata.get("modelspec.prediction_type", "").startswith("v"):
        marks["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        marks["rescale_betas_zero_snr"] = True
    return marks


def check_tokenizers(pipe):
    """ValueError if a tokenizer has no vocabulary. One whose file names no length gets that of its text encoder."""
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part:
            if part.vocab_size <= len(set(part.all_special_ids)):
                raise ValueError(f"its {name} has no vocabulary")
            encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
            if encoder and len(part) > encoder.config.get_text_config().vocab_size:
                raise ValueError(f"its {name} has more words than its {name.replace('tokenizer', 'text_encoder')} knows")
            if encoder and part.model_max_length > 1e6:
                part.model_max_length = getattr(encoder.config, "max_position_embeddings", part.model_max_length)


def check_widths(pipe, family):
    """ValueError if the VAE is of another kind, or if two parts do not fit each other."""
    vae_class = type(pipe.vae).__name__
    if vae_class != family.vae_class:
        raise ValueError(f"its vae is an {vae_class}; an {family.vae_class} is needed")
    denoiser = getattr(pipe, family.denoiser_name).config
    for key, width in family.widths(pipe).items():
        if isinstance(denoiser.get(key), int) and denoiser[key] != width:
            part = "vae" if "channels" in key else "text encoders"
            raise ValueError(f"its {family.denoiser_name} and its {part} do not fit: {key} is {denoiser[key]}, and {width} "
                             "is needed")


# LoRA


def add_lora(model, rank, seed):
    """Puts an adapter into the denoiser: then only the adapter trains. Its first values follow from the seed.

    returns  the layers that hold it, for `disabled_adapter`
    """
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=model.lora_targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.denoiser.add_adapter(config)
    layer_class = peft.tuners.tuners_utils.BaseTunerLayer
    layers = [module for module in model.denoiser.modules() if isinstance(module, layer_class)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # peft would cast to float32, and autocast would cast it back
    return layers


@contextlib.contextmanager
def disabled_adapter(lora_layers):
    """Inside, a network runs without its LoRA adapter: it is the reference of the policy that has it.

    It flips peft's own switch without peft's search through the network, which takes 50 ms at SDXL.
    """
    for layer in lora_layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in lora_layers:
            layer._disable_adapters = False


def save_model(model, folder):
    """Saves a diffusers pipeline; or, if the denoiser has an adapter, LoRA weights for `load_lora_weights`.

    raises  ValueError if the denoiser has weights below float32: they were cast for autocast, which loses their bits
    """
    import diffusers
    import peft

    if not hasattr(model.denoiser, "peft_config"):
        for name, param in model.denoiser.named_parameters():
            if param.dtype != torch.float32:
                raise ValueError(f"{name} is {param.dtype}; freeze weights without cast_for_autocast to save them")
        return model.pipe.save_pretrained(folder)
    weights = peft.get_peft_model_state_dict(model.denoiser)
    if model.denoiser_name == "unet":
        weights = diffusers.utils.convert_state_dict_to_diffusers(weights)
    model.pipe.save_lora_weights(folder, weights)
    if model.init_lora:
        is_local = Path(model.init_lora).exists()
        lower = str(Path(model.init_lora).absolute()) if is_local else model.init_lora
        (Path(folder) / LOWER_LORA).write_text(json.dumps({"init_lora": lower}), encoding="utf-8")


def fuse_lora(model, source, is_lower=False):
    """Adds LoRA weights (a folder, a file or a hub id) to the weights of a model's networks.

    An adapter that was trained with --init_lora needs the first one fused below it, so that one is fused first, if the
    model does not have it yet.

    raises  InputError if the weights cannot be read, or if one of their tensors fits nowhere: diffusers would leave
            it out
    """
    pipe, lower = model.pipe, lower_lora(source)
    if lower:
        fuse_lora(model, lower, is_lower=True)
    try:
        file = lora_file(source)
        refuse_other_adapters(source, file)
        if model.denoiser_name == "unet":
            weights, *_ = pipe.lora_state_dict(source, weight_name=file, unet_config=model.denoiser.config)
        else:
            weights = pipe.lora_state_dict(source, weight_name=file)
        digests = {name: tensor_digest(tensor) for name, tensor in weights.items()}
        if is_lower and digests in model.fused:
            return
        pipe.load_lora_weights(source, weight_name=file)
        loaded = set()
        for network in model.networks().values():
            for name, param in network.named_parameters():
                if "lora_" in name:
                    loaded.add(tensor_digest(param.detach()))
        homeless = [name for name in digests if digests[name] not in loaded]
        if homeless:
            raise ValueError(f"{len(homeless)} of its {len(weights)} tensors fit nowhere: {homeless[0]} ...")
        pipe.fuse_lora(components=pipe._lora_loadable_modules)
        pipe.unload_lora_weights()
        model.init_lora = source
        model.fused.append(digests)
    except Exception as error:
        raise InputError(f"LoRA weights {source} cannot be loaded into this model: {brief(error)}")


def lower_lora(source):
    """The LoRA weights that must be fused before those of a source: a folder, a file in it, or a hub id. Or None."""
    path = Path(source)
    file = path.with_name(LOWER_LORA) if path.is_file() else path / LOWER_LORA
    if not path.exists():
        try:
            file = Path(hf_hub_download(source, LOWER_LORA))
        except errors.LocalEntryNotFoundError:
            print(f"{source}: whether these LoRA weights stand on others cannot be looked up now")
        except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError):
            return None  # if the weights are not there either, reading them says so
    try:
        return json.loads(file.read_text(encoding="utf-8"))["init_lora"] if file.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read: {error!r}")


def lora_file(source):
    """The name of a source's only file of weights, which some versions of diffusers do not look for offline."""
    if not Path(source).exists():
        hub_id(source)
        return "pytorch_lora_weights.safetensors" if hub.HF_HUB_OFFLINE else None
    files = [Path(source)] if Path(source).is_file() else []
    for suffix in ("safetensors", "bin"):
        files = files or [*Path(source).glob(f"*.{suffix}")]
    return files[0].name if len(files) == 1 else None


def refuse_other_adapters(source, file):
    """ValueError if weights, in any file or of a hub id, are another adapter than LoRA in diffusers' or kohya's form."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    unset = dict.fromkeys(("local_files_only", "cache_dir", "proxies", "token", "revision", "subfolder"))
    weights, *_ = _fetch_state_dict(source, file, **unset, use_safetensors=True, force_download=False, allow_pickle=True,
                                    user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"})
    for pattern, kind in OTHER_ADAPTERS.items():
        if any(re.search(pattern, name) for name in weights):
            raise ValueError(f"they are {kind}")


def tensor_digest(tensor):
    """A digest of the values, whatever their type and shape."""
    return digest(tensor.float().cpu().numpy().tobytes())


# Digests


def encoder_digests(model):
    """{name: digest} of all that encoded pairs depend on: VAE, text encoders, tokenizers."""
    digests = {"force_zeros_for_empty_prompt": bool(model.pipe.config.get("force_zeros_for_empty_prompt"))}
    if hasattr(model.pipe, "prompt_template_encode"):
        digests["prompt template"] = digest(model.pipe.prompt_template_encode)
    parts = {name: part for name, part in model.pipe.components.items() if part}
    for name, part in sorted(parts.items()):
        if name == "vae" or name in model.text_encoders:
            digests[name] = digest_with_config(part)
        elif name.startswith("tokenizer"):
            vocabulary = part.get_vocab()
            content = [sorted(vocabulary, key=vocabulary.get), part.special_tokens_map, part.pad_token_id,
                       part.padding_side, part.model_max_length, part("a photo").input_ids]
            digests[name] = digest(content + ([part.chat_template] if part.chat_template else []))
    return digests


def model_digests(model):
    """{name: digest} of all that a run starts from. Call it before anything trains."""
    denoiser = digest_with_config(model.denoiser)
    return encoder_digests(model) | {model.denoiser_name: denoiser, "noise schedule": digest(model.schedule())}


def digest_with_config(network):
    """A digest of a network's `fingerprint` and its configuration, without who saved it and where."""
    config = network.config if isinstance(network.config, dict) else network.config.to_dict()
    omitted = ("transformers_version", "dtype", "torch_dtype", "architectures")
    config = {key: str(value) for key, value in config.items() if key[0] != "_" and key not in omitted}
    return digest([fingerprint(network), config])


def weights_digest(model):
    """A digest of all weights of a pipeline. It tells a model from one that was trained on under the same name."""
    return digest({name: digest(network) for name, network in model.networks().items()})


# On the device


def place_encoders(model, device, dtype, only_adapter):
    """Puts VAE and text encoders on the device. If only an adapter is saved, text encoders are cast for autocast."""
    for name, network in model.networks().items():
        if only_adapter and name in model.text_encoders:
            cast_for_autocast(network, dtype, device)
        elif network is not model.denoiser:
            network.to(device)


def release_encoders(model, keeps_vae):
    """Takes off the device what only the samples' prompts and the held-out pairs needed."""
    vars(model).pop("encoding_vae", None)
    for name, network in model.networks().items():
        if network is not model.denoiser and not (name == "vae" and keeps_vae):
            network.to("cpu")


def compile_blocks(network, names):
    """Compiles, in place, the modules whose class has one of these names. Their weights keep their names.

    Each size of input gets its own graph, because a graph for all sizes would round differently.
    """
    torch._dynamo.config.recompile_limit = 256  # per class: sizes, each with and without gradient and adapter
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile(dynamic=False)
