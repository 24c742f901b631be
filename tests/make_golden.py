"""Record tests/golden/ from transformers 5.23.0: small random checkpoints of LLaVA-1.5, Qwen2.5-VL
and Qwen3-VL, and what the original computes on them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/make_golden.py
    python tests/make_golden.py configs         the published configs; also with transformers 4.57.6

No test and no user needs transformers. A float64 run starts from the same numbers, since weights
are rounded to bfloat16. On another CPU floats differ in their last bits.
"""
import contextlib
import hashlib
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from unittest.mock import patch

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from samples import QUESTIONS, images
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors)
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, PreTrainedTokenizerFast,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

GOLDEN = Path(__file__).parent / "golden"

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. "
          "USER: <image>\n{} ASSISTANT:")
QWEN3_CHAT = ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
              "<|im_start|>assistant\n")
QWEN_CHAT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN3_CHAT

# fewest and most pixels of an image: the published bounds first
QWEN_BOUNDS = [(56 * 56, 16384 * 28 * 28), (28 * 28, 4 * 28 * 28), (30 * 28 * 28, 40 * 28 * 28)]
QWEN3_BOUNDS = [(65536, 16777216), (4 * 32 * 32, 24 * 32 * 32), (9 * 32 * 32, 12 * 32 * 32)]


@dataclass
class Original:
    """A model of transformers, and how it is recorded."""
    model_class: type
    tokenizer: Callable             # path -> the tokenizer, saved there
    inputs: Callable                # (model, tokenizer, image, question) -> what its forward takes
    embeddings: str                 # regular expression of the weights that count as such
    scales: list[tuple[str, float]]             # factors of weights, by regular expression
    shard: str = "100KB"            # the largest of a checkpoint
    new_tokens: int = 12            # of an answer
    compact: bool = False           # recorded in float32, and JSON in one line


def randomize(model, original: Original):
    """Draw wide weights, norms and biases away from 1 and 0: transformers' own initialization hides
    mistakes. A wrong epsilon of a norm shows only where what it divides is small: see `scales`."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if re.search("norm|ln_q", name) and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1:
            p.data = 0.2 * noise
        elif re.search(original.embeddings, name):
            p.data = 0.7 * noise
        else:
            p.data = 1.6 * noise / p[0].numel() ** 0.5
        for pattern, factor in original.scales:
            if re.search(pattern, name):
                p.data *= factor
        p.data = p.data.bfloat16().float()


# ---- tokenizers ----------------------------------------------------------------------------------

def llama_tokenizer(path: Path):
    """LLaMA's normalizer, BOS and decoder over single characters; <image> is 300, <pad> 301."""
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
    """Qwen's normalizer and byte level over single bytes; its special tokens are 300 to 307,
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


# ---- what each model takes -----------------------------------------------------------------------
# transformers 4.57.6 has no processors of this kind, so that they are imported where they are used.

def clip_processors(side: int):
    """Return CLIP's processor, which crops, and LLaVA's, which pads."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    sizes = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPImageProcessorPil(**sizes), LlavaImageProcessorPil(do_pad=True, **sizes)


def qwen_processor(bounds: tuple[int, int], **settings):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    low, high = bounds
    return Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}, **settings)


def qwen3_processor(bounds: tuple[int, int]):
    return qwen_processor(bounds, patch_size=16, temporal_patch_size=2, merge_size=2,
                          image_mean=[0.5] * 3, image_std=[0.5] * 3)


def llava_inputs(model, tokenizer, image, question: str) -> dict:
    vision = model.config.vision_config
    V = (vision.image_size // vision.patch_size) ** 2
    text = VICUNA.format(question).replace("<image>", "<image>" * V)
    crop, _ = clip_processors(vision.image_size)
    return {"input_ids": torch.tensor([tokenizer(text).input_ids]),
            "pixel_values": torch.tensor(crop(image).pixel_values[0])[None].double()}


def qwen_inputs(model, tokenizer, image, question: str) -> dict:
    """Return what a Qwen takes; Qwen3's image within bounds that leave few visual tokens."""
    if isinstance(model, Qwen3VLForConditionalGeneration):
        processed = qwen3_processor(QWEN3_BOUNDS[1])(image)
        text = QWEN3_CHAT.format(question)
    else:
        processed = qwen_processor(QWEN_BOUNDS[0])(image)
        text = QWEN_CHAT.format(question)
    grid = torch.tensor(processed.image_grid_thw)
    V = grid.prod().item() // 4
    ids = torch.tensor([tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * V)).input_ids])
    return {"input_ids": ids, "pixel_values": torch.tensor(processed.pixel_values).double(),
            "image_grid_thw": grid, "mm_token_type_ids": (ids == model.config.image_token_id).int()}


# ---- what the original computes ------------------------------------------------------------------

def qwen_tower(model, inputs: dict) -> dict:
    """Return positions, the tower's features, and the attention each visual token receives in the
    last block, which is one of full attention; in raster order. Qwen3 has planes, too."""
    tower = model.model.visual
    grid = inputs["image_grid_thw"]
    attention, out = attention_of_last_block(tower, inputs)
    received = attention[0].mean((0, 1))                    # by each patch, over heads and rows
    saliency = received.view(-1, 4).mean(1)
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        from transformers.vision_utils import get_vision_window_index
        order, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size,
                                           tower.patch_size)
        saliency = saliency[torch.as_tensor(order).argsort()]
        out = tower(inputs["pixel_values"], grid_thw=grid)  # sdpa: the eager softmax is in float32
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    pos, delta = model.model.get_rope_index(**text)
    found = {"pos": pos[:, 0], "next_pos": delta.view(1) + inputs["input_ids"].shape[1],
             "features": out.pooler_output, "saliency": saliency}
    if "deepstack_features" in out:
        found["planes"] = torch.stack(out.deepstack_features)
    return found


def attention_of_last_block(tower, inputs: dict):
    """Return the eager attention of the tower's last block, and what the tower gives with it."""
    seen = []
    modeling = sys.modules[type(tower).__module__]
    original = modeling.eager_attention_forward

    def recorded(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]
    implementation = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    with patch.object(modeling, "eager_attention_forward", recorded):
        out = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    tower.config._attn_implementation = implementation
    return seen[-1][1], out


def inputs_of_layers(model, inputs: dict) -> torch.Tensor:
    """Return (L + 1, T, C): what each decoder layer is given, Qwen3's planes already added, and the
    final norm's output. transformers' own hidden_states are what a layer returns, before its plane.
    """
    seen = []
    decoder = model.model.language_model
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
             for layer in decoder.layers]
    hooks.append(decoder.norm.register_forward_hook(lambda m, args, out: seen.append(out[0])))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def greedy(model, inputs: dict, new_tokens: int, penalty: float = 1.0):
    """Return the logits of each step, (new_tokens, vocab), and the tokens; nothing stops early."""
    mask = torch.ones_like(inputs["input_ids"])
    out = model.generate(**inputs, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                         repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
                         return_dict_in_generate=True, output_logits=True)
    return torch.cat(out.logits), out.sequences[0, inputs["input_ids"].shape[1]:]


@contextlib.contextmanager
def masked(model, layer: int, gone: list[int]):
    """Hide the rows in `gone`, as keys, from every decoder layer >= `layer`."""
    def hook(module, args, kwargs):
        rows = args[0].shape[1]
        columns = kwargs["past_key_values"].get_seq_length(module.self_attn.layer_idx) + rows
        causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        mask = torch.zeros(1, 1, rows, columns, dtype=args[0].dtype)
        mask[..., ~causal] = -torch.inf
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
    """Answer at every layer with a third of the visual tokens and with none. Return tensors by key,
    and {key: [layer, kept tokens]}."""
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    V = len(visual)
    tensors = {}
    pruned = {}
    for layer in range(model.config.text_config.num_hidden_layers):
        order = torch.randperm(V, generator=torch.Generator().manual_seed(layer))
        for keep in (sorted(order[:V // 3].tolist()), []):
            key = f"layer{layer}.keep{len(keep)}"
            gone = [row for i, row in enumerate(visual) if i not in keep]
            with masked(model, layer, gone):
                logits, tokens = greedy(model, inputs, new_tokens)
            tensors[f"{key}.logits"] = logits
            tensors[f"{key}.tokens"] = tokens
            pruned[key] = [layer, keep]
    return tensors, pruned


# ---- recording -----------------------------------------------------------------------------------

def record(name: str, config, original: Original, cases: list[tuple]):
    """Write the checkpoint, NAME.safetensors with what it computes, NAME.json with the cases.

    cases: (picture, number, question, whether it is also pruned).
    """
    model = original.model_class(config).eval()
    randomize(model, original)
    model.tie_weights()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder, max_shard_size=original.shard)     # as published
    names = sorted(model.state_dict())                      # under which transformers 5 may save
    tokenizer = original.tokenizer(folder / "tokenizer.json")
    if original is QWEN3:                                   # whose bounds are not the published
        qwen3_processor(QWEN3_BOUNDS[1]).save_pretrained(folder)
    model = original.model_class.from_pretrained(folder, dtype=torch.float64,
                                                 attn_implementation="sdpa").eval()
    tensors = {}
    written = []
    for picture, number, question, prune in cases:
        inputs = original.inputs(model, tokenizer, images()[picture], question)
        found, case = record_case(model, tokenizer, inputs, prune, original)
        key = f"{picture}.{number}"
        for what, value in found.items():
            single = original.compact and value.is_floating_point()
            tensors[f"{key}.{what}"] = (value.float() if single else value).contiguous()
        case["pruned"] = {f"{key}.{what}": how for what, how in case["pruned"].items()}
        written.append({"name": key, "image": picture, "question": question} | case)
    save_file(tensors, GOLDEN / f"{name}.safetensors")
    write(f"{name}.json", {"transformers": transformers.__version__, "in_memory_keys": names,
                           "cases": written}, original.compact)


@torch.no_grad()
def record_case(model, tokenizer, inputs: dict, prune: bool, original: Original):
    """Return the tensors of a picture and a question, and what the JSON file says of them."""
    tensors, pruned = pruned_answers(model, inputs, original.new_tokens) if prune else ({}, {})
    if original is not LLAVA:
        tensors |= qwen_tower(model, inputs)
    tensors["ids"] = inputs["input_ids"][0]
    tensors["hidden"] = inputs_of_layers(model, inputs)
    tensors["logits"], tensors["tokens"] = greedy(model, inputs, original.new_tokens)
    _, penalized = greedy(model, inputs, original.new_tokens, 1.5)
    text, penalized_text = (tokenizer.decode(ids, skip_special_tokens=True).strip()
                            for ids in (tensors["tokens"], penalized))
    return tensors, {"pruned": pruned, "text": text, "penalised_text": penalized_text}


def write(name: str, found: dict, compact: bool = False):
    (GOLDEN / name).write_text(json.dumps(found, indent=None if compact else 1) + "\n")


def record_pixels():
    """Record SHA-256 of the float32 pixels of each sample image, as the PIL processors give them,
    and Qwen's grid of patches."""
    crop, pad = clip_processors(56)

    def of_qwen(processor, image):
        processed = processor(image)
        return [processed.image_grid_thw[0].tolist(), digest(processed.pixel_values)]
    found = {}
    found3 = {}
    for name, image in images().items():
        opaque = Image.fromarray(np.asarray(image.convert("RGB")))      # as LLaVA's evaluation does
        found[name] = {"crop": digest(crop(image).pixel_values[0]),
                       "pad": digest(pad(opaque).pixel_values[0])}
        for low, high in QWEN_BOUNDS:
            found[name][f"qwen {low} {high}"] = of_qwen(qwen_processor((low, high)), image)
        found3[name] = {f"{low} {high}": of_qwen(qwen3_processor((low, high)), image)
                        for low, high in QWEN3_BOUNDS}
    write("pixels.json", found)
    write("qwen3_pixels.json", found3)


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def record_configs():
    """Record how this version of transformers saves published configs again, beside what other
    versions did and what was published, without what decides nothing."""
    for file, config_class in (("qwen_configs.json", Qwen2_5_VLConfig),
                               ("qwen3_configs.json", Qwen3VLConfig)):
        found = json.loads((GOLDEN / file).read_text())
        found[transformers.__version__] = {name: saved_again(config_class, config)
                                           for name, config in found["published"].items()}
        write(file, found, compact=True)


def saved_again(config_class, published: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(published))
        config_class.from_pretrained(folder).save_pretrained(folder)
        return json.loads(file.read_text())


# ---- the small checkpoints -----------------------------------------------------------------------

def llava_config(tied: bool):
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=72, num_hidden_layers=4,
                              num_attention_heads=4, image_size=56, patch_size=14)
    text = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
                       num_attention_heads=4, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
                       num_key_value_heads=4 if tied else 2)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=300,
                       pad_token_id=301, tie_word_embeddings=tied)


def qwen_config(tied: bool):
    vision = dict(depth=4, hidden_size=32, intermediate_size=44, num_heads=2, out_hidden_size=48,
                  patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                  fullatt_block_indexes=[1, 3], tokens_per_second=2)
    text = dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
                bos_token_id=300, eos_token_id=302, tie_word_embeddings=tied,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    if tied:
        text |= dict(num_attention_heads=3, num_key_value_heads=1, rope_theta=1e4,
                     rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied,
                            **QWEN_IDS)


def qwen3_config(tied: bool):
    """Head widths that are not hidden_size / heads, five layers for three planes, and a position
    grid of 6x6 that images are smaller and larger than."""
    vision = dict(depth=5, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=32,
                  patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                  num_position_embeddings=36, deepstack_visual_indexes=[0, 2, 3])
    text = dict(vocab_size=320, hidden_size=32, intermediate_size=40, num_hidden_layers=5,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
                bos_token_id=300, eos_token_id=302, tie_word_embeddings=tied,
                rope_parameters={"rope_type": "default", "rope_theta": 5e6,
                                 "mrope_section": [4, 2, 2], "mrope_interleaved": True})
    if tied:
        vision |= dict(depth=4, num_heads=1, out_hidden_size=24, deepstack_visual_indexes=[1, 2, 3])
        text |= dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=12)
        text["rope_parameters"] |= {"rope_theta": 1e4, "mrope_section": [3, 2, 1]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied,
                         **QWEN_IDS)


QWEN_IDS = dict(image_token_id=306, video_token_id=307, vision_start_token_id=303,
                vision_end_token_id=304)
SMALL_TOWER = (r"visual\.(patch_embed|pos_embed|blocks.*(attn\.proj|down_proj|linear_fc2))", 0.05)
# what is added to the decoder's stream is of the size of the embeddings, so that float32 roundings
# of the original stay below 1e-5; queries and keys are small because a norm follows
SMALL_DECODER = [(r"merger.*linear_fc2|o_proj|down_proj", 0.3), (r"[qk]_proj", 0.03)]
LLAVA = Original(LlavaForConditionalGeneration, llama_tokenizer, llava_inputs, "embed", [])
QWEN = Original(Qwen2_5_VLForConditionalGeneration, qwen_tokenizer, qwen_inputs, "embed",
                [SMALL_TOWER])
QWEN3 = Original(Qwen3VLForConditionalGeneration, qwen_tokenizer, qwen_inputs,
                 "embed_tokens|pos_embed", [SMALL_TOWER, *SMALL_DECODER], "60KB", 5, compact=True)


def record_models():
    def asked_both(*pictures):
        return [(picture, number, question, number == 0) for picture in pictures
                for number, question in enumerate(QUESTIONS)]

    def asked_once(*pictures, pruned):
        return [(picture, number, ("A cat?", "What is it?")[number % 2], picture == pruned)
                for number, picture in enumerate(pictures)]
    shapes = asked_both("square", "wide", "tall")
    record("llava_grouped", llava_config(tied=False), LLAVA, shapes)
    record("llava_tied", llava_config(tied=True), LLAVA, shapes)
    grids = asked_both("square", "wide", "sign", "partial", "whole")
    record("qwen_untied", qwen_config(tied=False), QWEN, grids)
    record("qwen_tied", qwen_config(tied=True), QWEN, grids)
    record("qwen3_untied", qwen3_config(tied=False), QWEN3,
           asked_once("square", "wide", "sign", "whole", "tiny", pruned="whole"))
    record("qwen3_tied", qwen3_config(tied=True), QWEN3,
           asked_once("tiny", "partial", "wide", pruned="wide"))
    for file in GOLDEN.rglob("*.safetensors"):
        file.chmod(0o644)                                   # safetensors writes for the owner alone


if __name__ == "__main__":
    only_configs = sys.argv[1:] == ["configs"]
    if not only_configs and transformers.__version__ != "5.23.0":
        sys.exit(f"transformers is {transformers.__version__}, want 5.23.0")
    record_configs()
    if not only_configs:
        record_models()
        record_pixels()
