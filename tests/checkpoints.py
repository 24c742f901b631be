"""The small random checkpoints whose computation make_golden.py recorded, and what the tests need to know of either model."""
import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from samples import images

import model_llava
import model_qwen

GOLDEN = Path(__file__).parent / "golden"
# float32 against a float64 original; and both in float64, where the order of summation hides nothing
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-5)]
# grouped heads and untied, all heads and tied; grouped and untied, one key/value head and tied
MODULES = {"llava_grouped": model_llava, "llava_tied": model_llava, "qwen_untied": model_qwen, "qwen_tied": model_qwen}


def load(name, dtype=torch.float32):
    return MODULES[name].load(GOLDEN / name, "cpu", dtype)


def recording(name):
    """-> cases and tensors."""
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"], load_file(GOLDEN / f"{name}.safetensors")


def preprocess(model):
    """As the recorded processor did: LLaVA's own evaluation pads, the published processor crops."""
    return partial(model.preprocess, mode="crop") if isinstance(model, model_llava.Llava) else model.preprocess


def begin(model, case):
    return model.begin(preprocess(model)(images()[case["image"]]), case["question"])


def decoder(model):
    """embed_tokens, layers, norm."""
    return model.language_model if isinstance(model, model_llava.Llava) else model.model


def greedy(model, stream, steps):
    """The logits of each step and the tokens, never stopping early."""
    logits, tokens = [], []
    for _ in range(steps):
        logits.append(model.logits(stream)[0])
        tokens.append(logits[-1].argmax())
        stream = model.run(model.append(stream, tokens[-1].view(1, 1)))
    return torch.stack(logits), torch.stack(tokens)
