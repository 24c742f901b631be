"""Write a trained model as the published ones are: a folder with config.json, tokenizer.json and
model.safetensors in bfloat16, tensors under the hub's names."""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model_llava import Llava
from model_qwen import Qwen
from support.image import CLIP_MEAN, CLIP_STD

LLAVA_NAMES = {"language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
               "vision_tower.": "vision_tower.vision_model."}


def export_llava(model: Llava, folder: Path):
    """Write it as llava-hf/llava-1.5-7b-hf."""
    text = model.config.text
    vision = model.config.vision
    pad = model.tokenizer.token_to_id("<pad>")
    tensors = {}
    for name, p in model.state_dict().items():
        for ours, published in LLAVA_NAMES.items():
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
                break
        tensors[name] = p
    for part, value in (("weight", 1.0), ("bias", 0.0)):    # of no use, but other loaders want it
        name = f"vision_tower.vision_model.post_layernorm.{part}"
        tensors[name] = torch.full((vision.hidden_size,), value)
    text_config = {
        "model_type": "llama", "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size, "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads, "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": 512}
    vision_config = {
        "model_type": "clip_vision_model", "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads, "image_size": vision.image_size,
        "patch_size": vision.patch_size}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": model.config.image_token, "pad_token_id": pad,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "text_config": text_config, "vision_config": vision_config}
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}
    side = vision.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
        "resample": 3, "crop_size": {"height": side, "width": side}, "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD, "rescale_factor": 1 / 255, "do_resize": True,
        "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    write(folder, tensors, model.tokenizer, config, generation, preprocessor)


def export_qwen(model: Qwen, folder: Path):
    """Write it as Qwen/Qwen2.5-VL-3B-Instruct: text fields at the root, and no head of its own."""
    text = asdict(model.config.text)
    vision = asdict(model.config.vision)
    section = text.pop("mrope_section")
    ids = {name: model.tokenizer.token_to_id(f"<|{name}|>") for name in (
        "endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    tensors = model.state_dict()
    del tensors["lm_head.weight"]
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16", "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"], "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"], "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"], "tie_word_embeddings": True,
        "max_position_embeddings": 512, **text, "hidden_act": "silu", "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "vision_config": {**vision, "hidden_act": "silu", "in_chans": 3, "tokens_per_second": 2}}
    generation = {"eos_token_id": [ids["im_end"], ids["endoftext"]],
                  "pad_token_id": ids["endoftext"]}
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": model.config.min_pixels,
        "max_pixels": model.config.max_pixels, "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"], "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD, "resample": 3}
    write(folder, tensors, model.tokenizer, config, generation, preprocessor)


def write(folder: Path, tensors: dict, tokenizer: Tokenizer, config: dict, generation: dict,
          preprocessor: dict):
    folder.mkdir(exist_ok=True)
    tensors = {name: p.detach().cpu().bfloat16().contiguous() for name, p in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config", config), ("generation_config", generation),
                          ("preprocessor_config", preprocessor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
