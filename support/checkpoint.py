"""A checkpoint folder as published: config.json, tokenizer.json, safetensors in one file or several
shards. Read strictly, or refused in one line, for every model file.
"""
import importlib
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

from support.files import read_json
from tokprune import InputError

# config.json's model_type -> the file that implements it; nothing else knows which models exist
MODELS = {"llava": "model_llava", "qwen2_5_vl": "model_qwen", "qwen3_vl": "model_qwen3"}
# not implemented -> the file that says why, and what to use instead
RELATIVES = {"llava_llama": "model_llava", "qwen3_vl_moe": "model_qwen3",
             "qwen3_5": "model_qwen3", "qwen3_5_moe": "model_qwen3"}


def load_model(path: Path, device=None, dtype=None, **bounds):
    """The model of a folder, by the file that implements it. bounds: min_pixels and max_pixels, for
    a model that has them. Raises InputError."""
    path = Path(path)
    module = module_of(path)
    for name in bounds:
        if name not in inspect.signature(module.load).parameters:
            raise InputError(f"{name} is {bounds[name]}: model_type {model_type(path)!r} in {path} "
                             "has no such bound, it sees every image at one size")
    return module.load(path, device, dtype, **bounds)


def read_config(path: Path):
    """The model's configuration alone, without its weights. Raises InputError."""
    path = Path(path)
    return module_of(path).read_config(path)


def module_of(path: Path):
    """The module that implements the model of a folder. Raises InputError."""
    check_folder(path)
    kind = model_type(path)
    name = MODELS.get(kind) or RELATIVES.get(kind)
    if name is None:
        raise InputError(f"{path}/config.json: model_type is {kind!r}, want one of "
                         f"{', '.join(MODELS)}")
    return importlib.import_module(name)


def model_type(path: Path) -> str:
    return str(read_json(path / "config.json").get("model_type"))


def check_folder(path: Path):
    """Raises InputError."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; want a checkpoint folder with config.json and "
                         "*.safetensors")


def device_and_dtype(device, dtype) -> tuple:
    """Defaults: CUDA if there is a device, else the CPU; bfloat16 on CUDA, float32 on the CPU.

    On CUDA it also switches off two of cuDNN's ways, for the whole process.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        # cuDNN's attention builds a plan of tens of milliseconds for every new shape, and every
        # decoded token is a new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
        # on by default: a patch embedding in float32 would not be float32
        torch.backends.cudnn.allow_tf32 = False
    return device, dtype


# ---- config.json ---------------------------------------------------------------------------------

def section(raw: dict, name: str, file: Path) -> dict:
    """A section of a JSON file, empty if it is not there. Raises InputError."""
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{file}: {name} is {value!r}, want an object")
    return value


def fill(cls, raw: dict, path: Path):
    """The dataclass, from the entries it has a field for; null means left out. Raises InputError
    where an entry is not of the field's type, or is missing and has no default."""
    values = {}
    for field in fields(cls):
        value = raw.get(field.name)
        if value is not None:
            check_entry(field.name, value, field.type, path)
            values[field.name] = value
        elif field.default is MISSING:
            raise InputError(f"{path}/config.json: {field.name} is not there, and has no default")
    return cls(**values)


def check_entry(name: str, value, kind: type, path: Path):
    """Numbers are above 0, a tuple is a list of whole numbers."""
    if kind is bool or kind is str:
        fits = isinstance(value, kind)
        want = kind.__name__
    elif kind is int:
        fits = type(value) is int and value > 0
        want = "a whole number above 0"
    elif kind is float:
        fits = type(value) in (int, float) and value > 0
        want = "a number above 0"
    else:
        fits = isinstance(value, list) and all(type(item) is int for item in value)
        want = "a list of whole numbers"
    if not fits:
        raise InputError(f"{path}/config.json: {name} is {value!r}, want {want}")


def check_values(path: Path, rules: list[tuple]):
    """Each rule is (name, value, the one value that is implemented). Raises InputError."""
    for name, value, want in rules:
        if value != want:
            raise InputError(f"{path}/config.json: {name} is {value!r}, want {want!r}; nothing "
                             "else is implemented")


def is_tied(raw: dict, text: dict) -> bool:
    """Whether the output head is the embedding. transformers 4.57 says so in text_config alone."""
    return bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def read_bounds(path: Path, default: tuple[int, int]) -> tuple[int, int]:
    """The least and the largest area of a resized image, in pixels; the default where the folder
    has none.

    They are in preprocessor_config.json or, nested, in processor_config.json: under their own names
    or, as transformers 5 saves them, as size. Raises InputError.
    """
    file = path / "preprocessor_config.json"
    raw = {}
    if file.exists():
        raw = read_json(file)
    elif (path / "processor_config.json").exists():
        file = path / "processor_config.json"
        raw = section(read_json(file), "image_processor", file)
    size = section(raw, "size", file)
    names = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    bounds = []
    for (name, of_size), value in zip(names, default):
        for found in (size.get(of_size), raw.get(name)):
            if found is not None:
                value = found
        if type(value) is not int or value < 1:
            raise InputError(f"{file}: {name} is {value!r}, want a whole number above 0")
        bounds.append(value)
    return tuple(bounds)


# ---- tokenizer -----------------------------------------------------------------------------------

def read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json; a truncation or padding that training has left in it is switched off, since
    it would cut a prompt in silence. Raises InputError."""
    file = path / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file}: not found; want the tokenizer as this one file, tokenizer.model "
                         "or vocab.json and merges.txt are not read")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:                              # tokenizers raises a bare Exception
        raise InputError(f"{file}: not a valid tokenizer ({e})")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_eos(path: Path, default: list[int]) -> set[int]:
    """Ids that end an answer, of generation_config.json; the default where that file or its entry
    is missing or null. Raises InputError."""
    file = path / "generation_config.json"
    ids = None
    if file.exists():
        ids = read_json(file).get("eos_token_id")
    if ids is None:
        ids = default
    if not isinstance(ids, list):
        ids = [ids]
    if not ids or not all(type(token) is int for token in ids):
        raise InputError(f"{file}: eos_token_id is {ids}, want token ids")
    return set(ids)


# ---- weights -------------------------------------------------------------------------------------

def empty(model_class, *args):
    """model_class(*args) on the meta device, for `load_weights` to fill.

    nn.Embedding would draw its weights even there, by a part of torch that takes most of a second
    to import.
    """
    draw = nn.Embedding.reset_parameters
    nn.Embedding.reset_parameters = lambda embedding: None
    try:
        with torch.device("meta"):
            return model_class(*args)
    finally:
        nn.Embedding.reset_parameters = draw


def load_weights(model, path: Path, device, dtype, renames: list, ignored: str,
                 tied: tuple[str, str] | None):
    """Fill a model built on the meta device: every parameter, and nothing unknown.

    renames: (pattern, replacement), applied in order to the names in the files. ignored: a pattern
    of renamed tensors that are of no use. tied: the embedding and the head, if one may stand for
    both. One tensor at a time goes from file to device; on the CPU in the stored precision the
    file's own pages are used, uncopied. Raises InputError.
    """
    wanted = dict(model.named_parameters())
    weights = {}
    for shard in find_shards(path):
        for key in read_shard(shard, lambda f: list(f.keys())):
            name = key
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            if name in weights:
                raise InputError(f"{shard}: {key} is there twice")
            if name in wanted:
                # the file is opened anew for each tensor: pages already converted are let go
                tensor = read_shard(shard, lambda f: f.get_tensor(key))
                check_shape(tensor, wanted[name], key, shard)
                weights[name] = tensor.to(device).to(dtype)     # a GPU converts faster than a CPU
            elif not re.search(ignored, name):
                raise InputError(f"{shard}: unknown tensor {key}")
    if tied:
        embedding, head = tied
        if (embedding in weights) != (head in weights):
            one = weights.get(embedding, weights.get(head))
            weights[embedding] = one
            weights[head] = one
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing, the first "
                         f"is {missing[0]}")
    model.load_state_dict(weights, assign=True)
    model.to(device)                                    # buffers, which no file holds


def check_shape(tensor, parameter, key: str, shard: Path):
    """Raises InputError."""
    if tensor.shape != parameter.shape:
        raise InputError(f"{shard}: {key} is {list(tensor.shape)}, config.json wants "
                         f"{list(parameter.shape)}")


def read_shard(shard: Path, read):
    """read(the open file). Raises InputError."""
    try:
        with safe_open(shard, "pt") as f:
            return read(f)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{shard}: cannot be read as safetensors ({e})")


def files_read(path: Path) -> list[Path]:
    """Return the files of a folder that decide what a model answers."""
    names = ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json",
             "processor_config.json")
    return [path / name for name in names if (path / name).exists()] + find_shards(path)


def find_shards(path: Path) -> list[Path]:
    """The files that the index names, or every *.safetensors where there is no index."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = set(map(str, section(read_json(index), "weight_map", index).values()))
        shards = [path / name for name in sorted(names)]
        absent = [shard.name for shard in shards if not shard.exists()]
        if absent or not shards:
            raise InputError(f"{path}: {index.name} names {len(shards)} shards, missing: "
                             f"{', '.join(absent) or 'all'}")
        return shards
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        hint = ""
        if list(path.glob("*.bin")):
            hint = " (its .bin files are not read; convert them to safetensors)"
        raise InputError(f"{path}: no *.safetensors found{hint}")
    return shards
