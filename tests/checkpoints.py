"""The small random checkpoints whose computation the make_golden scripts recorded, each read once,
and what the tests need to know of either model."""
import json
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from samples import images

import model_llava
import model_qwen
import model_qwen3

GOLDEN = Path(__file__).parent / "golden"
# float32 against a float64 original; and both in float64, where the order of summation hides
# nothing
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-5)]
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


def preprocess(model):
    """As the recorded processor did: it crops, where LLaVA's own evaluation pads."""
    if isinstance(model, model_llava.Llava):
        return partial(model.preprocess, mode="crop")
    return model.preprocess


def begin(model, case):
    pixels = preprocess(model)(images()[case["image"]])
    return model.begin(pixels, case["question"])


def logits_of_answer(model, stream, tokens):
    """(steps, vocab): of each token of an answer, from one pass over all of them."""
    first = model.logits(stream)
    answer = model.run(model.append(stream, tokens[None, :-1]))
    steps = [model.logits(answer, row) for row in range(len(tokens) - 1)]
    return torch.cat([first, *steps])
