"""LLaVA-1.5 in one file: prompt, the model and its layer loop, LLaMA decoder, CLIP tower and
projector, padding of the image; then configuration and loading.

`Llava.run` moves a Stream forward by layers and stops wherever it is asked to, so that tokprune can
take visual rows out of it. Everything here is the published model; pruning is not its business.

    B variants of prompts   T rows   S rows with those in the cache   V visual tokens
    C width   H heads   G key/value heads   D head width
"""
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from support import checkpoint
from support.image import CLIP_MEAN, CLIP_STD, normalize
from tokprune import KV, InputError, Stream, causal_mask, decode, finite

IMAGE = "<image>"                       # stands for the image, once in a prompt
# vicuna_v1, the conversation of LLaVA's own evaluation, which has no repetition penalty; no space
# after the last colon
PROMPT = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
          "{question} ASSISTANT:")


# ---- model ---------------------------------------------------------------------------------------

class Llava(nn.Module):
    """LLaVA-1.5 (arXiv 2310.03744). Parameters carry the names of the published checkpoint."""

    def __init__(self, config: "Config", tokenizer: Tokenizer, eos: set[int]):
        super().__init__()
        text = config.text
        self.config = config
        self.tokenizer = tokenizer
        self.eos = eos
        self.num_layers = text.num_hidden_layers
        self.vision_tower = VisionTower(config.vision, config.vision_blocks)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        exponent = torch.arange(0, text.head_dim, 2, dtype=torch.float32, device="cpu")
        inv_freq = 1 / text.rope_theta ** (exponent / text.head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)    # float32 in every dtype

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixels (3, side, side) float32, padded as in LLaVA's own evaluation; the
        processor of the checkpoint crops."""
        return normalize(self.canvas(image), CLIP_MEAN, CLIP_STD)

    def canvas(self, image: Image.Image) -> Image.Image:
        """Return the square image that the visual tokens tile."""
        side = self.config.vision.image_size
        return pad_to_square(image).resize((side, side), Image.BICUBIC)

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
        side = self.config.side
        rows = checkpoint.rows_of_prompt(ids, side * side, self.config)
        return rows, start, (side, side)

    @torch.inference_mode()
    def begin(self, image: Image.Image | Tensor, question: str) -> Stream:
        """Begin a prompt about one image, or its pixels from `preprocess` -> Stream at layer 0,
        B = 1. Raises InputError."""
        pixels = image if isinstance(image, Tensor) else self.preprocess(image)
        embed = self.language_model.embed_tokens
        device = embed.weight.device
        features, saliency = self.vision_tower(pixels[None].to(device, embed.weight.dtype))
        features = self.multi_modal_projector(features)[0]                      # (V, C)
        ids, start = self.tokenize(question)
        V = len(features)
        checkpoint.rows_of_prompt(ids, V, self.config)
        ids = torch.tensor(ids[:start] + V * [ids[start]] + ids[start + 1:], device=device)
        x = embed(ids)                                                          # (T, C)
        x[start:start + V] = features
        T = len(x)
        side = self.config.side
        return Stream(layer=0, x=x[None], pos=torch.arange(T, device=device)[None], next_pos=T,
                      visual=(start, V), origin=torch.arange(V, device=device)[None], N=V,
                      grid=(side, side), cache=[None] * self.num_layers, queries=None,
                      ids=ids[None], embeds=x[None], saliency=functools.cache(saliency))

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
            x, queries, cache[layer] = self.language_model.layers[layer](x, rope, cache[layer])
        return replace(stream, layer=stop, x=x, cache=cache, queries=queries)

    def cos_sin(self, pos: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """Turn positions (B, T) into cos and sin (B, T, 1, D), from angles in float32."""
        angles = pos[..., None, None].float() * self.inv_freq                   # (B, T, 1, D/2)
        return signed_cos_sin(angles, dtype)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.language_model.norm(x)

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
        x = self.language_model.embed_tokens(ids)                               # (B, n, C)
        next_pos = stream.next_pos + ids.shape[1]
        pos = torch.arange(stream.next_pos, next_pos, device=x.device)[None]
        return replace(stream, layer=0, x=x, pos=pos, next_pos=next_pos, queries=None)

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens the model would emit for that answer: after "ASSISTANT:", "Yes" is
        "▁Yes"."""
        return self.tokenizer.encode(answer, add_special_tokens=False).ids


# ---- LLaMA decoder -------------------------------------------------------------------------------

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
        self.mlp = MLP(c)

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
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.D, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.D, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.D, bias=False)
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
    def __init__(self, c: "TextConfig"):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

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


# ---- CLIP vision tower and projector -------------------------------------------------------------

class VisionTower(nn.Module):
    """CLIP ViT up to the feature layer. Blocks after it and post_layernorm are never built."""

    def __init__(self, c: "VisionConfig", blocks: int):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)       # sic, as published
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionBlock(c) for _ in range(blocks))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Turn pixels (B, 3, side, side) into patch features (B, V, width).

        Also returns a function -> (B, V) float32: how much CLS attends to each patch in the last
        block, mean over heads.
        """
        x = self.pre_layrnorm(self.embeddings(pixels))                          # (B, 1+V, width)
        for block in self.encoder.layers:
            x, q, k = block(x)

        def saliency():
            scores = q[:, :, :1].float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
            return scores.softmax(-1).mean(1)[:, 0, 1:]
        return x[:, 1:], saliency


class VisionEmbeddings(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        patches = (c.image_size // c.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)     # (B, V, width), raster
        cls = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight


class VisionBlock(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = VisionAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor):
        """Return x, and queries and keys (B, H, 1+V, D)."""
        y, q, k = self.self_attn(self.layer_norm1(x))
        y = x + y
        return y + self.mlp(self.layer_norm2(y)), q, k


class VisionAttention(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.H = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor):
        q = self.q_proj(x).unflatten(-1, (self.H, -1)).transpose(1, 2)          # (B, H, 1+V, D)
        k = self.k_proj(x).unflatten(-1, (self.H, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.H, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2)), q, k


class VisionMLP(nn.Module):
    def __init__(self, c: "VisionConfig"):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x.mul_(torch.sigmoid_(1.702 * x)))                      # quick GELU


class Projector(nn.Module):
    def __init__(self, c: "Config"):
        super().__init__()
        self.linear_1 = nn.Linear(c.vision.hidden_size, c.text.hidden_size)
        self.linear_2 = nn.Linear(c.text.hidden_size, c.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))                  # exact, not the tanh form


# ---- image ---------------------------------------------------------------------------------------

def pad_to_square(image: Image.Image) -> Image.Image:
    """Return the image in the middle of a square of CLIP's mean color, alpha dropped (LLaVA's
    mm_utils.expand2square)."""
    image = image.convert("RGB")
    side = max(image.size)
    color = tuple(int(m * 255) for m in CLIP_MEAN)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# ---- configuration -------------------------------------------------------------------------------

@dataclass
class TextConfig:
    """The published config.json leaves most of it out; the defaults are LLaVA-1.5-7B's."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0        # 0: as many as heads
    head_dim: int = 0                   # 0: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_position_embeddings: int = 2048

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class VisionConfig:
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5


@dataclass
class Config:
    text: TextConfig
    vision: VisionConfig
    image_token: int = 32000
    tie_word_embeddings: bool = False
    vision_feature_layer: int = -2      # of CLIP: the hidden state behind its last block but one

    @property
    def side(self) -> int:
        """Return how many visual tokens lie side by side."""
        return self.vision.image_size // self.vision.patch_size

    @property
    def vision_blocks(self) -> int:
        """Return how many CLIP blocks run: all of them for -1, 23 of 24 for -2."""
        return self.vision.num_hidden_layers + 1 + self.vision_feature_layer


# what a folder may ask for, and what is implemented of it
RULES = [("config.json", "text_config.model_type", "llama", "mistral"),
         ("config.json", "text_config.hidden_act", "silu"),
         ("config.json", "vision_config.model_type", "clip_vision_model"),
         ("config.json", "vision_config.hidden_act", "quick_gelu"),
         ("config.json", "projector_hidden_act", "gelu"),
         ("config.json", "vision_feature_layer", -2, -1),
         ("config.json", "vision_feature_select_strategy", "default")]
# where transformers' defaults are not LLaMA's
MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
           "sliding_window": 4096}


def read_config(path: Path) -> Config:
    """Read config.json of a LLaVA-1.5 folder, in any form transformers has written it. Raises
    InputError."""
    raw, text, vision = checkpoint.read_sections(path, "llava", RULES, PROMPT)
    window = None
    if text.get("model_type") == "mistral":
        text = MISTRAL | text
        window = text["sliding_window"]
    config = Config(text=checkpoint.fill(TextConfig, text, path),
                    vision=checkpoint.fill(VisionConfig, vision, path),
                    image_token=raw.get("image_token_index", raw.get("image_token_id", 32000)),
                    tie_word_embeddings=raw["tie_word_embeddings"],
                    vision_feature_layer=raw.get("vision_feature_layer", -2))
    if window is not None:
        checkpoint.check_entry(path / "config.json", "sliding_window", window, int)
        if window <= config.side ** 2:
            raise InputError(f"{path}: text_config.sliding_window is {window}, and an image alone "
                             f"has {config.side ** 2} tokens; want a window that no prompt fills")
        # no prompt may reach past it: the attention here has none
        limit = min(window, config.text.max_position_embeddings)
        config.text.max_position_embeddings = limit
    side = config.vision.image_size
    square = {"height": side, "width": side}
    checkpoint.check_entries(path, checkpoint.processor_rules(
        CLIP_MEAN, CLIP_STD, size=[side, square, {"shortest_edge": side}],
        crop_size=[side, square]))
    return config


# a published shape: for timing without its weights
SHAPES = {"llava-7b": (Llava, Config(TextConfig(vocab_size=32064, rms_norm_eps=1e-5),
                                     VisionConfig()))}


# ---- loading -------------------------------------------------------------------------------------

# every layout that transformers 4 and 5 have written -> one set of names
RENAMES = [(r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
           (r"^language_model\.lm_head\.", "lm_head."),
           (r"^language_model\.model\.", "language_model."),
           (r"^vision_tower\.vision_model\.", "vision_tower.")]
IGNORED = r"rotary_emb\.inv_freq|embeddings\.position_ids|post_layernorm"
EOS = [2]                                               # LLaMA's </s>


def load(path, device=None, dtype=None) -> Llava:
    """Load LLaVA-1.5, 7B or 13B, from a folder as published: config.json, tokenizer.json,
    safetensors.

    device: CUDA if there is one, else the CPU. dtype: bfloat16 on CUDA, float32 on the CPU. The
    model has to fit one device: 7B takes 14 GB in bfloat16, 13B 27 GB. Raises InputError.
    """
    config = read_config(Path(path))
    # a last block that is never built
    ignored = rf"{IGNORED}|vision_tower\.encoder\.layers\.{config.vision_blocks}\."
    return checkpoint.load(Llava, config, path, device, dtype, RENAMES, ignored, EOS, IMAGE,
                           first="<s>")
