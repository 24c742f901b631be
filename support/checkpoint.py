"""A checkpoint folder as published: config.json, tokenizer.json, safetensors in one file or several
shards. It is read strictly, or refused in one line, for every model file."""
import importlib
import inspect
import os
import re
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode

from support.files import on_disk, read_json, read_text
from support.image import CLIP_MEAN, CLIP_STD
from tokprune import InputError

# config.json's model_type -> the file that implements it; nothing else knows which models exist
MODELS = {"llava": "model_llava", "qwen2_5_vl": "model_qwen", "qwen3_vl": "model_qwen3"}
# what reads like one of them and is another model -> why it is refused, and what to use instead
DENSE = "want a dense Qwen3-VL: 2B, 4B, 8B or 32B"
REFUSED = {
    "llava_llama": "the original layout, with its own names and no vision tower inside; want the "
                   "converted folder, e.g. llava-hf/llava-1.5-7b-hf",
    "qwen3_vl_moe": f"a mixture of experts, whose MLPs are not implemented; {DENSE}",
    "qwen3_5": "three of four of its layers are linear attention: dropping rows would change the "
               "state of every later row, and most layers have no attention to score tokens by; "
               + DENSE,
    "qwen3_5_moe": f"a mixture of experts, and mostly linear attention; {DENSE}"}
# a rotary embedding that is not scaled, where transformers 4 and 5 say so; Qwen2.5-VL at the root
ROPE_RULES = [("config.json", f"{place}{rope}.{key}", "default", "mrope")
              for place in ("text_config.", "") for rope in ("rope_scaling", "rope_parameters")
              for key in ("rope_type", "type")]

# what would decode another answer than the most likely tokens one by one
GREEDY_RULES = [("generation_config.json", entry, value) for entry, value in {
    "num_beams": 1, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "bad_words_ids": [], "sequence_bias": {}, "suppress_tokens": [], "begin_suppress_tokens": [],
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1}.items()]


def load_model(path: Path, device=None, dtype=None, **bounds):
    """Return the model of a folder, or of a name in the Hugging Face cache. bounds: min_pixels and
    max_pixels, for a model that has them. Raises InputError."""
    path = find_folder(path)
    module = module_of(path)
    for name in bounds:
        if name not in inspect.signature(module.load).parameters:
            raise InputError(f"{name} is {bounds[name]}: the model of {path} has no such bound, it "
                             "sees every image at one size")
    return module.load(path, device, dtype, **bounds)


def read_config(path: Path):
    """Return the model's configuration only, without its weights. Raises InputError."""
    path = find_folder(path)
    return module_of(path).read_config(path)


def module_of(path: Path):
    """Return the module that implements the model of a folder. Raises InputError."""
    return importlib.import_module(MODELS[read_entries(path)["model_type"]])


def load(model_class, config, path, device, dtype, renames: list, ignored: str, eos: list[int],
         image: str, first: str | None = None):
    """Return the model of a folder, its weights on the device, ready to run. Raises InputError.

    renames, ignored: see `load_weights`. eos: where the folder does not say what ends an answer.
    image: the token that stands for the image. first: the token before every prompt.
    """
    path = Path(path)
    device, dtype = device_and_dtype(device, dtype)
    tokenizer = read_tokenizer(path, config.image_token, image, first)
    model = empty(model_class, config, tokenizer, read_eos(path, eos))
    load_weights(model, path, device, dtype, renames, ignored, config.tie_word_embeddings)
    return model.eval().requires_grad_(False)


def device_and_dtype(device, dtype) -> tuple:
    """Return both, or their defaults: CUDA if there is one, else the CPU; bfloat16 on CUDA, float32
    on the CPU. On CUDA, switch off two features of cuDNN for the whole process."""
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


# ---- the folder ----------------------------------------------------------------------------------

def find_folder(path: Path) -> Path:
    """Return the folder itself, or its snapshot in the Hugging Face cache: for a name such as
    llava-hf/llava-1.5-7b-hf that is no folder here, and for a path to models--org--name. Nothing
    is downloaded. Raises InputError."""
    path = on_disk(Path(path))
    repository = path
    where = "; want a checkpoint folder with config.json and *.safetensors"
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()):
        cache, variable = hugging_face_cache()
        repository = cache / f"models--{path.parent.name}--{path.name}"
        where = f", nor {repository} ({variable}){how_to_download(repository)}"
    if not repository.is_dir():
        raise InputError(f"{path}: no such folder{where}")
    if not repository.name.startswith("models--") or (repository / "config.json").exists():
        return repository
    snapshots = sorted(repository.glob("snapshots/[!.]*/"))
    main = repository / "refs/main"
    if main.exists():
        named = repository / "snapshots" / read_text(main).strip()
        snapshots = [named] if named in snapshots else snapshots
    if len(snapshots) != 1:
        names = ", ".join(snapshot.name for snapshot in snapshots) or "none"
        raise InputError(f"{repository}: snapshots are {names}, and refs/main names none of them; "
                         f"want the path of one{how_to_download(repository)}")
    return snapshots[0]


def hugging_face_cache() -> tuple[Path, str]:
    """Return the cache of huggingface_hub, and which variable says so."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"),
                        ("XDG_CACHE_HOME", "huggingface/hub")):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser() / below, f"{name} is set"
    return Path.home() / ".cache/huggingface/hub", "HF_HOME is not set"


def how_to_download(path: Path) -> str:
    """Return what to say where a file is missing: the command, for a repository in the cache or a
    snapshot of it, else ""."""
    for folder in (path, *path.parents[1:2]):
        if folder.name.startswith("models--"):
            name = folder.name.removeprefix("models--").replace("--", "/")
            return f"; nothing is downloaded here, want: hf download {name}"
    return ""


def is_there(file: Path) -> bool:
    """Tell whether the file is there. Raises InputError if it is a link to one that is gone, or
    what Git LFS leaves in its place."""
    if file.is_symlink() and not file.exists():
        raise InputError(f"{file}: a link to a file that is gone{how_to_download(file.parent)}")
    if file.is_file() and file.stat().st_size < 1000 and b"git-lfs" in file.read_bytes()[:50]:
        raise InputError(f"{file}: a pointer of Git LFS, not the file; want: git lfs pull")
    return file.exists()


def entries_of(path: Path, name: str) -> tuple[Path, dict]:
    """Return a file of a folder and its entries, without those that are null; none if it is not
    there. Raises InputError.

    As in transformers, an image_processor in processor_config.json counts before
    preprocessor_config.json, and its mean and std are CLIP's where it has none.
    """
    file = path / name
    found = read_json(file) if is_there(file) else {}
    if name == "preprocessor_config.json":
        outer, of_processor = entries_of(path, "processor_config.json")
        if "image_processor" in of_processor:
            file = outer
            found = section(of_processor, "image_processor", file)
    found = {entry: value for entry, value in found.items() if value is not None}
    if found and name == "preprocessor_config.json":
        found = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)} | found
    return file, found


def section(raw: dict, name: str, file: Path) -> dict:
    """Return a section of a JSON file, empty if it is not there. Raises InputError."""
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{file}: {name} is {value!r}, want an object")
    return value


def check_entries(path: Path, rules: list[tuple]):
    """Raise InputError where a folder asks for what is not implemented. A rule is a file, an entry
    ("text_config.hidden_act") and the values that are; an entry that is not there asks nothing."""
    for name, entry, *values in rules:
        file, found = entries_of(path, name)
        for part in entry.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None and found not in values:
            raise InputError(f"{file}: {entry} is {found!r}, want "
                             f"{' or '.join(map(repr, values))}; nothing else is implemented")


def processor_rules(mean: tuple, std: tuple, **entries: list) -> list[tuple]:
    """Return the rules of an image processor with that mean and std, and its own entries."""
    values = {"image_mean": [list(mean)], "image_std": [list(std)], "rescale_factor": [1 / 255],
              "resample": [Image.BICUBIC], "do_resize": [True], "do_rescale": [True],
              "do_normalize": [True], "do_convert_rgb": [True]} | entries
    return [("preprocessor_config.json", entry, *of_entry) for entry, of_entry in values.items()]


def check_template(path: Path, prompt: str):
    """Raise InputError where the folder's chat template opens an answer, or a conversation, in
    other words than the prompt: then the model thinks first, or has another language model."""
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja",
                 "tokenizer_config.json"):                          # transformers' order
        file = path / name
        if is_there(file):
            template = (read_text(file) if file.suffix == ".jinja"
                        else str(read_json(file).get("chat_template") or ""))
            if template:
                break
    else:
        return
    text = re.sub(r"\{\{-?(.*?)-?\}\}", strings_in, template, flags=re.S).replace("\\n", "\n")
    want = prompt.split("{question}")[1].removeprefix("<|im_end|>").strip()
    opens = re.findall(r"if[^%]*add_generation_prompt[^%]*%\}(.*?)\{%", text, re.S)
    if not opens:                                       # a template that always opens one
        opens = re.findall(re.escape(want) + r"(?:\s*<\w+>)?", text)
    opened = opens[-1].strip() if opens else ""
    if opened != want:
        raise InputError(f"{file}: the chat template opens an answer with {opened!r}, want "
                         f"{want!r}; no model that thinks first, and none with another template, "
                         "is implemented")
    system = r"<\|im_start\|>system\n([^{<+]+)<\|im_end\|>"
    turns = set(re.findall(system, text))
    our_turns = set(re.findall(system, prompt))
    if turns - our_turns or any(turn not in text for turn in our_turns):
        raise InputError(f"{file}: the chat template's system turn is {sorted(turns)}, want "
                         f"{sorted(our_turns)}")


def strings_in(expression: re.Match) -> str:
    """Return what a template's expression always writes: the strings in it that are no index."""
    found = re.findall(r"""(?<!\[)(?:'([^']*)'|"([^"]*)")(?!\])""", expression[1])
    return "".join(one or other for one, other in found)


def rows_of_prompt(ids: list[int], V: int, config) -> int:
    """Return the rows of a prompt whose image token stands for V visual ones. Raises InputError if
    the model has fewer positions, or no embedding for one of the tokens."""
    rows = len(ids) - 1 + V
    limit = config.text.max_position_embeddings
    if rows > limit:
        raise InputError(f"prompt has {rows} tokens, longer than the {limit} that the model takes "
                         "(max_position_embeddings or sliding_window in config.json)")
    if max(ids) >= config.text.vocab_size:
        raise InputError(f"prompt has a token of id {max(ids)}, and the model's vocab_size is "
                         f"{config.text.vocab_size}")
    return rows


# ---- config.json ---------------------------------------------------------------------------------

def read_entries(path: Path, want: str | None = None) -> dict:
    """Return what config.json of a folder holds, without the entries that are null. want: the
    model_type that it must have; else one of MODELS. Raises InputError."""
    file, adapter = entries_of(path, "adapter_config.json")
    if adapter:
        raise InputError(f"{file}: an adapter of {adapter.get('base_model_name_or_path')}; want it "
                         "merged into that model (peft: merge_and_unload), in a folder without "
                         "this file")
    file, raw = entries_of(path, "config.json")
    if not file.exists():
        raise InputError(f"{file}: not found{how_to_download(path)}")
    check_not_quantized(path, raw)
    kind = str(raw.get("model_type"))
    if "mm_vision_tower" in raw:        # early files in the original layout say "llava", too
        kind = "llava_llama"
    if kind in REFUSED:
        raise InputError(f"{file}: model_type is {kind!r}, {REFUSED[kind]}")
    if kind not in MODELS or kind != (want or kind):
        raise InputError(f"{file}: model_type is {kind!r}, want "
                         f"{repr(want) if want else 'one of ' + ', '.join(MODELS)}")
    return raw


def check_not_quantized(path: Path, raw: dict):
    """Raise InputError, which names the method, if the weights are not plain numbers."""
    said = [(name, entries_of(path, name)[1])
            for name in ("quantize_config.json", "hf_quant_config.json")]
    said += [("config.json", part.get(name)) for part in (raw, *raw.values())
             if isinstance(part, dict) for name in ("quantization_config", "quantization")]
    for name, how in said:
        if how:
            method = isinstance(how, dict) and how.get("quant_method") or str(how)[:60]
            raise InputError(f"{path / name}: the weights are quantized: {method}; want the "
                             "original ones, in bfloat16, float16 or float32")


def read_sections(path: Path, kind: str, rules: list, prompt: str) -> tuple[dict, dict, dict]:
    """Return config.json of a folder of that model_type: the whole, its text_config (which
    Qwen2.5-VL has at the root) with the entries of the rotary embedding, and its vision_config.
    Raises InputError, also where the folder breaks a rule."""
    raw = read_entries(path, kind)
    check_entries(path, rules + ROPE_RULES + GREEDY_RULES)
    check_template(path, prompt)
    file = path / "config.json"
    text = section(raw, "text_config", file) or raw
    for name in ("rope_parameters", "rope_scaling"):                # the second counts
        rope = section(text, name, file)
        text = text | {key: value for key, value in rope.items() if value is not None}
    # transformers 4.57 says in text_config only that the output head is the embedding
    raw["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings")
                                      or text.get("tie_word_embeddings"))
    return raw, text, section(raw, "vision_config", file)


def fill(cls, raw: dict, path: Path):
    """Return the dataclass, from the entries it has a field for; null means left out. Raises
    InputError where one is not of the field's type, or is missing and has no default."""
    values = {}
    for field in fields(cls):
        value = raw.get(field.name)
        if value is not None:
            check_entry(path / "config.json", field.name, value, field.type)
            values[field.name] = value
        elif field.default is MISSING:
            raise InputError(f"{path}/config.json: {field.name} is not there, and has no default")
    return cls(**values)


def check_entry(where: Path, name: str, value, kind: type):
    """Raise InputError unless the value is a number above 0, or a list of whole numbers."""
    if kind in (int, float):
        fits = type(value) in (int, kind) and value > 0
        want = "a whole number above 0" if kind is int else "a number above 0"
    else:
        fits = isinstance(value, list) and all(type(item) is int for item in value)
        want = "a list of whole numbers"
    if not fits:
        raise InputError(f"{where}: {name} is {value!r}, want {want}")


# least and largest area of a resized image -> its name in size, and transformers' default
BOUNDS = {"min_pixels": ("shortest_edge", 56 * 56), "max_pixels": ("longest_edge", 1280 * 28 * 28)}


def read_bounds(path: Path, **given: int | None) -> dict:
    """Return min_pixels, max_pixels and bounds_from, which says where they come from: given, the
    folder (under their own names or in size) or transformers' default. Raises InputError."""
    file, raw = entries_of(path, "preprocessor_config.json")
    size = section(raw, "size", file)
    unknown = size.keys() - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
    if unknown:
        raise InputError(f"{file}: size has {', '.join(sorted(unknown))}, want shortest_edge and "
                         "longest_edge, in pixels of area; nothing else is implemented")
    bounds = {}
    sources = []
    for name, (in_size, default) in BOUNDS.items():
        places = [("as given", given.get(name)), (file.name, raw.get(name)),
                  (file.name, size.get(in_size)), (file.name, size.get(name)),
                  ("transformers' default", default)]
        source, value = next(place for place in places if place[1] is not None)
        check_entry(path, name, value, int)
        bounds[name] = value
        sources.append(source)
    if bounds["min_pixels"] > bounds["max_pixels"]:
        raise InputError(f"{path}: min_pixels is {bounds['min_pixels']}, max_pixels "
                         f"{bounds['max_pixels']}; want min_pixels <= max_pixels")
    return bounds | {"bounds_from": ", ".join(dict.fromkeys(sources))}


# ---- tokenizer -----------------------------------------------------------------------------------

def read_tokenizer(path: Path, image_token: int, image: str, first: str | None) -> Tokenizer:
    """Return the tokenizer of a folder. Raises InputError, also if it has another id for the image
    than config.json, or puts other tokens around a text than the first one before it."""
    check_entries(path, [("processor_config.json", "image_token", image),
                         ("tokenizer_config.json", "add_bos_token", first is not None),
                         ("tokenizer_config.json", "add_eos_token", False)])
    file = path / "tokenizer.json"
    if not is_there(file):
        raise InputError(f"{file}: not found; want the tokenizer as this one file, tokenizer.model "
                         f"or vocab.json and merges.txt are not read{how_to_download(path)}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:                              # tokenizers raises a bare Exception
        raise InputError(f"{file}: not a valid tokenizer ({e})")
    tokenizer.no_truncation()           # left there by training, it would cut a prompt in silence
    tokenizer.no_padding()
    found = tokenizer.token_to_id(image)
    if type(image_token) is not int or image_token != found:
        raise InputError(f"{path}: the id of {image} is {image_token!r} in config.json, {found!r} "
                         "in tokenizer.json; want the same")
    bare = tokenizer.encode("a", add_special_tokens=False).tokens
    tokens = tokenizer.encode("a").tokens
    if tokens != ([first] if first else []) + bare:
        raise InputError(f"{file}: encodes a text {bare} as {tokens}; want "
                         f"{first + ' before it, and ' if first else ''}nothing else added")
    return tokenizer


def read_eos(path: Path, default: list[int]) -> set[int]:
    """Return the ids that end an answer: of generation_config.json, else of config.json, else of
    its text_config, else the default. Raises InputError."""
    config, raw = entries_of(path, "config.json")
    places = [entries_of(path, "generation_config.json"), (config, raw),
              (config, section(raw, "text_config", config)), (config, {"eos_token_id": default})]
    file, ids = next((file, entries["eos_token_id"]) for file, entries in places
                     if entries.get("eos_token_id") is not None)
    if not isinstance(ids, list):
        ids = [ids]
    if not ids or not all(type(token) is int for token in ids):
        raise InputError(f"{file}: eos_token_id is {ids}, want token ids")
    return set(ids)


# ---- weights -------------------------------------------------------------------------------------

class NothingDrawn(TorchFunctionMode):
    """Where it is on, nn.Embedding does not draw its weights: the part of torch that would do so on
    the meta device takes most of a second to import."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty(model_class, *args):
    """Return model_class(*args) on the meta device, for `load_weights` to fill."""
    with torch.device("meta"), NothingDrawn():
        return model_class(*args)


def load_weights(model, path: Path, device, dtype, renames: list, ignored: str, tied: bool):
    """Fill a model built on the meta device: every parameter, and nothing unknown. Raises
    InputError.

    renames: (pattern, replacement), applied in order to the names in the files. ignored: a pattern
    of renamed tensors that are of no use. tied: the embedding and the head may stand for one
    another. On the CPU in the stored precision the file's own pages are used, uncopied.
    """
    wanted = dict(model.named_parameters())
    weights = {}
    for shard in find_shards(path):
        for key in read_shard(shard, lambda f: list(f.keys())):
            name = key
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            if name in weights:
                raise InputError(f"{shard}: {key} is a duplicate")
            if name in wanted:
                # the file is opened anew for each tensor: pages already converted are let go
                tensor = read_shard(shard, lambda f: f.get_tensor(key))
                check_shape(tensor, wanted[name], key, shard)
                weights[name] = tensor.to(device).to(dtype)     # a GPU converts faster than a CPU
            elif not re.search(ignored, name):
                raise InputError(f"{shard}: unknown tensor {key}")
    if tied:
        embedding = next(name for name in wanted if name.endswith("embed_tokens.weight"))
        head = "lm_head.weight"
        for name, other in ((embedding, head), (head, embedding)):
            if other in weights:
                weights.setdefault(name, weights[other])
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing, the first "
                         f"is {missing[0]}{how_to_download(path)}")
    model.load_state_dict(weights, assign=True)
    model.to(device)                                    # buffers, which no file holds


def check_shape(tensor, parameter, key: str, shard: Path):
    """Raise InputError if the tensor has another shape than the parameter, or is quantized: whole
    numbers, or those of 8 bits, to which a scale elsewhere belongs."""
    if tensor.element_size() < 2 or not tensor.is_floating_point():
        raise InputError(f"{shard}: {key} is {str(tensor.dtype)[6:]}, quantized; want bfloat16, "
                         "float16 or float32")
    if tensor.shape != parameter.shape:
        raise InputError(f"{shard}: {key} is {list(tensor.shape)}, config.json wants "
                         f"{list(parameter.shape)}")


def read_shard(shard: Path, read):
    """Return read(the open file). Raises InputError."""
    try:
        with safe_open(shard, "pt") as f:
            return read(f)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{shard}: cannot be read as safetensors ({e})")


def files_read(path: Path) -> list[Path]:
    """Return the files of a folder's tokenizer and weights: what decides a model's answers, beside
    its configuration. Raises InputError."""
    path = find_folder(path)
    return [path / "tokenizer.json", *find_shards(path)]


def find_shards(path: Path) -> list[Path]:
    """Return the files of the weights: model.safetensors, else those that the index names, else all
    called model-*.safetensors. Others in the folder are none of the model. Raises InputError."""
    if is_there(path / "model.safetensors"):
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if is_there(index):
        names = set(map(str, section(read_json(index), "weight_map", index).values()))
        shards = [path / name for name in sorted(names)]
        absent = [shard.name for shard in shards if not is_there(shard)]
        if absent or not shards:
            raise InputError(f"{path}: {index.name} names {len(shards)} shards, missing: "
                             f"{', '.join(absent) or 'all'}{how_to_download(path)}")
        return shards
    shards = [shard for shard in sorted(path.glob("model-*.safetensors")) if is_there(shard)]
    if not shards:
        hint = how_to_download(path)
        if list(path.glob("*.bin")):
            hint = " (its .bin files are not read; convert them to safetensors)"
        raise InputError(f"{path}: no model.safetensors, its index or model-*.safetensors found"
                         f"{hint}")
    return shards
