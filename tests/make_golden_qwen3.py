"""Records tests/golden/qwen3* from transformers 5.23.0: two small random checkpoints of Qwen3-VL,
what the original computes on them, pixels, and the published configs as transformers saves them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/make_golden_qwen3.py
    python tests/make_golden_qwen3.py configs        also with transformers 4.57.6

No test and no user needs transformers. `hidden` is the input of each layer, planes already added:
transformers' own hidden_states are what a layer returns, before its plane.
"""
import json
import re
import shutil
import sys

import torch
import transformers
from recording import (GOLDEN, add_configs, digest, qwen_tokenizer, received, record_answers,
                       recorded_attention, save_checkpoint)
from safetensors.torch import save_file
from samples import images
from transformers import Qwen3VLConfig

CHATML = ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
          "<|im_start|>assistant\n")
TOKEN = 32 * 32                                             # pixels of a visual token
PUBLISHED = (65536, 16777216)                               # fewest and most pixels of an image
SMALL = (4 * TOKEN, 24 * TOKEN)                             # those of the recorded cases
BOUNDS = [PUBLISHED, SMALL, (9 * TOKEN, 12 * TOKEN)]
NEW_TOKENS = 5

# what config.json of the published folders says, as far as it decides anything
ROPE = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
HUB_8B = {
    "model_type": "qwen3_vl", "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_vl_text", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rope_scaling": ROPE, "vocab_size": 151936},
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 27, "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304, "num_heads": 16,
        "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
        "deepstack_visual_indexes": [8, 16, 24]}}
HUB_4B = HUB_8B | {
    "tie_word_embeddings": True,
    "text_config": HUB_8B["text_config"] | {
        "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "vision_config": HUB_8B["vision_config"] | {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17]}}


def processor(bounds):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    low, high = bounds
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=16, temporal_patch_size=2,
        merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def randomise(model):
    """Wide weights, norms and biases away from 1 and 0, rounded to bfloat16. The tower's residual
    stream is small, or a wrong epsilon of its norms would not show; so are the decoder's queries
    and keys, whose norm has one as well. What is added to the decoder's stream is of the size of
    the embeddings, so that float32 roundings of the original stay below 1e-5."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1:
            p.data = 0.2 * noise
        elif "embed_tokens" in name or "pos_embed" in name:
            p.data = 0.7 * noise
        else:
            p.data = 1.6 * noise / p[0].numel() ** 0.5
        if re.search(r"visual\.(patch_embed|pos_embed|blocks.*(attn\.proj|linear_fc2))", name):
            p.data *= 0.05
        if re.search(r"merger.*linear_fc2|o_proj|down_proj", name):
            p.data *= 0.3
        if re.search(r"[qk]_proj", name):
            p.data *= 0.03
        p.data = p.data.bfloat16().float()


def make_inputs(model, tokenizer, image, question: str) -> dict:
    seen = processor(SMALL)(image)
    grid = torch.tensor(seen.image_grid_thw)
    V = grid.prod().item() // 4
    text = CHATML.format(question).replace("<|image_pad|>", "<|image_pad|>" * V)
    ids = torch.tensor([tokenizer(text).input_ids])
    return {"input_ids": ids, "pixel_values": torch.tensor(seen.pixel_values).double(),
            "image_grid_thw": grid, "mm_token_type_ids": (ids == model.config.image_token_id).int()}


def inputs_of_layers(model, inputs: dict) -> torch.Tensor:
    """(L + 1, T, C): what each decoder layer is given, and the final norm's output."""
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs.get("hidden_states", args[0] if args else None)[0])
    decoder = model.model.language_model
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in decoder.layers]
    hooks.append(decoder.norm.register_forward_hook(lambda m, args, out: seen.append(out[0])))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def tower_outputs(model, inputs: dict) -> dict:
    """Features, planes, and the attention each visual token receives in the last block."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl
    tower = model.model.visual
    with recorded_attention(modeling_qwen3_vl, tower) as attention:
        out = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return {"features": out.pooler_output, "planes": torch.stack(out.deepstack_features),
            "saliency": received(attention[-1])}


def record_case(model, tokenizer, inputs: dict, prune: bool) -> tuple[dict, dict]:
    """The tensors of a picture and a question, and what the JSON file says of them."""
    text_inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    pos, delta = model.model.get_rope_index(**text_inputs)
    tensors = tower_outputs(model, inputs)
    tensors["hidden"] = inputs_of_layers(model, inputs)
    tensors["ids"] = inputs["input_ids"][0]
    tensors["pos"] = pos[:, 0]
    tensors["next_pos"] = delta.view(1) + inputs["input_ids"].shape[1]
    found, case = record_answers(model, tokenizer, inputs, NEW_TOKENS, prune)
    return tensors | found, case


def small(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor if tensor.dtype == torch.long else tensor.float()
    return tensor.contiguous()


def record(name: str, config, pictures, pruned):
    """The checkpoint, NAME.safetensors with what it computes, NAME.json with the cases."""
    from transformers import Qwen3VLForConditionalGeneration
    model = Qwen3VLForConditionalGeneration(config).eval()
    randomise(model)
    model.tie_weights()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    keys = save_checkpoint(model, folder, "60KB")
    processor(SMALL).save_pretrained(folder)
    tokenizer = qwen_tokenizer(folder / "tokenizer.json")
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    tensors = {}
    cases = []
    for number, picture in enumerate(pictures):
        question = ("A cat?", "What is it?")[number % 2]
        inputs = make_inputs(model, tokenizer, images()[picture], question)
        with torch.no_grad():
            found, case = record_case(model, tokenizer, inputs, picture in pruned)
        key = f"{picture}.{number}"
        tensors |= {f"{key}.{what}": small(value) for what, value in found.items()}
        case["pruned"] = {f"{key}.{what}": how for what, how in case["pruned"].items()}
        cases.append({"name": key, "image": picture, "question": question} | case)
    save_file(tensors, GOLDEN / f"{name}.safetensors")
    found = {"transformers": transformers.__version__, "in_memory_keys": keys, "cases": cases}
    (GOLDEN / f"{name}.json").write_text(json.dumps(found) + "\n")


def record_pixels():
    """Patch grid, and SHA-256 of the float32 pixels, of each sample image within each bounds."""
    found = {}
    for name, image in images().items():
        found[name] = {}
        for bounds in BOUNDS:
            seen = processor(bounds)(image)
            grid = seen.image_grid_thw[0].tolist()
            found[name]["{} {}".format(*bounds)] = [grid, digest(seen.pixel_values)]
    (GOLDEN / "qwen3_pixels.json").write_text(json.dumps(found, indent=1) + "\n")


def record_configs():
    """The published configs, and how transformers saves them again."""
    file = GOLDEN / "qwen3_configs.json"
    hubs = {"4B": HUB_4B, "8B": HUB_8B}
    found = add_configs(file, Qwen3VLConfig, hubs, published=hubs)
    file.write_text(json.dumps(found) + "\n")


def small_config(tied):
    """Head widths that are not hidden_size / heads, five layers for three planes, and a position
    grid of 6x6 that images are smaller and larger than."""
    vision = dict(depth=5, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=32,
                  patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                  num_position_embeddings=36, deepstack_visual_indexes=[0, 2, 3])
    text = dict(vocab_size=320, hidden_size=32, intermediate_size=40, num_hidden_layers=5,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
                bos_token_id=300, eos_token_id=302, rope_parameters={
                    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True})
    if tied:
        vision |= dict(depth=4, num_heads=1, out_hidden_size=24, deepstack_visual_indexes=[1, 2, 3])
        text |= dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=12)
        text["rope_parameters"] |= {"rope_theta": 1e4, "mrope_section": [3, 2, 1]}
    return Qwen3VLConfig(text_config=text | dict(tie_word_embeddings=tied), vision_config=vision,
                         tie_word_embeddings=tied, image_token_id=306, video_token_id=307,
                         vision_start_token_id=303, vision_end_token_id=304)


if __name__ == "__main__":
    record_configs()
    if sys.argv[1:] != ["configs"]:
        record("qwen3_untied", small_config(False), ("square", "wide", "sign", "whole", "tiny"),
               pruned=("whole",))
        record("qwen3_tied", small_config(True), ("tiny", "partial", "wide"), pruned=("wide",))
        record_pixels()
    for file in GOLDEN.rglob("*.safetensors"):
        file.chmod(0o644)                                   # safetensors writes for the owner alone
