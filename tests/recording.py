"""What the make_golden scripts share: tokenizers, ways to run the original, files.

Needs transformers 5.23.0; no test and no user does.
"""
import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from samples import kept
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors)
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"


# ---- tokenizers ----------------------------------------------------------------------------------

def llama_tokenizer(path: Path):
    """LLaMA's normaliser, BOS and decoder over single characters; <image> is 300, <pad> 301."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", "▁", "\n", *characters]
    tokens += [f"▁{character}" for character in characters]
    tokens += [f"<{i}>" for i in range(len(tokens), 300)]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", character) for character in characters]
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                     special_tokens=[("<s>", 1)])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    t.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    assert t.token_to_id("<image>") == 300 and t.token_to_id("<pad>") == 301
    return saved(t, path)


def qwen_tokenizer(path: Path):
    """Qwen's normaliser and byte level over single bytes; its special tokens are 300 to 307,
    <|image_pad|> 306."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{i}>" for i in range(len(tokens), 300)]
    vocab = {token: i for i, token in enumerate(tokens)}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(False, use_regex=False)
    t.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    t.decoder = decoders.ByteLevel()
    special = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad",
               "image_pad", "video_pad")
    t.add_special_tokens([f"<|{token}|>" for token in special])
    assert t.token_to_id("<|image_pad|>") == 306
    return saved(t, path)


def saved(tokenizer: Tokenizer, path: Path):
    tokenizer.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


# ---- running the original ------------------------------------------------------------------------

def greedy(model, inputs: dict, new_tokens: int, penalty: float = 1.0):
    """Logits of each step, (new_tokens, vocab), and the tokens; nothing stops early."""
    mask = torch.ones_like(inputs["input_ids"])
    out = model.generate(**inputs, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                         repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
                         return_dict_in_generate=True, output_logits=True)
    return torch.cat(out.logits), out.sequences[0, inputs["input_ids"].shape[1]:]


@contextlib.contextmanager
def masked(model, layer: int, start: int, V: int, keep: list[int]):
    """Hides the visual tokens outside `keep`, as keys, from every decoder layer >= `layer`."""
    gone = [start + i for i in range(V) if i not in keep]

    def hook(module, args, kwargs):
        x = kwargs.get("hidden_states", args[0] if args else None)
        rows = x.shape[1]
        columns = kwargs["past_key_values"].get_seq_length(module.self_attn.layer_idx) + rows
        causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        mask = torch.zeros(1, 1, rows, columns, dtype=x.dtype).masked_fill(~causal, -torch.inf)
        mask[..., gone] = -torch.inf
        own = range(columns - rows, columns)
        mask[..., range(rows), own] = 0         # a removed row still sees itself: no empty softmax
        return args, kwargs | {"attention_mask": mask}
    layers = model.model.language_model.layers[layer:]
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in layers]
    yield
    for handle in hooks:
        handle.remove()


def pruned_answers(model, inputs: dict, new_tokens: int) -> tuple[dict, dict]:
    """At every layer with a third of the visual tokens and with none: tensors by key, and
    {key: [layer, kept tokens]}."""
    visual = inputs["input_ids"][0] == model.config.image_token_id
    start = visual.nonzero()[0].item()
    V = visual.sum().item()
    tensors = {}
    pruned = {}
    for layer in range(model.config.text_config.num_hidden_layers):
        for keep in (kept(V, layer), []):
            key = f"layer{layer}.keep{len(keep)}"
            with masked(model, layer, start, V, keep):
                logits, tokens = greedy(model, inputs, new_tokens)
            tensors[f"{key}.logits"] = logits
            tensors[f"{key}.tokens"] = tokens
            pruned[key] = [layer, keep]
    return tensors, pruned


@contextlib.contextmanager
def recorded_attention(modeling, tower):
    """A list that receives the attention of each block that the tower runs meanwhile."""
    seen = []
    original = modeling.eager_attention_forward
    implementation = tower.config._attn_implementation

    def recorded(*args, **kwargs):
        out = original(*args, **kwargs)
        seen.append(out[1])
        return out
    modeling.eager_attention_forward = recorded
    tower.config._attn_implementation = "eager"
    yield seen
    tower.config._attn_implementation = implementation
    modeling.eager_attention_forward = original


def received(attention) -> torch.Tensor:
    """What each visual token receives: mean over heads and rows, then over its four patches."""
    return attention[0].mean((0, 1)).view(-1, 4).mean(1)


def record_answers(model, tokenizer, inputs: dict, new_tokens: int, prune: bool):
    """Tensors of the greedy answer and, with prune, of pruned ones; and what the JSON file says of
    them."""
    logits, tokens = greedy(model, inputs, new_tokens)
    _, penalised = greedy(model, inputs, new_tokens, 1.5)
    tensors = {"logits": logits, "tokens": tokens}
    pruned = {}
    if prune:
        found, pruned = pruned_answers(model, inputs, new_tokens)
        tensors |= found

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    return tensors, {"pruned": pruned, "text": text(tokens), "penalised_text": text(penalised)}


# ---- files ---------------------------------------------------------------------------------------

def save_checkpoint(model, folder: Path, shard: str) -> list[str]:
    """Saved as published, in bfloat16. Returns the names that its weights have in memory, sorted:
    transformers 5 saves those."""
    model.bfloat16().save_pretrained(folder, max_shard_size=shard)
    with tempfile.TemporaryDirectory() as in_memory:
        model.save_pretrained(in_memory, save_original_format=False)
        return sorted(model.state_dict())


def add_configs(file: Path, config_class, hubs: dict[str, dict], **more) -> dict:
    """What the file holds, and how this version of transformers saves published configs again."""
    found = json.loads(file.read_text()) if file.exists() else {}
    found |= more
    resaved = {}
    for name, hub in hubs.items():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(hub))
            config_class.from_pretrained(folder).save_pretrained(folder)
            resaved[name] = json.loads(config.read_text())
    found[transformers.__version__] = resaved
    return found


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
