"""Records tests/golden/ from transformers 5.23.0: small random checkpoints of LLaVA-1.5 and
Qwen2.5-VL, and what the original computes on them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/make_golden.py
    python tests/make_golden.py configs        also with transformers 4.57.6

No test and no user needs transformers. A float64 run starts from the same numbers, since weights
are rounded to bfloat16.
"""
import json
import re
import shutil
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from published import HUB_3B, HUB_7B
from recording import (GOLDEN, add_configs, digest, llama_tokenizer, qwen_tokenizer, received,
                       record_answers, recorded_attention, save_checkpoint)
from safetensors.torch import save_file
from samples import QUESTIONS, images
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. "
          "USER: <image>\n{} ASSISTANT:")
CHATML = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
          "<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n")
NEW_TOKENS = 12
PIXELS = (56 * 56, 16384 * 28 * 28)                     # the published bounds
BOUNDS = [PIXELS, (28 * 28, 4 * 28 * 28), (30 * 28 * 28, 40 * 28 * 28)]


def randomise(model):
    """Wide weights, norms and biases away from 1 and 0: transformers' own initialisation hides
    mistakes. The tower's residual stream is small, or a wrong epsilon of its norms would not show.
    """
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1:
            p.data = 0.2 * noise
        elif "embed" in name:
            p.data = 0.7 * noise
        else:
            p.data = 1.6 * noise / p[0].numel() ** 0.5
        if re.search(r"visual\.(patch_embed|blocks.*(attn\.proj|down_proj))", name):
            p.data *= 0.05
        p.data = p.data.bfloat16().float()


# ---- what each model takes -----------------------------------------------------------------------

def clip_processor(side: int):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    return CLIPImageProcessorPil(size={"shortest_edge": side},
                                 crop_size={"height": side, "width": side})


def llava_processor(side: int):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    return LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side},
                                  crop_size={"height": side, "width": side})


def qwen_processor(bounds: tuple[int, int]):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    low, high = bounds
    return Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)


def llava_inputs(model, tokenizer, image, question: str) -> dict:
    vision = model.config.vision_config
    V = (vision.image_size // vision.patch_size) ** 2
    text = VICUNA.format(question).replace("<image>", "<image>" * V)
    pixels = clip_processor(vision.image_size)(image).pixel_values[0]
    return {"input_ids": torch.tensor([tokenizer(text).input_ids]),
            "pixel_values": torch.tensor(pixels)[None].double()}


def qwen_inputs(model, tokenizer, image, question: str) -> dict:
    seen = qwen_processor(PIXELS)(image)
    grid = torch.tensor(seen.image_grid_thw)
    V = grid.prod().item() // 4
    text = CHATML.format(question).replace("<|image_pad|>", "<|image_pad|>" * V)
    ids = torch.tensor([tokenizer(text).input_ids])
    return {"input_ids": ids, "pixel_values": torch.tensor(seen.pixel_values).double(),
            "image_grid_thw": grid, "mm_token_type_ids": (ids == model.config.image_token_id).int()}


def qwen_extras(model, inputs: dict) -> dict:
    """Positions, tower output, and the attention each visual token receives in the last block,
    which is one of full attention; in raster order."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.vision_utils import get_vision_window_index
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    pos, delta = model.model.get_rope_index(**text)
    tower = model.model.visual
    grid = inputs["image_grid_thw"]
    with recorded_attention(modeling_qwen2_5_vl, tower) as attention:
        tower(inputs["pixel_values"], grid_thw=grid)
    order, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size,
                                       tower.patch_size)
    raster = torch.as_tensor(order).argsort()
    features = model.model.get_image_features(inputs["pixel_values"], grid).pooler_output
    return {"pos": pos[:, 0], "next_pos": delta.view(1) + inputs["input_ids"].shape[1],
            "features": torch.cat(list(features)), "saliency": received(attention[-1])[raster]}


# ---- recording -----------------------------------------------------------------------------------

def record(name: str, config, model_class, make_tokenizer, make_inputs, pictures, extras=None):
    """The checkpoint, NAME.safetensors with what it computes, NAME.json with the cases."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    randomise(model)
    model.tie_weights()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    keys = save_checkpoint(model, folder, "100KB")
    tokenizer = make_tokenizer(folder / "tokenizer.json")
    model = model_class.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    model.eval()
    tensors = {}
    cases = []
    for picture in pictures:
        for number, question in enumerate(QUESTIONS):
            inputs = make_inputs(model, tokenizer, images()[picture], question)
            with torch.no_grad():
                found, case = record_case(model, tokenizer, inputs, number == 0, extras)
            key = f"{picture}.{number}"
            tensors |= {f"{key}.{what}": value.contiguous() for what, value in found.items()}
            case["pruned"] = {f"{key}.{what}": how for what, how in case["pruned"].items()}
            cases.append({"name": key, "image": picture, "question": question} | case)
    save_file(tensors, GOLDEN / f"{name}.safetensors")
    found = {"transformers": transformers.__version__, "in_memory_keys": keys, "cases": cases}
    (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def record_case(model, tokenizer, inputs: dict, prune: bool, extras) -> tuple[dict, dict]:
    """The tensors of a picture and a question, and what the JSON file says of them."""
    out = model(**inputs, output_hidden_states=True)
    tensors = extras(model, inputs) if extras else {}
    tensors["ids"] = inputs["input_ids"][0]
    tensors["hidden"] = torch.cat(out.hidden_states)    # (L+1, T, C), the last after the final norm
    found, case = record_answers(model, tokenizer, inputs, NEW_TOKENS, prune)
    return tensors | found, case


def record_pixels():
    """SHA-256 of the float32 pixels of each sample image, as the PIL processors give them."""
    crop = clip_processor(56)
    pad = llava_processor(56)
    found = {}
    for name, image in images().items():
        opaque = Image.fromarray(np.asarray(image.convert("RGB")))      # as LLaVA's evaluation does
        found[name] = {"crop": digest(crop(image).pixel_values[0]),
                       "pad": digest(pad(opaque).pixel_values[0])}
        for low, high in BOUNDS:
            seen = qwen_processor((low, high))(image)
            grid = seen.image_grid_thw[0].tolist()
            found[name][f"qwen {low} {high}"] = [grid, digest(seen.pixel_values)]
    (GOLDEN / "pixels.json").write_text(json.dumps(found, indent=1) + "\n")


def record_configs():
    """How transformers saves the published Qwen2.5-VL configs again."""
    file = GOLDEN / "qwen_configs.json"
    found = add_configs(file, Qwen2_5_VLConfig, {"3B": HUB_3B, "7B": HUB_7B})
    file.write_text(json.dumps(found, indent=1) + "\n")


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
                            image_token_id=306, video_token_id=307, vision_start_token_id=303,
                            vision_end_token_id=304)


def record_models():
    from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration
    for name, tied in (("llava_grouped", False), ("llava_tied", True)):
        record(name, llava_config(tied), LlavaForConditionalGeneration, llama_tokenizer,
               llava_inputs, ("square", "wide", "tall"))
    for name, tied in (("qwen_untied", False), ("qwen_tied", True)):
        record(name, qwen_config(tied), Qwen2_5_VLForConditionalGeneration, qwen_tokenizer,
               qwen_inputs, ("square", "wide", "sign", "partial", "whole"), qwen_extras)


if __name__ == "__main__":
    record_configs()
    if sys.argv[1:] != ["configs"]:
        record_models()
        record_pixels()
