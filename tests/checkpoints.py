"""The small random checkpoints whose computation make_golden.py recorded, each read once,
and what the tests need to know of either model."""
import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from samples import images
from torch.utils._python_dispatch import TorchDispatchMode

import model_llava
import model_qwen
import model_qwen3
from support.image import CLIP_MEAN, CLIP_STD, normalize, on_white

GOLDEN = Path(__file__).parent / "golden"
# grouped heads and untied, all heads and tied; then grouped and untied, one key/value head and tied
MODULES = {"llava_grouped": model_llava, "llava_tied": model_llava,
           "qwen_untied": model_qwen, "qwen_tied": model_qwen,
           "qwen3_untied": model_qwen3, "qwen3_tied": model_qwen3}
# for what is the same in both checkpoints of a model
ONE_OF_EACH = ["llava_grouped", "qwen_untied", "qwen3_untied"]


@cache
def load(name, dtype=torch.float32):
    """One model for all tests: what a test changes in it, it has to put back."""
    return MODULES[name].load(GOLDEN / name, "cpu", dtype)


@cache
def recording(name):
    """-> cases and tensors."""
    cases = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return cases, load_file(GOLDEN / f"{name}.safetensors")


def cropped(image, side):
    """What CLIP's processor, which was recorded, makes of an image; LLaVA's own evaluation pads."""
    long = int(side * max(image.size) / min(image.size))
    size = (side, long) if image.width <= image.height else (long, side)
    image = on_white(image).resize(size, Image.BICUBIC)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return normalize(image.crop((left, top, left + side, top + side)), CLIP_MEAN, CLIP_STD)


def begin(model, case):
    """Begin a recorded case, its image processed as it was for the recording."""
    image = images()[case["image"]]
    if isinstance(model, model_llava.Llava):
        image = cropped(image, model.config.vision.image_size)
    return model.begin(image, case["question"])


def decoder_of(model):
    """Return embed_tokens, layers and norm, whatever the model file calls them."""
    return model.language_model if hasattr(model, "language_model") else model.model


class Counted(TorchDispatchMode):
    """Counts the operations that torch dispatches, by name: on a GPU, its launches and views. To
    convert a tensor to the precision it has is no operation."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.__name__.split(".")[0]
        if name != "to" or out.dtype != args[0].dtype:
            self.ops[name] += 1
        return out


def greedy(model, stream, steps):
    """(steps, vocab) and (steps,): the logits and the tokens of an answer, one by one."""
    logits = []
    tokens = []
    for _ in range(steps):
        logits.append(model.logits(stream)[0])
        tokens.append(logits[-1].argmax())
        stream = model.run(model.append(stream, tokens[-1].view(1, 1)))
    return torch.stack(logits), torch.stack(tokens)


def logits_of_answer(model, stream, tokens):
    """(steps, vocab): of each token of an answer, from one pass over all of them."""
    first = model.logits(stream)
    answer = model.run(model.append(stream, tokens[None, :-1]))
    steps = [model.logits(answer, row) for row in range(len(tokens) - 1)]
    return torch.cat([first, *steps])


def copy_of(name, folder, **files):
    """Return a copy of a checkpoint's folder whose JSON files hold these entries, too: "a.b" is an
    entry of a."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    for file, entries in files.items():
        file = folder / f"{file}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        for entry, value in entries.items():
            *outer, last = entry.split(".")
            place = found
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = value
        file.write_text(json.dumps(found))
    return folder


def tensors_of(folder):
    """Return the tensors of a folder, by the names in its files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}
