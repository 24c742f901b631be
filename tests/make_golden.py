"""Records tests/golden/ from transformers 5.23.0: small random checkpoints and what the original computes on them.

    pip install transformers==5.23.0 && python tests/make_golden.py

No test and no user needs transformers. Weights are drawn wide, with biases and norms away from 0 and 1, because its own
initialisation hides mistakes; they are rounded to bfloat16, so a float64 run starts from the same numbers.
"""
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from samples import QUESTIONS, images, kept
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.vision_utils import get_vision_window_index
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

GOLDEN = Path(__file__).parent / "golden"
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:")
CHATML = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
          "<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n")
NEW_TOKENS = 12


def llama_tokenizer(path):
    """LLaMA's normaliser, BOS and decoder over single characters; <image> is 300, <pad> 301."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "▁", "\n"] + [chr(c) for c in range(33, 127)])}
    vocab |= {f"▁{chr(c)}": len(vocab) + i for i, c in enumerate(range(33, 127))}
    vocab |= {f"<{i}>": i for i in range(len(vocab), 300)}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", chr(c)) for c in range(33, 127)], unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ("<unk>", "<s>", "</s>", "<image>", "<pad>")])
    assert t.token_to_id("<image>") == 300 and t.token_to_id("<pad>") == 301
    t.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def qwen_tokenizer(path):
    """Qwen's normaliser and byte level over single bytes; its special tokens are 300 to 307, <|image_pad|> 306."""
    vocab = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{i}>": i for i in range(len(vocab), 300)}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated"),
                                               pre_tokenizers.ByteLevel(False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([f"<|{s}|>" for s in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad",
                                               "image_pad", "video_pad")])
    assert t.token_to_id("<|image_pad|>") == 306
    t.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def randomise(model):
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1:
            p.data = 0.2 * noise
        else:
            p.data = 0.7 * noise if "embed" in name else 1.6 * noise / p[0].numel() ** 0.5
        if re.search(r"visual\.(patch_embed|blocks.*(attn\.proj|down_proj))", name):
            p.data *= 0.05                              # a small residual stream, or a wrong epsilon of its norms would not show
        p.data = p.data.bfloat16().float()


def masked(model, layer, start, V, keep):
    """Hooks that make the visual tokens outside `keep` invisible as keys in every decoder layer >= `layer`."""
    gone = [start + i for i in range(V) if i not in keep]

    def hook(module, args, kwargs):
        x, past = kwargs.get("hidden_states", args[0] if args else None), kwargs["past_key_values"]
        q = x.shape[1]
        k = past.get_seq_length(module.self_attn.layer_idx) + q
        mask = torch.zeros(1, 1, q, k, dtype=x.dtype).masked_fill(~torch.ones(q, k, dtype=torch.bool).tril(k - q), -torch.inf)
        mask[..., gone] = -torch.inf
        mask[..., range(q), range(k - q, k)] = 0               # a removed row still sees itself: no empty softmax
        return args, kwargs | {"attention_mask": mask}
    return [m.register_forward_pre_hook(hook, with_kwargs=True) for m in model.model.language_model.layers[layer:]]


def greedy(model, inputs, penalty=1.0):
    """-> logits of each step, (NEW_TOKENS, vocab), and the tokens; nothing stops early."""
    out = model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=NEW_TOKENS, do_sample=False,
                         repetition_penalty=penalty, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    return torch.cat(out.logits), out.sequences[0, inputs["input_ids"].shape[1]:]


def llava_inputs(model, tok, image, question):
    """-> what the model takes, and V."""
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    crop = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    V = (side // patch) ** 2
    ids = torch.tensor([tok(VICUNA.format(question).replace("<image>", "<image>" * V)).input_ids])
    return {"input_ids": ids, "pixel_values": torch.tensor(crop(image).pixel_values[0])[None].double()}, V


def qwen_inputs(model, tok, image, question):
    seen = Qwen2VLImageProcessorPil(min_pixels=PIXELS[0], max_pixels=PIXELS[1])(image)
    grid = torch.tensor(seen.image_grid_thw)
    V = grid.prod().item() // 4
    ids = torch.tensor([tok(CHATML.format(question).replace("<|image_pad|>", "<|image_pad|>" * V)).input_ids])
    return {"input_ids": ids, "pixel_values": torch.tensor(seen.pixel_values).double(), "image_grid_thw": grid,
            "mm_token_type_ids": (ids == model.config.image_token_id).int()}, V


def qwen_extras(model, inputs):
    """Positions, tower output, and the attention each visual token receives in the last full block, in raster order."""
    pos, delta = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
    tower, seen = model.model.visual, []
    original = modeling_qwen2_5_vl.eager_attention_forward

    def recorded(*args, **kwargs):
        out = original(*args, **kwargs)
        seen.append(out[1])
        return out
    modeling_qwen2_5_vl.eager_attention_forward = recorded
    implementation, tower.config._attn_implementation = tower.config._attn_implementation, "eager"
    tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    tower.config._attn_implementation = implementation
    modeling_qwen2_5_vl.eager_attention_forward = original
    order, _ = get_vision_window_index(inputs["image_grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size)
    received = seen[-1][0].mean((0, 1)).view(-1, 4).mean(1)                      # the last block is one of full attention
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return {"pos": pos[:, 0], "next_pos": delta.view(1) + inputs["input_ids"].shape[1], "features": torch.cat(list(features)),
            "saliency": received[torch.as_tensor(order).argsort()]}


def record(name, config, cls, tokenizer, make_inputs, pictures, extras=None):
    torch.manual_seed(0)
    model = cls(config).eval()
    randomise(model)
    model.tie_weights()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder, max_shard_size="100KB")
    in_memory = GOLDEN / f"{name}_in_memory_keys"
    model.save_pretrained(in_memory, save_original_format=False)
    keys = sorted(model.state_dict())
    shutil.rmtree(in_memory)
    tok = tokenizer(folder / "tokenizer.json")
    model = cls.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    tensors, cases = {}, []
    for image_name in pictures:
        for number, question in enumerate(QUESTIONS):
            case = f"{image_name}.{number}"
            inputs, V = make_inputs(model, tok, images()[image_name], question)
            ids = inputs["input_ids"]
            start = (ids[0] == model.config.image_token_id).nonzero()[0].item()
            with torch.no_grad():
                out = model(**inputs, output_hidden_states=True)
                if extras:
                    tensors |= {f"{case}.{key}": value for key, value in extras(model, inputs).items()}
            tensors[f"{case}.ids"] = ids[0]
            tensors[f"{case}.hidden"] = torch.cat(out.hidden_states)            # (L+1, T, C), the last one after the final norm
            logits, tokens = greedy(model, inputs)
            tensors[f"{case}.logits"], tensors[f"{case}.tokens"] = logits, tokens
            penalised = greedy(model, inputs, 1.5)[1]
            pruned = {}
            if number == 0:
                for layer in range(model.config.text_config.num_hidden_layers):
                    for keep in (kept(V, layer), []):
                        hooks = masked(model, layer, start, V, keep)
                        key = f"{case}.layer{layer}.keep{len(keep)}"
                        tensors[f"{key}.logits"], tensors[f"{key}.tokens"] = greedy(model, inputs)
                        for h in hooks:
                            h.remove()
                        pruned[key] = [layer, keep]
            cases.append({"name": case, "image": image_name, "question": question, "pruned": pruned,
                          "text": tok.decode(tokens, skip_special_tokens=True).strip(),
                          "penalised_text": tok.decode(penalised, skip_special_tokens=True).strip()})
    save_file({k: v.contiguous() for k, v in tensors.items()}, GOLDEN / f"{name}.safetensors")
    (GOLDEN / f"{name}.json").write_text(json.dumps({"transformers": transformers.__version__, "in_memory_keys": keys,
                                                     "cases": cases}, indent=1) + "\n")


def record_pixels():
    """SHA-256 of the float32 pixels of each sample image, as the PIL processors of transformers give them."""
    side = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    crop, pad = CLIPImageProcessorPil(**side), LlavaImageProcessorPil(do_pad=True, **side)
    digest = lambda pixels: hashlib.sha256(pixels.tobytes()).hexdigest()
    opened = lambda image: Image.fromarray(np.asarray(image.convert("RGB")))    # as LLaVA's evaluation does, alpha dropped
    found = {}
    for name, image in images().items():
        found[name] = {"crop": digest(crop(image).pixel_values[0]), "pad": digest(pad(opened(image)).pixel_values[0])}
        for low, high in BOUNDS:
            seen = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)(image)
            found[name][f"qwen {low} {high}"] = [seen.image_grid_thw[0].tolist(), digest(seen.pixel_values)]
    (GOLDEN / "pixels.json").write_text(json.dumps(found, indent=1) + "\n")


PIXELS = 56 * 56, 16384 * 28 * 28                       # the published bounds
BOUNDS = [PIXELS, (28 * 28, 4 * 28 * 28), (30 * 28 * 28, 40 * 28 * 28)]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4, image_size=56,
                              patch_size=14)
    for name, kv_heads, tied in (("llava_grouped", 2, False), ("llava_tied", 4, True)):
        text = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
                           rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, num_key_value_heads=kv_heads)
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=300, pad_token_id=301, tie_word_embeddings=tied)
        record(name, config, LlavaForConditionalGeneration, llama_tokenizer, llava_inputs, ("square", "wide", "tall"))
    ids = dict(image_token_id=306, video_token_id=307, vision_start_token_id=303, vision_end_token_id=304)
    vision = dict(depth=4, hidden_size=32, intermediate_size=44, num_heads=2, out_hidden_size=48, patch_size=14,
                  spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1, 3], tokens_per_second=2)
    for name, tied in (("qwen_untied", False), ("qwen_tied", True)):
        text = dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3 if tied else 6,
                    num_key_value_heads=1 if tied else 2, rms_norm_eps=1e-6, rope_theta=1e4 if tied else 1e6, bos_token_id=300, eos_token_id=302,
                    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3] if tied else [1, 1, 2]}, tie_word_embeddings=tied)
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        record(name, config, Qwen2_5_VLForConditionalGeneration, qwen_tokenizer, qwen_inputs, ("square", "wide", "sign", "partial", "whole"),
               qwen_extras)
    record_pixels()
