"""Qwen2.5-VL in one file: config, Qwen2 decoder, window-attention tower, merger, image, prompt, load.

The decoder loop is `Qwen.run`: it moves a Stream forward by layers and stops wherever you ask, so that
tokprune can take visual rows out of it. Everything here is the published model; pruning is not its business.

    B variants of one prompt   T rows   V visual tokens   P patches
    C width   H heads   G key/value heads   D head width   L layers
"""
import json
import math
import re
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from tokprune import InputError, Stream, extend, prefill, with_room

# the chat template of the checkpoint for one user turn: image first, no BOS, nothing after the last newline
PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
          "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIXELS = (56 * 56, 16384 * 28 * 28)     # fewest and most pixels of a resized image, where the checkpoint does not say


# ---- config -----------------------------------------------------------------------------------------------------

@dataclass
class TextConfig:
    """No default for what differs within the family: transformers' own are those of the 72B, never to be fallen back on."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    rope_theta: float = 1e6
    mrope_section: tuple = ()           # how many of the D/2 frequencies turn with t, with h and with w

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    window_size: int                    # pixels
    fullatt_block_indexes: list         # every other block attends within windows
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    hidden_act: str = "silu"


@dataclass
class Config:
    text: TextConfig
    vision: VisionConfig
    image_token: int = 151655
    tie_word_embeddings: bool = False
    min_pixels: int = PIXELS[0]
    max_pixels: int = PIXELS[1]

    @property
    def factor(self) -> int:
        """The side of a visual token in pixels: resized images are multiples of it."""
        return self.vision.patch_size * self.vision.spatial_merge_size


def read_config(path: Path) -> Config:
    """config.json of a Qwen2.5-VL folder, in any form transformers 4 and 5 have written it. Raises InputError."""
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "qwen2_5_vl":
        raise InputError(f"{path}/config.json: model_type is {raw.get('model_type')!r}, want 'qwen2_5_vl'")
    text = section(raw, "text_config", path) or raw                     # the published files have the text fields at the root
    old, new = section(text, "rope_scaling", path), section(text, "rope_parameters", path)      # transformers 4 and 5
    text = text | {k: v for k, v in (old | new).items() if k in ("rope_theta", "mrope_section")}
    low, high = read_pixels(path)
    config = Config(text=known(TextConfig, text, path), vision=known(VisionConfig, section(raw, "vision_config", path), path),
                    image_token=raw.get("image_token_id") or 151655, min_pixels=low, max_pixels=high,
                    # transformers 4.57 writes the flag into text_config alone
                    tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")))
    t, v = config.text, config.vision
    for rope in (old, new):
        for name in ("rope_type", "type"):
            if rope.get(name, "default") not in ("default", "mrope"):
                raise InputError(f"{path}/config.json: {name} of the rotary embedding is {rope[name]!r}; "
                                 "want 'mrope' or 'default', nothing else is implemented")
    for name, found, want in [
            ("hidden_act", t.hidden_act, "silu"),
            ("vision hidden_act", v.hidden_act, "silu"),
            ("use_sliding_window", t.use_sliding_window, False),
            ("hidden_size % heads", t.hidden_size % t.num_attention_heads, 0),
            ("heads % key/value heads", t.num_attention_heads % t.num_key_value_heads, 0),
            ("sum of mrope_section", sum(t.mrope_section), t.head_dim // 2),
            ("vision hidden_size % (4 * heads)", v.hidden_size % (4 * v.num_heads), 0),
            ("out_hidden_size", v.out_hidden_size, t.hidden_size),
            ("window_size % visual token", v.window_size % config.factor, 0)]:
        if found != want:
            raise InputError(f"{path}/config.json: {name} is {found!r}, want {want!r}; nothing else is implemented")
    if not v.fullatt_block_indexes or not all(i in range(v.depth) for i in v.fullatt_block_indexes):
        raise InputError(f"{path}/config.json: fullatt_block_indexes is {v.fullatt_block_indexes}, "
                         f"want blocks of 0..{v.depth - 1}")
    return config


def known(cls, raw: dict, path: Path):
    """The dataclass from the entries of raw it has a field for, of the field's type; null means left out."""
    found = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
    for f in fields(cls):
        if f.name not in found:
            if f.default is MISSING:
                raise InputError(f"{path}/config.json: {f.name} is not there, want {f.type.__name__}")
            continue
        value, kind = found[f.name], {float: (int, float), tuple: list}.get(f.type, f.type)
        whole = not isinstance(value, list) or all(type(i) is int for i in value)
        if not isinstance(value, kind) or not whole or (f.type in (int, float) and value <= 0):
            raise InputError(f"{path}/config.json: {f.name} is {value!r}, want {f.type.__name__}"
                             + " above 0" * (f.type in (int, float)))
    return cls(**found)


def read_pixels(path: Path) -> tuple[int, int]:
    """Bounds of the resized image, in pixels: under their own names or, as transformers 5 saves them, as size, in a file of
    their own or nested."""
    raw = {}
    for file in (path / "preprocessor_config.json", path / "processor_config.json"):
        if file.exists() and not raw:
            raw = read_json(file)
            raw = raw if "preprocessor" in file.name else section(raw, "image_processor", path)
    size = section(raw, "size", path)
    bounds = (raw.get("min_pixels") or size.get("shortest_edge") or PIXELS[0],
              raw.get("max_pixels") or size.get("longest_edge") or PIXELS[1])
    for name, value in zip(("min_pixels", "max_pixels"), bounds):
        if type(value) is not int or value < 1:
            raise InputError(f"{path}: {name} is {value!r}, want a whole number above 0")
    return bounds


def section(raw: dict, name: str, path: Path) -> dict:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is {value!r}, want an object")
    return value


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises InputError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; want a JSON file there")
    except (ValueError, OSError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON ({e})")
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, want an object")
    return found


# ---- model ------------------------------------------------------------------------------------------------------

class Qwen(nn.Module):
    """Qwen2.5-VL (arXiv 2502.13923). Parameters carry the names of the published checkpoint."""

    def __init__(self, config: Config, tokenizer: Tokenizer, eos: set):
        super().__init__()
        self.config, self.tokenizer, self.eos = config, tokenizer, eos
        self.num_layers = config.text.num_hidden_layers
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        half = torch.arange(0, config.text.head_dim, 2, dtype=torch.float32, device="cpu") / config.text.head_dim
        # stays float32: `load` casts the weights alone
        self.register_buffer("inv_freq", 1 / config.text.rope_theta ** half, persistent=False)

    def preprocess(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """PIL image -> patches (P, 3 * 2 * 14 * 14) float32, and the grid of its visual tokens (rows, columns)."""
        c = self.config.vision
        return patchify(normalize(self.canvas(image)), c.patch_size, c.spatial_merge_size, c.temporal_patch_size)

    def canvas(self, image: Image.Image) -> Image.Image:
        """The resized image that the visual tokens tile: its own shape, sides multiples of a token."""
        c = self.config
        height, width = smart_resize(image.height, image.width, c.factor, c.min_pixels, c.max_pixels)
        return on_white(image).resize((width, height), Image.BICUBIC)

    @torch.inference_mode()
    def begin(self, image: Image.Image | tuple, question: str) -> Stream:
        """A prompt about one image (or what `preprocess` makes of it) -> Stream at the input of layer 0, B = 1."""
        pixels, grid = image if isinstance(image, tuple) else self.preprocess(image)
        embed = self.model.embed_tokens
        device, dtype = embed.weight.device, embed.weight.dtype
        features, saliency = self.visual(pixels[None].to(device, dtype), grid)     # (1, V, C); saliency() -> (1, V)
        ids = self.tokenizer.encode(PROMPT.format(question=question)).ids
        places = [i for i, token in enumerate(ids) if token == self.config.image_token]
        if len(places) != 1:
            raise InputError(f"prompt holds {len(places)} <|image_pad|> tokens (id {self.config.image_token}), want 1: "
                             f"{question!r}")
        start, V = places[0], features.shape[1]
        ids = torch.tensor(ids[:start] + [ids[start]] * V + ids[start + 1:], device=device)
        x = embed(ids)
        x[start:start + V] = features[0]
        pos, next_pos = positions(start, grid, len(ids))
        return Stream(layer=0, x=x[None], pos=pos[:, None].to(device), next_pos=next_pos, visual=(start, V),
                      origin=torch.arange(V, device=device)[None], grid=grid, cache=[None] * self.num_layers, queries=None,
                      ids=ids, embeds=x, saliency=lambda: saliency()[0])

    @torch.inference_mode()
    def run(self, stream: Stream, stop: int | None = None) -> Stream:
        """Layers stream.layer .. stop-1 on every row of the stream -> Stream at layer `stop` (None: past the last).

        The one decoder loop: prefill, pruned prefill and decoding all pass here. A layer whose cache already holds
        rows attends to them too: all earlier tokens when decoding, the shared prefix when measuring information.
        """
        stop = self.num_layers if stop is None else stop
        assert stream.layer <= stop <= self.num_layers, f"stop is {stop}, want {stream.layer}..{self.num_layers}"
        x, cache, q = stream.x, list(stream.cache), stream.queries
        rope = self.rope(stream.pos, x.dtype)
        for layer in range(stream.layer, stop):
            q = None                                    # let go before the next layer runs; the last one's alone are used
            x, q, cache[layer] = self.model.layers[layer](x, rope, past=cache[layer])
        return replace(stream, layer=stop, x=x, cache=cache, queries=q)

    def rope(self, pos: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """M-RoPE: positions (3, B, T) -> cos and sin (B, 1, T, D). The first frequencies turn with t, the next with h, the
        last with w; a text token has all three alike, which is the ordinary rotary embedding."""
        angles = pos[..., None].float() * self.inv_freq                            # (3, B, T, D/2)
        parts = angles.split(list(self.config.text.mrope_section), -1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)[:, None]   # (B, 1, T, D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    @torch.inference_mode()
    def logits(self, stream: Stream) -> Tensor:
        """(B, vocab) float32 logits of the next token; the stream must be past the last layer."""
        assert stream.layer == self.num_layers, f"stream is at layer {stream.layer}, want {self.num_layers}"
        return self.lm_head(self.final_norm(stream.x[:, -1])).float()

    @torch.inference_mode()
    def decode(self, stream: Stream, max_new_tokens: int = 16, repetition_penalty: float = 1.0) -> list[str]:
        """Greedy answers of the B variants, through each layer's own cache. Stops when all have ended.

        repetition_penalty: logits of every token of prompt (image included) or answer are divided by it, negative ones
        multiplied, as in transformers. The published generation_config.json says 1.05; 1 changes nothing.
        """
        stream = with_room(stream)
        answers = [[] for _ in range(len(stream.x))]
        ended = [False] * len(answers)
        seen = stream.ids.expand(len(answers), -1)                                 # (B, T at first and what is generated)
        for step in range(max_new_tokens):
            logits = self.logits(stream)
            said = logits.gather(1, seen)
            logits.scatter_(1, seen, torch.where(said < 0, said * repetition_penalty, said / repetition_penalty))
            ids = logits.argmax(-1)                                                # (B,), ties to the lowest id
            for b, token in enumerate(ids.tolist()):
                ended[b] = ended[b] or token in self.eos
                if not ended[b]:
                    answers[b].append(token)
            if all(ended) or step == max_new_tokens - 1:
                break
            seen = torch.cat([seen, ids[:, None]], 1)
            stream = self.run(self.append(stream, ids[:, None]))
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def append(self, stream: Stream, ids: Tensor) -> Stream:
        """New tokens (B, n) -> Stream at layer 0 that holds them alone; the rows before are in the cache."""
        x = self.model.embed_tokens(ids)                                           # (B, n, C)
        after = stream.next_pos + ids.shape[1]
        pos = torch.arange(stream.next_pos, after, device=x.device).expand(3, 1, -1)
        return replace(stream, layer=0, x=x, pos=pos, next_pos=after, queries=None)

    def answer(self, image: Image.Image, question: str, schedule=None, max_new_tokens: int = 16) -> str:
        """The greedy answer; schedule as `tokprune.parse_schedule` returns it."""
        return self.decode(prefill(self, self.begin(image, question), schedule or []), max_new_tokens)[0]

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens the model would emit for that answer: it stands at the start of a line, no blank before it."""
        return self.tokenizer.encode(answer).ids

    def answer_id(self, answer: str) -> int:
        """The first of them."""
        return self.answer_ids(answer)[0]


def positions(start: int, grid: tuple[int, int], T: int) -> tuple[Tensor, int]:
    """M-RoPE positions (3, T) as t, h, w, and the next one: text counts on, alike in all three; the image spans a plane.

    A visual token (y, x) stands at (start, start + y, start + x); text goes on after the largest position of the image, so
    an image of 100 tokens takes as little as 10 positions. (transformers: get_rope_index)
    """
    rows, cols = grid
    pos = torch.arange(T).repeat(3, 1)
    end = start + rows * cols
    pos[0, start:end] = start
    pos[1, start:end] = start + torch.arange(rows).repeat_interleave(cols)
    pos[2, start:end] = start + torch.arange(cols).repeat(rows)
    pos[:, end:] += max(rows, cols) - rows * cols
    return pos, T + max(rows, cols) - rows * cols


# ---- Qwen2 decoder ----------------------------------------------------------------------------------------------

class Decoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DecoderLayer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor, rope, past=None, mask=None):
        """-> x, this layer's queries, (keys, values) of everything seen so far."""
        y, q, kv = self.self_attn(self.input_layernorm(x), rope, past, mask)
        y = x + y                                       # y again: attention's output is let go
        return y + self.mlp(self.post_attention_layernorm(y)), q, kv


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.H, self.G, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.D)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.D)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.D)
        self.o_proj = nn.Linear(self.H * self.D, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, past=None, mask=None):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.H, self.D).transpose(1, 2), rope)   # (B, H, T, D)
        k = rotate(self.k_proj(x).view(B, T, self.G, self.D).transpose(1, 2), rope)   # (B, G, T, D)
        v = self.v_proj(x).view(B, T, self.G, self.D).transpose(1, 2)                 # (B, G, T, D)
        kv = k, v
        if past is not None:
            k, v, kv = extend(past, k, v)                                             # (B, G, S, D)
            if T > 1:                                   # causal by row, never by position: rows keep their order
                mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None and mask is None,
                                           enable_gqa=self.G != self.H)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D)), q, kv


class MLP(nn.Module):
    """SwiGLU, in the decoder and, with biases, in the tower."""

    def __init__(self, C: int, width: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(C, width, bias)
        self.up_proj = nn.Linear(C, width, bias)
        self.down_proj = nn.Linear(width, C, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class RMSNorm(nn.Module):
    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x: Tensor) -> Tensor:
        # rounded to x's dtype before the weight, as the original does
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x: Tensor, rope) -> Tensor:
    """Rotary embedding in LLaMA's half-split form: dimension i turns with i + D/2."""
    cos, sin = rope                                     # sin with the minus of the first half
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


# ---- vision tower and merger ------------------------------------------------------------------------------------

class VisionTower(nn.Module):
    """A ViT whose blocks attend within windows, a few excepted. No CLS token, no learned positions: rotary in y and x.

    Patches come token by token in raster order, the 2x2 patches of a token together. The original sorts them by window and
    sorts the tokens back after the merger; here a window is a set of indices and nothing ever moves.
    """

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.c = c
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Module()             # the checkpoint's Conv3d, applied as the matrix product it is
        patch = (3, c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed.proj.weight = nn.Parameter(torch.zeros(c.hidden_size, *patch))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = Merger(c)

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Callable[[], Tensor]]:
        """(B, P, 1176) -> token features (B, V, C), and a function that returns (B, V) float32: how much the whole image attends
        to each token in the last block of full attention. It is costly, and few methods ask."""
        x = F.linear(pixels, self.patch_embed.proj.weight.flatten(1))              # (B, P, width)
        rope = self.rope(grid, x.device)
        m = self.c.spatial_merge_size
        window = windows(grid, self.c.window_size // self.c.patch_size // m, m * m, x.device)
        for i, block in enumerate(self.blocks):
            x, q, k = block(x, rope, None if i in self.c.fullatt_block_indexes else window)
            if i == max(self.c.fullatt_block_indexes):
                last = q, k
        return self.merger(x), lambda: column_mean(*last).unflatten(1, (-1, m * m)).mean(2)

    def rope(self, grid, device) -> tuple[Tensor, Tensor]:
        """cos and sin (P, D) float32: half of the frequencies turn with a patch's y, half with its x."""
        D, m = self.c.hidden_size // self.c.num_heads, self.c.spatial_merge_size
        y, x = torch.meshgrid(torch.arange(grid[0] * m, device=device), torch.arange(grid[1] * m, device=device), indexing="ij")
        inv_freq = 1e4 ** -(torch.arange(0, D // 2, 2, device=device).float() / (D // 2))
        angles = torch.cat([by_token(place[..., None], m) * inv_freq for place in (y, x)], -1)   # (P, D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def by_token(x: Tensor, m: int) -> Tensor:
    """(rows * m, columns * m, ...) in raster order -> (P, ...), the m x m patches of each token together."""
    return x.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 3)


def windows(grid: tuple[int, int], side: int, patches: int, device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which patches share a window of side x side tokens, `patches` to a token.

    -> index (W, K) of the patches in each window; back (P), where in there each patch is; mask (W, 1, K), False where a
    window at the right or bottom edge has no patch, or None if all are whole.
    """
    rows, cols = grid
    y, x = (torch.arange(-(-n // side) * side, device=device) for n in grid)
    token = (y[:, None] * cols + x).masked_fill((y[:, None] >= rows) | (x >= cols), -1)
    token = token.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).reshape(-1, side * side)
    mask = (token >= 0).repeat_interleave(patches, 1)
    index = (token.clamp(min=0)[..., None] * patches + torch.arange(patches, device=device)).flatten(1)
    there = mask.flatten().nonzero()[:, 0]
    back = there[index.flatten()[there].argsort()]
    return index, back, None if mask.all() else mask[:, None]


def column_mean(q: Tensor, k: Tensor) -> Tensor:
    """Mean attention each patch receives, (B, P) float32, over heads and rows; the matrix is never held as a whole."""
    keys, total = k.float().transpose(-1, -2) * q.shape[-1] ** -0.5, 0
    for part in q.split(64, 2):                                                # (B, H, 64, D)
        total = total + (part.float() @ keys).softmax(-1).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.norm2 = RMSNorm(c.hidden_size, 1e-6)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: Tensor, rope, window=None):
        y, q, k = self.attn(self.norm1(x), rope, window)
        y = x + y
        return y + self.mlp(self.norm2(y)), q, k


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.H = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rope, window=None):
        """Among all patches or, given windows, within each. -> y and, of all patches, queries and keys."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.H, -1)).permute(2, 0, 3, 1, 4)              # (B, H, P, D) each
        q, k = (rotate(t.float(), rope).to(v.dtype) for t in (q, k))
        if window is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            index, back, mask = window
            y = F.scaled_dot_product_attention(*(t[:, :, index].flatten(0, 1) for t in (q, k, v)), attn_mask=mask)
            y = y.flatten(1, 2).unflatten(0, q.shape[:2])[:, :, back]                            # (B*H, W, K, D) -> (B, H, P, D)
        return self.proj(y.transpose(1, 2).flatten(2)), q, k


class Merger(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.width = c.hidden_size * c.spatial_merge_size ** 2
        self.ln_q = RMSNorm(c.hidden_size, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, c.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(len(x), -1, self.width))                 # (B, P, width) -> (B, V, C)


# ---- image ------------------------------------------------------------------------------------------------------

def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The height and width nearest the image's own that are multiples of factor, with the area within bounds.

    Python's round: halves go to the even multiple, as in the original (transformers: image_processing_qwen2_vl).
    """
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"image is {width}x{height}: one side is more than 200 times the other, want less")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as in transformers 5 (transformers 4 dropped alpha)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def normalize(image: Image.Image) -> Tensor:
    """RGB image -> (3, height, width) float32, rounded step by step as the PIL processors of transformers do."""
    x = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    x = (x - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())


def patchify(x: Tensor, patch: int, m: int, frames: int) -> tuple[Tensor, tuple[int, int]]:
    """(3, height, width) -> patches (P, 3 * frames * patch * patch) token by token, and the grid of tokens. A still image
    is a film of `frames` equal frames."""
    x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4)             # (y, x, 3, patch, patch)
    grid = x.shape[0] // m, x.shape[1] // m
    x = by_token(x, m)[:, :, None].expand(-1, -1, frames, -1, -1)                                # (P, 3, frames, patch, patch)
    return x.flatten(1), grid


# ---- load -------------------------------------------------------------------------------------------------------

# From what transformers 4 and 5 hold in memory to the published names.
RENAMES = [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")]
IGNORED = r"rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq"                         # in checkpoints, of no use here


def load(path, device=None, dtype=None, min_pixels: int | None = None, max_pixels: int | None = None) -> Qwen:
    """Qwen2.5-VL of any size from a folder as published (config.json, tokenizer.json, *.safetensors or index + shards).

    device: cuda if there is one, else cpu. dtype: bfloat16 on cuda, float32 on cpu. min_pixels, max_pixels: bounds of the
    resized image instead of the checkpoint's. Raises InputError.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; want a checkpoint folder with config.json and *.safetensors")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = read_config(path)
    config.min_pixels, config.max_pixels = min_pixels or config.min_pixels, max_pixels or config.max_pixels
    if not config.min_pixels <= config.max_pixels:
        raise InputError(f"min_pixels is {config.min_pixels}, max_pixels {config.max_pixels}; want min_pixels <= max_pixels")
    with torch.device("meta"):
        model = Qwen(config, read_tokenizer(path), read_eos(path))
    load_weights(model, path, device, dtype)
    return model.eval().requires_grad_(False)


def load_weights(model: Qwen, path: Path, device, dtype):
    """One tensor at a time, file -> device; on the CPU in the stored dtype the file's own pages are used, uncopied."""
    want = dict(model.named_parameters())
    found = {}
    for shard in find_shards(path):
        for key in open_shard(shard, lambda f: list(f.keys())):
            name = key
            for pattern, new in RENAMES:
                name = re.sub(pattern, new, name)
            if name in want:                            # opened anew for each tensor: pages already converted are let go
                found[name] = open_shard(shard, lambda f: f.get_tensor(key)).to(device, dtype)
                if found[name].shape != want[name].shape:
                    raise InputError(f"{shard}: {key} is {list(found[name].shape)}, config.json wants {list(want[name].shape)}")
            elif not re.search(IGNORED, name):
                raise InputError(f"{shard}: unknown tensor {key}")
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if model.config.tie_word_embeddings and (embed in found) != (head in found):   # 3B stores one matrix for both
        found[embed] = found[head] = found.get(embed, found.get(head))
    missing = sorted(want.keys() - found.keys())
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(want)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(found, assign=True)
    model.to(device)                                    # what no file holds: the rotary frequencies


def open_shard(shard: Path, read):
    try:
        with safe_open(shard, "pt") as f:
            return read(f)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{shard}: cannot be read as safetensors ({e})")


def find_shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = [path / str(name) for name in sorted(set((read_json(index).get("weight_map") or {}).values()))]
        absent = [shard.name for shard in shards if not shard.exists()]
        if absent or not shards:
            raise InputError(f"{path}: {index.name} names {len(shards)} shards, missing: {', '.join(absent) or 'all'}")
        return shards
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        bins = " (its .bin files are not read; convert them to safetensors)" if list(path.glob("*.bin")) else ""
        raise InputError(f"{path}: no *.safetensors found{bins}")
    return shards


def read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file}: not found; want the tokenizer as one file, vocab.json and merges.txt are not read")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:                              # tokenizers raises a bare Exception
        raise InputError(f"{file}: not a valid tokenizer ({e})")


def read_eos(path: Path) -> set:
    """Ids that end an answer, from generation_config.json; else <|im_end|> and <|endoftext|> of the published models."""
    file = path / "generation_config.json"
    eos = (read_json(file) if file.exists() else {}).get("eos_token_id") or [151645, 151643]
    return set(eos) if isinstance(eos, list) else {eos}
