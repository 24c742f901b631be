"""Qwen2.5-VL in one file: prompt, the model and its layer loop, Qwen2 decoder, window-attention
tower and merger; then configuration and loading.

`Qwen.run` moves a Stream forward by layers and stops wherever it is asked to, so that tokprune can
take visual rows out of it. Everything here is the published model; pruning is not its business.

    B variants of prompts   T rows   S rows with those in the cache   V visual tokens   P patches
    C width   H heads   G key/value heads   D head width
"""
import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from support import checkpoint
from support.image import (CLIP_MEAN, CLIP_STD, by_token, normalize, on_white, patchify,
                           smart_resize)
from tokprune import KV, InputError, Stream, causal_mask, decode, finite

IMAGE = "<|image_pad|>"                 # stands for the image, once in a prompt
# the chat template of the checkpoint for one user turn: image first, no BOS, ends with a newline;
# the published generation_config.json has a repetition penalty of 1.05
PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
          "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
          "<|im_start|>assistant\n")


# ---- model ---------------------------------------------------------------------------------------

class Qwen(nn.Module):
    """Qwen2.5-VL (arXiv 2502.13923). Parameters carry the names of the published checkpoint."""

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
        """Return patches (P, 3 * 2 * 14 * 14) float32, and the grid of visual tokens (rows,
        columns)."""
        c = self.config.vision
        pixels = normalize(self.canvas(image), CLIP_MEAN, CLIP_STD)
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
        features, saliency = self.visual(pixels[None].to(device, embed.weight.dtype), grid)
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
                      embeds=x[None], saliency=functools.cache(saliency))

    @torch.inference_mode()
    def run(self, stream: Stream, stop: int | None = None) -> Stream:
        """Run layers stream.layer .. stop-1 on every row -> Stream at layer `stop` (None: past the
        last).

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
        return replace(stream, layer=stop, x=x, cache=cache, queries=queries)

    def cos_sin(self, pos: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """Turn positions (3, B, T) into cos and sin (B, T, 1, D).

        M-RoPE: the first frequencies turn with t, the next with the row, the last with the column.
        A text token has all three alike, which is the ordinary rotary embedding.
        """
        angles = pos[..., None].float() * self.inv_freq                         # (3, B, T, D/2)
        parts = angles.split(list(self.config.text.mrope_section), -1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
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
        cache."""
        x = self.model.embed_tokens(ids)                                        # (B, n, C)
        next_pos = stream.next_pos + ids.shape[1]
        pos = torch.arange(stream.next_pos, next_pos, device=x.device).expand(3, 1, -1)
        return replace(stream, layer=0, x=x, pos=pos, next_pos=next_pos, queries=None)

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens the model would emit for that answer, which begins a line: no space
        before it."""
        return self.tokenizer.encode(answer).ids


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


# ---- Qwen2 decoder -------------------------------------------------------------------------------

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
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor, rope, past: KV | None = None):
        """Return x, this layer's queries (B, H, T, D), and the cache of all rows so far."""
        y, q, cache = self.self_attn(self.input_layernorm(x), rope, past)
        y = x + y                                       # the same name: frees attention's output
        return y + self.mlp(self.post_attention_layernorm(y)), q, cache


class Attention(nn.Module):
    def __init__(self, c: "TextConfig"):
        super().__init__()
        self.H = c.num_attention_heads
        self.G = c.num_key_value_heads
        self.D = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.D)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.D)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.D)
        self.o_proj = nn.Linear(self.H * self.D, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, past: KV | None = None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D)
        k = self.k_proj(x).view(B, T, self.G, self.D)
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
    """SwiGLU: in the decoder and, with biases, in the tower."""

    def __init__(self, C: int, width: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(C, width, bias)
        self.up_proj = nn.Linear(C, width, bias)
        self.down_proj = nn.Linear(width, C, bias)

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


# ---- vision tower and merger ---------------------------------------------------------------------

class VisionTower(nn.Module):
    """A ViT whose blocks attend within windows, a few excepted. No CLS token and no learned
    positions: rotary in row and column.

    Patches come token by token in raster order, the 2x2 patches of a token together. The original
    sorts patches by window, and sorts the tokens back after the merger. Here a window is a set of
    indices.
    """

    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.c = c
        patch = (3, c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Module()     # the published Conv3d, used as a matrix product
        self.patch_embed.proj.weight = nn.Parameter(torch.zeros(c.hidden_size, *patch))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = Merger(c)

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Callable]:
        """Turn patches (B, P, 3 * 2 * 14 * 14) into token features (B, V, C).

        Also returns a function -> (B, V) float32: how much the whole image attends to each token in
        the last block of full attention, or the last one. It is costly, and few methods call it.
        """
        m = self.c.spatial_merge_size
        side = self.c.window_size // self.c.patch_size // m             # of a window, in tokens
        window = windows(grid, side, m * m, pixels.device)
        rope = self.cos_sin(grid, pixels.device)
        full_blocks = self.c.fullatt_block_indexes
        scored = max((i for i in full_blocks if i < len(self.blocks)), default=len(self.blocks) - 1)
        x = F.linear(pixels, self.patch_embed.proj.weight.flatten(1))   # (B, P, width)
        for i, block in enumerate(self.blocks):
            x, q, k = block(x, rope, None if i in full_blocks else window)
            if i == scored:
                last = q, k

        def saliency():
            return column_mean(*last).unflatten(1, (-1, m * m)).mean(2)
        return self.merger(x), saliency

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


def windows(grid: tuple[int, int], side: int, patches: int, device) -> tuple:
    """Tell which of the P patches share a window of side x side tokens.

    patches: how many a token has. W windows of K patches -> index (W, K) of the patches in each
    window; place (P,) of each patch among these W * K; mask (W, 1, K), False where a window at the
    right or bottom edge has no patch, None if all are whole.
    """
    rows, cols = grid
    y = torch.arange(-(-rows // side) * side, device=device)[:, None]
    x = torch.arange(-(-cols // side) * side, device=device)
    token = (y * cols + x).masked_fill((y >= rows) | (x >= cols), -1)
    token = token.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
    token = token.reshape(-1, side * side)                              # (W, tokens)
    mask = (token >= 0).repeat_interleave(patches, 1)                   # (W, K)
    first = token.clamp(min=0)[..., None] * patches
    index = (first + torch.arange(patches, device=device)).flatten(1)
    filled = mask.flatten().nonzero()[:, 0]
    place = filled[index.flatten()[filled].argsort()]
    return index, place, None if mask.all() else mask[:, None]


def column_mean(q: Tensor, k: Tensor) -> Tensor:
    """Return the mean attention that each patch receives, over heads and rows: (B, P) float32. The
    matrix is never held as a whole."""
    keys = k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    total = 0
    for part in q.split(64, 2):                                         # (B, H, 64, D)
        total = total + (part.float() @ keys).softmax(-1).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


def pad_width(mlp: MLP, incompatible_keys):
    """Widen an MLP that was loaded to a GPU by zeros, which change no sum: its fast kernels want a
    multiple of 8, and the published width of the tower is 3,420. The arguments are those of a hook
    of load_state_dict."""
    room = -mlp.gate_proj.out_features % 8
    if not room or mlp.gate_proj.weight.device.type != "cuda":
        return
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(F.pad(linear.weight, (0, 0, 0, room)))
        linear.bias = nn.Parameter(F.pad(linear.bias, (0, room)))
    mlp.down_proj.weight = nn.Parameter(F.pad(mlp.down_proj.weight, (0, room)))


class VisionBlock(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.norm1 = RMSNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.norm2 = RMSNorm(c.hidden_size, 1e-6)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=True)
        self.mlp.register_load_state_dict_post_hook(pad_width)

    def forward(self, x: Tensor, rope, window=None):
        y, q, k = self.attn(self.norm1(x), rope, window)
        y = x + y
        return y + self.mlp(self.norm2(y)), q, k


class VisionAttention(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.H = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rope, window=None):
        """Attend to all patches or, given windows, within each. -> y, and queries and keys
        (B, H, P, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.H, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, P, D) each
        q = rotate(q.float(), rope).to(v.dtype)
        k = rotate(k.float(), rope).to(v.dtype)
        if window is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            index, place, mask = window
            q_in = q[:, :, index].flatten(0, 1)                         # (B*H, W, K, D)
            k_in = k[:, :, index].flatten(0, 1)
            v_in = v[:, :, index].flatten(0, 1)
            y = F.scaled_dot_product_attention(q_in, k_in, v_in, attn_mask=mask)
            y = y.flatten(1, 2).unflatten(0, q.shape[:2])[:, :, place]  # (B, H, P, D)
        return self.proj(y.transpose(1, 2).flatten(2)), q, k


class Merger(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.width = c.hidden_size * c.spatial_merge_size ** 2
        self.ln_q = RMSNorm(c.hidden_size, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(),
                                 nn.Linear(self.width, c.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x).view(len(x), -1, self.width)                   # (B, V, 4 * width)
        return self.mlp(x)


# ---- configuration -------------------------------------------------------------------------------

@dataclass
class TextConfig:
    """No defaults for what differs between sizes: transformers' defaults are the 72B's."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    mrope_section: tuple                # how many of the D/2 frequencies turn with t, row, column
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass
class VisionConfig:
    """transformers 4.49 leaves out what equals its defaults, most of the 7B."""
    hidden_size: int
    depth: int = 32
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    patch_size: int = 14
    window_size: int = 112              # pixels
    fullatt_block_indexes: tuple = (7, 15, 23, 31)      # every other block attends within windows
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
         ("config.json", "hidden_act", "silu"),
         ("config.json", "text_config.use_sliding_window", False),
         ("config.json", "use_sliding_window", False),
         ("config.json", "vision_config.hidden_act", "silu"),
         ("config.json", "vision_config.rope_parameters.rope_theta", 1e4)]


def read_config(path: Path, min_pixels: int | None = None,
                max_pixels: int | None = None) -> Config:
    """Read config.json of a Qwen2.5-VL folder, in any form transformers has written it.

    min_pixels, max_pixels: instead of the folder's. Raises InputError.
    """
    raw, text, vision = checkpoint.read_sections(path, "qwen2_5_vl", RULES, PROMPT)
    bounds = checkpoint.read_bounds(path, min_pixels=min_pixels, max_pixels=max_pixels)
    config = Config(text=checkpoint.fill(TextConfig, text, path),
                    vision=checkpoint.fill(VisionConfig, vision, path),
                    image_token=raw.get("image_token_id", 151655),
                    tie_word_embeddings=raw["tie_word_embeddings"], **bounds)
    c = config.vision
    checkpoint.check_entries(path, checkpoint.processor_rules(
        CLIP_MEAN, CLIP_STD, patch_size=[c.patch_size], merge_size=[c.spatial_merge_size],
        temporal_patch_size=[c.temporal_patch_size]))
    return config


# a published shape: for timing without its weights
SHAPES = {"qwen-7b": (Qwen, Config(
    TextConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6,
               mrope_section=(16, 24, 24)),
    VisionConfig(hidden_size=1280)))}


# ---- loading -------------------------------------------------------------------------------------

# from what transformers 4 and 5 hold in memory -> the published names
RENAMES = [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")]
IGNORED = r"rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq"
EOS = [151645, 151643]                  # <|im_end|> and <|endoftext|>


def load(path, device=None, dtype=None, min_pixels: int | None = None,
         max_pixels: int | None = None) -> Qwen:
    """Load Qwen2.5-VL from a folder as published: config.json, tokenizer.json, safetensors.

    device: CUDA if there is one, else the CPU. dtype: bfloat16 on CUDA, float32 on the CPU.
    min_pixels, max_pixels: bounds of the resized image, instead of the checkpoint's. The model has
    to fit one device: in bfloat16 3B takes 8 GB, 7B 17 GB, 32B 67 GB; 72B does not fit 80 GB.
    Raises InputError.
    """
    config = read_config(Path(path), min_pixels, max_pixels)
    return checkpoint.load(Qwen, config, path, device, dtype, RENAMES, IGNORED, EOS, IMAGE)
