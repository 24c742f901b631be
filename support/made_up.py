"""Checkpoints of 7B width with random bfloat16 weights, and an image and a question: to time models
whose weights are not at hand. Written under transformers' names, in shards."""
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from support.checkpoint import empty, module_of

QUESTION = ("What is written on the sign above the door, and which of the two people in front of "
            "it looks at the other one?")
NOISE = np.random.default_rng(0).integers(0, 256, (672, 672, 3), dtype=np.uint8)

# config.json of the published 7B and 8B models, in the form of transformers 5
CONFIGS = {
    "llava": {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
            "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
            "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 336,
            "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}},
    "qwen": {
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944,
            "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False,
            "vocab_size": 152064, "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 32, "hidden_act": "silu", "hidden_size": 1280,
            "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}},
    "qwen3": {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text", "attention_bias": False, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36,
            "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20],
                             "mrope_interleaved": True}},
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 27, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304, "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
            "deepstack_visual_indexes": [8, 16, 24]}}}
# what tiny shapes have instead
WIDTH = {"hidden_size": 64, "intermediate_size": 128}
TINY = {
    "llava": {
        "text_config": WIDTH | {"num_attention_heads": 4, "num_key_value_heads": 4},
        "vision_config": WIDTH | {"num_attention_heads": 4, "num_hidden_layers": 3,
                                  "image_size": 112}},
    "qwen": {
        "text_config": WIDTH | {"num_attention_heads": 4, "num_key_value_heads": 2,
                                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "vision_config": WIDTH | {"num_heads": 4, "out_hidden_size": 64, "depth": 2,
                                  "fullatt_block_indexes": [1]}},
    "qwen3": {
        "text_config": WIDTH | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                                "rope_scaling": {"rope_type": "default",
                                                 "mrope_section": [2, 3, 3],
                                                 "mrope_interleaved": True}},
        "vision_config": WIDTH | {"num_heads": 4, "out_hidden_size": 64, "depth": 2,
                                  "num_position_embeddings": 16,
                                  "deepstack_visual_indexes": [0]}}}
SPECIAL = ["<image>", "<|image_pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
           "<|vision_end|>"]
CUT_VOCABULARY = 32064


def image_for(model, side: int) -> Image.Image:
    """Noise that gives side x side visual tokens, where the model does not resize to its own."""
    vision = model.config.vision
    pixels = side * vision.patch_size * getattr(vision, "spatial_merge_size", 2)
    return Image.fromarray(NOISE).resize((pixels, pixels))


def depth_of(kind: str) -> int:
    return CONFIGS[kind]["text_config"]["num_hidden_layers"]


def write_checkpoint(folder: Path, kind: str, layers: int, small: bool = False) -> int:
    """A folder of a kind of CONFIGS, its decoder cut to so many layers -> bytes of its weights.

    small: tiny shapes, to see that a program runs, not how fast.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(kind, layers, small)
    write_config(folder, config)
    module = module_of(folder)
    tokenizer = word_tokenizer(module.PROMPT + QUESTION)
    tokenizer.save(str(folder / "tokenizer.json"))
    name = "image_token_index" if kind == "llava" else "image_token_id"
    special = "<image>" if kind == "llava" else "<|image_pad|>"
    write_config(folder, config | {name: tokenizer.token_to_id(special)})
    model_class = module.load.__annotations__["return"]
    model = empty(model_class, module.read_config(folder), None, set())
    return write_shards(folder, dict(model.named_parameters()))


def write_config(folder: Path, config: dict):
    (folder / "config.json").write_text(json.dumps(config))


def config_of(kind: str, layers: int, small: bool) -> dict:
    config = CONFIGS[kind]
    text = config["text_config"] | {"num_hidden_layers": layers}
    vision = config["vision_config"]
    if layers < depth_of(kind):
        text |= {"vocab_size": CUT_VOCABULARY}
    if small:
        text |= TINY[kind]["text_config"]
        vision = vision | TINY[kind]["vision_config"]
    return config | {"text_config": text, "vision_config": vision}


def word_tokenizer(text: str) -> Tokenizer:
    """A token a word, so that a prompt is about as long as with the published tokenizers."""
    words = ["<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_shards(folder: Path, parameters: dict) -> int:
    """Random weights, norms 1, in shards of about 2 GB, under the names that transformers gives
    parameters in memory."""
    pattern = (torch.randn(2 ** 20) * 0.02).bfloat16()
    weight_map = {}
    shard = {}
    size = 0
    in_shard = 0

    def save():
        name = f"model-{len(set(weight_map.values()))}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
    for name, parameter in parameters.items():
        renamed = re.sub(r"^model\.", "language_model.", name)
        if not renamed.startswith("lm_head"):
            renamed = f"model.{renamed}"
        n = parameter.numel()
        if "norm" in name and name.endswith("weight"):
            values = torch.ones(n, dtype=torch.bfloat16)
        else:
            values = pattern.repeat(-(-n // len(pattern)))[:n]
        shard[renamed] = values.view(parameter.shape)
        size += 2 * n
        in_shard += n
        if in_shard > 2 ** 30:
            save()
            in_shard = 0
    save()
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def decoder_of(model):
    """embed_tokens, layers and norm, whatever the model file calls them."""
    return model.language_model if hasattr(model, "language_model") else model.model


def deepen(model, depth: int):
    """Give the model `depth` layers on the weights of the few it has, in turn: the work of a deep
    model in less memory."""
    layers = list(decoder_of(model).layers)
    deep = [layers[i % len(layers)] for i in range(depth)]
    decoder_of(model).layers = torch.nn.ModuleList(deep)
    model.num_layers = depth
    model.config.text.num_hidden_layers = depth
