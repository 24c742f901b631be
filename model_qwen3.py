"""Qwen3-VL in one file: prompt, the model and its layer loop, Qwen3 decoder, vision tower with
mergers; then configuration and loading.

`Qwen3.run` moves a Stream forward by layers and stops wherever it is asked to, so that tokprune can
take visual rows out of it. Everything here is the published model; pruning is not its business.

DeepStack: beside the visual tokens the tower returns features of earlier blocks, here called
planes, with a row for each token. Plane i is added to the visual rows right after decoder layer i,
so it is part of x at the input of layer i + 1. A visual row that leaves before then takes its row
of the plane with it.

    B variants of prompts   T rows   S rows with those in the cache   V visual tokens   P patches
    N visual tokens at first   C width   H heads   G key/value heads   D head width
"""
import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from support import checkpoint
from support.image import by_token, normalize, on_white, patchify, smart_resize
from tokprune import KV, InputError, Stream, causal_mask, decode, finite, per_variant

IMAGE = "<|image_pad|>"                 # stands for the image, once in a prompt
# the chat template of the checkpoint for one user turn: no system turn, image first, no BOS; its
# authors decode without a repetition penalty
PROMPT = ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
          "<|im_start|>assistant\n")
MEAN = (0.5, 0.5, 0.5)                  # not CLIP's
STD = (0.5, 0.5, 0.5)


# ---- model ---------------------------------------------------------------------------------------

class Qwen3(nn.Module):
    """Qwen3-VL, dense (arXiv 2511.21631). Parameters carry the names of the published checkpoint,
    but for "visual." (there "model.visual.") and "model." (there "model.language_model.")."""

    def __init__(self, config: "Config", tokenizer: Tokenizer, eos: set[int]):
        super().__init__()
        text = config.text
        self.config = config
        self.tokenizer = tokenizer
        self.eos = eos
        self.num_layers = text.num_hidden_layers
        self.visual = VisionTower(config.vision)
        self.model = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        exponent = torch.arange(0, text.head_dim, 2, dtype=torch.float32, device="cpu")
        inv_freq = 1 / text.rope_theta ** (exponent / text.head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)    # float32 in every dtype

    def preprocess(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Return patches (P, 3 * 2 * 16 * 16) float32, and the grid of visual tokens (rows,
        columns)."""
        c = self.config.vision
        pixels = normalize(self.canvas(image), MEAN, STD)
        return patchify(pixels, c.patch_size, c.spatial_merge_size, c.temporal_patch_size)

    def canvas(self, image: Image.Image) -> Image.Image:
        """Return the resized image that the visual tokens tile: of its own shape, in multiples of a
        token."""
        c = self.config
        height, width = smart_resize(image.height, image.width, c.factor, c.min_pixels,
                                     c.max_pixels)
        return on_white(image).resize((width, height), Image.BICUBIC)

    def tokenize(self, question: str) -> tuple[list[int], int]:
        """Return the ids of a prompt, and the place of its image token. Raises InputError."""
        ids = self.tokenizer.encode(PROMPT.format(question=question)).ids
        places = [i for i, token in enumerate(ids) if token == self.config.image_token]
        if len(places) != 1:
            raise InputError(f"prompt holds {len(places)} {IMAGE} tokens (id "
                             f"{self.config.image_token}), want 1: {question[:100]!r}")
        return ids, places[0]

    def shape(self, size: tuple[int, int], question: str) -> tuple[int, int, tuple[int, int]]:
        """Return the shape of a prompt about an image of that width and height: its rows, the first
        visual one, and the grid of visual tokens. Raises InputError."""
        ids, start = self.tokenize(question)
        c = self.config
        height, width = smart_resize(size[1], size[0], c.factor, c.min_pixels, c.max_pixels)
        grid = height // c.factor, width // c.factor
        rows = checkpoint.rows_of_prompt(ids, grid[0] * grid[1], c)
        return rows, start, grid

    @torch.inference_mode()
    def begin(self, image: Image.Image | tuple, question: str) -> Stream:
        """Begin a prompt about one image, or what `preprocess` makes of it -> Stream at layer 0,
        B = 1. Raises InputError."""
        pixels, grid = image if isinstance(image, tuple) else self.preprocess(image)
        embed = self.model.embed_tokens
        device = embed.weight.device
        pixels = pixels[None].to(device, embed.weight.dtype)
        features, planes, saliency = self.visual(pixels, grid)
        ids, start = self.tokenize(question)
        V = features.shape[1]                                                   # (1, V, C)
        checkpoint.rows_of_prompt(ids, V, self.config)
        ids = torch.tensor(ids[:start] + V * [ids[start]] + ids[start + 1:], device=device)
        x = embed(ids)                                                          # (T, C)
        x[start:start + V] = features[0]
        pos, next_pos = positions(start, grid, len(ids))                        # (3, T)
        return Stream(layer=0, x=x[None], pos=pos[:, None].to(device), next_pos=next_pos,
                      visual=(start, V), origin=torch.arange(V, device=device)[None], N=V,
                      grid=grid, cache=[None] * self.num_layers, queries=None, ids=ids[None],
                      embeds=x[None], saliency=functools.cache(saliency), planes=tuple(planes))

    @torch.inference_mode()
    def run(self, stream: Stream, stop: int | None = None) -> Stream:
        """Run layers stream.layer .. stop-1 on every row -> Stream at layer `stop` (None: past the
        last), the planes of those layers added.

        The one decoder loop: prefill, pruned prefill and decoding all pass here. Rows that a
        layer's cache holds already are attended to: earlier tokens when decoding, the shared prefix
        when measuring information.
        """
        stop = self.num_layers if stop is None else stop
        assert stream.layer <= stop <= self.num_layers, \
            f"stop is {stop}, want {stream.layer}..{self.num_layers}"
        x = stream.x
        queries = stream.queries
        cache = list(stream.cache)
        rope = self.cos_sin(stream.pos, x.dtype)
        for layer in range(stream.layer, stop):
            queries = None                          # only the last layer's are used: free these
            x, queries, cache[layer] = self.model.layers[layer](x, rope, cache[layer])
            if layer < len(stream.planes):
                x = add_to_visual(x, stream.planes[layer], stream.visual, stream.origin)
        return replace(stream, layer=stop, x=x, cache=cache, queries=queries)

    def cos_sin(self, pos: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """Turn positions (3, B, T) into cos and sin (B, T, 1, D).

        Interleaved M-RoPE: frequencies 1, 4, 7, ... turn with the row and 2, 5, 8, ... with the
        column, as many as mrope_section says. The others turn with t. A text token has all three
        alike, which is the ordinary rotary embedding.
        """
        _, rows, cols = self.config.text.mrope_section
        by_row = slice(1, 3 * rows, 3)
        by_col = slice(2, 3 * cols, 3)
        t, y, x = pos[..., None].float() * self.inv_freq                        # (B, T, D/2) each
        angles = t.clone()
        angles[..., by_row] = y[..., by_row]
        angles[..., by_col] = x[..., by_col]
        return signed_cos_sin(angles[:, :, None], dtype)                        # (B, T, 1, D)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    @torch.inference_mode()
    def logits(self, stream: Stream, row: int = -1) -> Tensor:
        """Return (B, vocab) float32, of the token after that row of a stream past the last layer.
        Raises InputError where they are not finite."""
        assert stream.layer == self.num_layers, \
            f"stream is at layer {stream.layer}, want {self.num_layers}"
        logits = self.lm_head(self.final_norm(stream.x[:, row])).float()
        return finite(logits, "logits", stream.x.dtype)

    decode = decode                     # tokprune's, the same for every model

    def append(self, stream: Stream, ids: Tensor) -> Stream:
        """Begin again with new tokens (B, n) only -> Stream at layer 0; the rows before are in the
        cache. None of them is visual: no plane is added to them."""
        x = self.model.embed_tokens(ids)                                        # (B, n, C)
        next_pos = stream.next_pos + ids.shape[1]
        pos = torch.arange(stream.next_pos, next_pos, device=x.device).expand(3, 1, -1)
        return replace(stream, layer=0, x=x, pos=pos, next_pos=next_pos, queries=None, planes=())

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens the model would emit for that answer, which begins a line: no space
        before it."""
        return self.tokenizer.encode(answer).ids


def add_to_visual(x: Tensor, plane: Tensor, visual: tuple[int, int], origin: Tensor) -> Tensor:
    """Add a plane (prompts, N, C) to the visual rows of x (B, T, C). Visual row i is token
    origin[:, i] of the N, and gets that row of the plane."""
    start, V = visual
    B = len(x)
    prompt = torch.arange(B, device=x.device)[:, None] * len(plane) // B
    x = x.clone()
    x[:, start:start + V] += plane[prompt, per_variant(origin, B)]                  # (B, V, C)
    return x


def positions(start: int, grid: tuple[int, int], T: int) -> tuple[Tensor, int]:
    """Return M-RoPE positions (3, T) as t, row, column, and the next one (transformers:
    get_rope_index).

    Text counts on, alike in all three. A visual token (y, x) stands at (start, start + y,
    start + x); text goes on after the image's largest position, so that an image of 10 x 10 tokens
    takes 10 positions.
    """
    rows, cols = grid
    end = start + rows * cols
    shift = max(rows, cols) - rows * cols
    pos = torch.arange(T).repeat(3, 1)
    pos[0, start:end] = start
    pos[1, start:end] = start + torch.arange(rows).repeat_interleave(cols)
    pos[2, start:end] = start + torch.arange(cols).repeat(rows)
    pos[:, end:] += shift
    return pos, T + shift


# ---- Qwen3 decoder -------------------------------------------------------------------------------

class Decoder(nn.Module):
    def __init__(self, c: "TextConfig"):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DecoderLayer(nn.Module):
    def __init__(self, c: "TextConfig"):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, rope, past: KV | None = None):
        """Return x, this layer's queries (B, H, T, D), and the cache of all rows so far."""
        y, q, cache = self.self_attn(self.input_layernorm(x), rope, past)
        y = x + y                                       # the same name: frees attention's output
        return y + self.mlp(self.post_attention_layernorm(y)), q, cache


class Attention(nn.Module):
    """H * D need not equal C. Queries and keys are normalized over D before they are rotated."""

    def __init__(self, c: "TextConfig"):
        super().__init__()
        self.H = c.num_attention_heads
        self.G = c.num_key_value_heads
        self.D = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.D, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.D, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.D, bias=False)
        self.o_proj = nn.Linear(self.H * self.D, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.D, c.rms_norm_eps)
        self.k_norm = RMSNorm(self.D, c.rms_norm_eps)

    def forward(self, x: Tensor, rope, past: KV | None = None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.H, self.D))              # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, self.G, self.D))              # (B, T, G, D)
        v = self.v_proj(x).view(B, T, self.G, self.D).transpose(1, 2)           # (B, G, T, D)
        q = rotate(q, rope).transpose(1, 2)                                     # (B, H, T, D)
        k = rotate(k, rope).transpose(1, 2)                                     # (B, G, T, D)
        cache = KV(k, v) if past is None else past.append(k, v)                 # (B, G, S, D)
        mask = None
        if past is not None and T > 1:          # the cache in full, new rows up to themselves
            mask = causal_mask(T, cache.keys.shape[2], x.device)
        y = F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=mask,
                                           is_causal=past is None, enable_gqa=self.G != self.H)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D)), q, cache


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, C: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(C, width, bias=False)
        self.up_proj = nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x), inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(x)))


class RMSNorm(nn.Module):
    """Normalizes in float32 and rounds before it multiplies by the weight, as the original does."""

    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # of 16-bit input the kernel computes in float32 by itself: two launches fewer
        x32 = x.float() if x.dtype == torch.float64 else x
        return self.weight * F.rms_norm(x32, x.shape[-1:], eps=self.eps).to(x.dtype)


def signed_cos_sin(angles: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin (..., D) of angles (..., D/2) for `rotate`; the first half of sin is
    negated."""
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, rope) -> Tensor:
    """Apply the rotary embedding in LLaMA's half-split form: dimension i turns with i + D/2."""
    cos, sin = rope
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


# ---- vision tower and mergers --------------------------------------------------------------------

class VisionTower(nn.Module):
    """A ViT in which every patch attends to every other. No CLS token. It has two kinds of
    positions: learned ones, resampled to the image's grid, and rotary ones in row and column.

    Patches come token by token in raster order, the 2x2 patches of a token together.
    """

    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.c = c
        patch = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, c.hidden_size, patch)      # used as a matrix product
        self.pos_embed = nn.Embedding(c.num_position_embeddings, c.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = Merger(c)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(c, norm_merged=True) for _ in c.deepstack_visual_indexes)

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, list, Callable]:
        """Turn patches (B, P, 3 * 2 * 16 * 16) into token features (B, V, C), and planes, (B, V, C)
        each.

        Also returns a function -> (B, V) float32: how much the whole image attends to each token in
        the last block. It is costly, and few methods call it.
        """
        proj = self.patch_embed.proj
        rope = self.cos_sin(grid, pixels.device)
        x = F.linear(pixels, proj.weight.flatten(1), proj.bias)         # (B, P, width)
        x = x + self.learned_positions(grid).to(x.dtype)
        planes = []
        branches = list(self.c.deepstack_visual_indexes)
        for i, block in enumerate(self.blocks):
            x, q, k = block(x, rope)
            if i in branches:
                merger = self.deepstack_merger_list[branches.index(i)]
                planes.append(merger(x))
        patches_per_token = self.c.spatial_merge_size ** 2

        def saliency():
            return column_mean(q, k).unflatten(1, (-1, patches_per_token)).mean(2)
        return self.merger(x), planes, saliency

    def learned_positions(self, grid: tuple[int, int]) -> Tensor:
        """Return (P, width) in float32 or wider: the learned square grid, stretched over the
        patches of the image, corners on corners."""
        m = self.c.spatial_merge_size
        side = math.isqrt(self.c.num_position_embeddings)
        table = self.pos_embed.weight
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        table = table.view(side, side, -1).permute(2, 0, 1)[None]       # (1, width, side, side)
        size = (grid[0] * m, grid[1] * m)
        table = F.interpolate(table, size, mode="bilinear", align_corners=True)
        return by_token(table[0].permute(1, 2, 0), m)

    def cos_sin(self, grid: tuple[int, int], device) -> tuple[Tensor, Tensor]:
        """Return cos and sin (P, D) float32: half of the frequencies turn with a patch's row, half
        with its column."""
        D = self.c.hidden_size // self.c.num_heads
        m = self.c.spatial_merge_size
        rows = torch.arange(grid[0] * m, device=device)
        cols = torch.arange(grid[1] * m, device=device)
        y, x = torch.meshgrid(rows, cols, indexing="ij")
        inv_freq = 1e4 ** -(torch.arange(0, D // 2, 2, device=device).float() / (D // 2))
        angles = torch.cat([by_token(place[..., None], m) * inv_freq for place in (y, x)], -1)
        return signed_cos_sin(angles, torch.float32)                    # (P, D)


def column_mean(q: Tensor, k: Tensor) -> Tensor:
    """Return the mean attention that each patch receives, over heads and rows: (B, P) float32. The
    matrix is never held as a whole."""
    keys = k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    total = 0
    for part in q.split(64, 2):                                         # (B, H, 64, D)
        total = total + (part.float() @ keys).softmax(-1).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


class VisionBlock(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.norm2 = nn.LayerNorm(c.hidden_size, 1e-6)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor, rope):
        y, q, k = self.attn(self.norm1(x), rope)
        y = x + y
        return y + self.mlp(self.norm2(y)), q, k


class VisionAttention(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.H = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rope):
        """Return y, and queries and keys (B, H, P, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.H, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, P, D) each
        q = rotate(q.float(), rope).to(v.dtype)
        k = rotate(k.float(), rope).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2)), q, k


class VisionMLP(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.linear_fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger(nn.Module):
    """The 2x2 patches of a token -> a row of the decoder's width. The final merger normalizes each
    patch; those of the planes (norm_merged) normalize the four patches as one row."""

    def __init__(self, c: "VisionConfig", norm_merged: bool = False):
        super().__init__()
        self.width = c.hidden_size * c.spatial_merge_size ** 2
        self.norm_merged = norm_merged
        self.norm = nn.LayerNorm(self.width if norm_merged else c.hidden_size, 1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, c.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_merged:
            x = self.norm(x.view(len(x), -1, self.width))               # (B, V, 4 * width)
        else:
            x = self.norm(x).view(len(x), -1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


# ---- configuration -------------------------------------------------------------------------------

@dataclass
class TextConfig:
    """No defaults for what differs between sizes."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int                       # not hidden_size / heads
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple                # how many of the D/2 frequencies turn with t, row, column
    max_position_embeddings: int = 128000


@dataclass
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int        # of a square grid
    deepstack_visual_indexes: list      # the blocks after which a plane branches off
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2


@dataclass
class Config:
    text: TextConfig
    vision: VisionConfig
    image_token: int = 151655
    tie_word_embeddings: bool = False
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    bounds_from: str = field(default="", repr=False)    # where they stand

    @property
    def factor(self) -> int:
        """Return the side of a visual token in pixels: resized images are multiples of it."""
        return self.vision.patch_size * self.vision.spatial_merge_size


# what a folder may ask for, and what is implemented of it
RULES = [("config.json", "text_config.hidden_act", "silu"),
         ("config.json", "vision_config.hidden_act", "gelu_pytorch_tanh"),
         ("config.json", "vision_config.rope_parameters.rope_theta", 1e4)]


def read_config(path: Path, min_pixels: int | None = None,
                max_pixels: int | None = None) -> Config:
    """Read config.json of a Qwen3-VL folder, as published and as transformers 4 and 5 save it.

    min_pixels, max_pixels: instead of the folder's. Raises InputError.
    """
    raw, text, vision = checkpoint.read_sections(path, "qwen3_vl", RULES, PROMPT)
    bounds = checkpoint.read_bounds(path, min_pixels=min_pixels, max_pixels=max_pixels)
    config = Config(text=checkpoint.fill(TextConfig, text, path),
                    vision=checkpoint.fill(VisionConfig, vision, path),
                    image_token=raw.get("image_token_id", 151655),
                    tie_word_embeddings=raw["tie_word_embeddings"], **bounds)
    c = config.vision
    checkpoint.check_entries(path, checkpoint.processor_rules(
        MEAN, STD, patch_size=[c.patch_size], merge_size=[c.spatial_merge_size],
        temporal_patch_size=[c.temporal_patch_size]))
    return config


# a published shape: for timing without its weights
SHAPES = {"qwen3-8b": (Qwen3, Config(
    TextConfig(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
               num_attention_heads=32, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6,
               rope_theta=5e6, mrope_section=(24, 20, 20)),
    VisionConfig(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16,
                 out_hidden_size=4096, num_position_embeddings=2304,
                 deepstack_visual_indexes=[8, 16, 24])))}


# ---- loading -------------------------------------------------------------------------------------

# the published names, and what transformers holds in memory -> the names here
RENAMES = [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")]
IGNORED = r"rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq"
EOS = [151645, 151643]                  # <|im_end|> and <|endoftext|>


def load(path, device=None, dtype=None, min_pixels: int | None = None,
         max_pixels: int | None = None) -> Qwen3:
    """Load Qwen3-VL from a folder as published: config.json, tokenizer.json, safetensors.

    device: CUDA if there is one, else the CPU. dtype: bfloat16 on CUDA, float32 on the CPU.
    min_pixels, max_pixels: bounds of the resized image, instead of the checkpoint's. The model has
    to fit one device: in bfloat16 2B takes 4 GB, 4B 9 GB, 8B 18 GB, 32B 67 GB.
    Raises InputError.
    """
    config = read_config(Path(path), min_pixels, max_pixels)
    return checkpoint.load(Qwen3, config, path, device, dtype, RENAMES, IGNORED, EOS, IMAGE)
