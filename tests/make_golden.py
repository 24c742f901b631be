"""Records tests/golden/ from transformers 5.23.0: small random LLaVA-1.5 checkpoints and what the original computes on them.

    pip install transformers==5.23.0 && python tests/make_golden.py

No test and no user needs transformers. Weights are drawn wide, with biases and norms away from 0 and 1, because its own
initialisation hides mistakes; they are rounded to bfloat16, so a float64 run starts from the same numbers.
"""
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from samples import QUESTIONS, images, kept
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

GOLDEN = Path(__file__).parent / "golden"
PROMPT = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:")
NEW_TOKENS = 12


def tokenizer(path):
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


def randomise(model):
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1:
            p.data = 0.2 * noise
        else:
            p.data = 0.7 * noise if "embed" in name else 1.6 * noise / p[0].numel() ** 0.5
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


def greedy(model, ids, pixels):
    """-> logits of each step, (NEW_TOKENS, vocab), and the tokens; nothing stops early."""
    out = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                         do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    return torch.cat(out.logits), out.sequences[0, ids.shape[1]:]


def record(name, text, vision, tied):
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision), image_token_index=300,
                         pad_token_id=301, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model)
    model.tie_weights()
    folder = GOLDEN / name
    model.bfloat16().save_pretrained(folder, max_shard_size="100KB")
    in_memory = GOLDEN / f"{name}_in_memory_keys"
    model.save_pretrained(in_memory, save_original_format=False)
    keys = sorted(model.state_dict())
    shutil.rmtree(in_memory)
    tok = tokenizer(folder / "tokenizer.json")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    crop = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    V = (vision["image_size"] // vision["patch_size"]) ** 2
    tensors, cases = {}, []
    for image_name in ("square", "wide", "tall"):
        for number, question in enumerate(QUESTIONS):
            case = f"{image_name}.{number}"
            prompt = PROMPT.format(question).replace("<image>", "<image>" * V)
            ids = torch.tensor([tok(prompt).input_ids])
            start = ids[0].tolist().index(300)
            pixels = torch.tensor(crop(images()[image_name]).pixel_values[0])[None]
            with torch.no_grad():
                out = model(input_ids=ids, pixel_values=pixels.double(), output_hidden_states=True)
            tensors[f"{case}.ids"] = ids[0]
            tensors[f"{case}.hidden"] = torch.cat(out.hidden_states)            # (L+1, T, C), the last one after the final norm
            logits, tokens = greedy(model, ids, pixels.double())
            tensors[f"{case}.logits"], tensors[f"{case}.tokens"] = logits, tokens
            pruned = {}
            if number == 0:
                for layer in range(text["num_hidden_layers"]):
                    for keep in (kept(V, layer), []):
                        hooks = masked(model, layer, start, V, keep)
                        key = f"{case}.layer{layer}.keep{len(keep)}"
                        tensors[f"{key}.logits"], tensors[f"{key}.tokens"] = greedy(model, ids, pixels.double())
                        for h in hooks:
                            h.remove()
                        pruned[key] = [layer, keep]
            cases.append({"name": case, "image": image_name, "question": question, "pruned": pruned,
                          "text": tok.decode(tokens, skip_special_tokens=True).strip()})
    save_file({k: v.contiguous() for k, v in tensors.items()}, GOLDEN / f"{name}.safetensors")
    (GOLDEN / f"{name}.json").write_text(json.dumps({"transformers": transformers.__version__, "in_memory_keys": keys,
                                                     "cases": cases}, indent=1) + "\n")


def record_pixels():
    """SHA-256 of the float32 pixels of each sample image, as both PIL processors of transformers give them."""
    side = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    crop, pad = CLIPImageProcessorPil(**side), LlavaImageProcessorPil(do_pad=True, **side)
    digest = lambda pixels: hashlib.sha256(pixels.tobytes()).hexdigest()
    opened = lambda image: Image.fromarray(np.asarray(image.convert("RGB")))    # as LLaVA's evaluation does, alpha dropped
    found = {name: {"crop": digest(crop(image).pixel_values[0]), "pad": digest(pad(opened(image)).pixel_values[0])}
             for name, image in images().items()}
    (GOLDEN / "pixels.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    shutil.rmtree(GOLDEN / "llava_grouped", ignore_errors=True)
    shutil.rmtree(GOLDEN / "llava_tied", ignore_errors=True)
    GOLDEN.mkdir(exist_ok=True)
    vision = dict(hidden_size=32, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14)
    text = dict(vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
                rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
    record("llava_grouped", text | dict(num_key_value_heads=2), vision, tied=False)
    record("llava_tied", text | dict(num_key_value_heads=4), vision, tied=True)
    record_pixels()
