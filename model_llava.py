"""LLaVA-1.5 in one file: prompt, the model and its layer loop, LLaMA decoder, CLIP tower and
projector, image; then configuration and loading.

`Llava.run` moves a Stream forward by layers and stops wherever it is asked to, so that tokprune can
take visual rows out of it. Everything here is the published model; pruning is not its business.

    B variants of one prompt   T rows   S rows with those in the cache   V visual tokens
    C width   H heads   G key/value heads   D head width
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from support import checkpoint
from support.files import read_json
from tokprune import KV, InputError, Stream, decode

# vicuna_v1, the conversation of LLaVA's own evaluation; no blank after the last colon
PROMPT = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
          "{question} ASSISTANT:")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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

    def preprocess(self, image: Image.Image, mode: str = "pad") -> Tensor:
        """(3, side, side) float32. `pad`: LLaVA's own evaluation; `crop`: the published processor.
        """
        assert mode in ("pad", "crop"), f"mode is {mode!r}"
        return normalize(self.canvas(image, mode))

    def canvas(self, image: Image.Image, mode: str = "pad") -> Image.Image:
        """The square image that the visual tokens tile."""
        size = self.config.vision.image_size
        image = pad_to_square(image) if mode == "pad" else on_white(image)
        return center_crop(resize_shortest_edge(image, size), size)

    @torch.inference_mode()
    def begin(self, image: Image.Image | Tensor, question: str) -> Stream:
        """A prompt about one image, or its pixels from `preprocess` -> Stream at layer 0, B = 1."""
        pixels = image if isinstance(image, Tensor) else self.preprocess(image)
        embed = self.language_model.embed_tokens
        device = embed.weight.device
        features, saliency = self.vision_tower(pixels[None].to(device, embed.weight.dtype))
        features = self.multi_modal_projector(features)[0]                      # (V, C)
        ids = self.tokenizer.encode(PROMPT.format(question=question)).ids
        places = [i for i, token in enumerate(ids) if token == self.config.image_token]
        if len(places) != 1:
            raise InputError(f"prompt holds {len(places)} <image> tokens (id "
                             f"{self.config.image_token}), want 1: {question!r}")
        start = places[0]
        V = len(features)
        ids = torch.tensor(ids[:start] + V * [ids[start]] + ids[start + 1:], device=device)
        x = embed(ids)                                                          # (T, C)
        x[start:start + V] = features
        T = len(x)
        side = self.config.vision.image_size // self.config.vision.patch_size
        return Stream(layer=0, x=x[None], pos=torch.arange(T, device=device)[None], next_pos=T,
                      visual=(start, V), origin=torch.arange(V, device=device)[None], N=V,
                      grid=(side, side), cache=[None] * self.num_layers, queries=None, ids=ids,
                      embeds=x, saliency=lambda: saliency()[0])

    @torch.inference_mode()
    def run(self, stream: Stream, stop: int | None = None) -> Stream:
        """Layers stream.layer .. stop-1 on every row -> Stream at layer `stop` (None: past the
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
        """Positions (B, T) -> cos and sin (B, 1, T, D), from angles in float32."""
        angles = pos[:, None, :, None].float() * self.inv_freq                  # (B, 1, T, D/2)
        return signed_cos_sin(angles, dtype)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.language_model.norm(x)

    @torch.inference_mode()
    def logits(self, stream: Stream, row: int = -1) -> Tensor:
        """(B, vocab) float32, of the token after that row of a stream past the last layer."""
        assert stream.layer == self.num_layers, \
            f"stream is at layer {stream.layer}, want {self.num_layers}"
        return self.lm_head(self.final_norm(stream.x[:, row])).float()

    decode = decode                     # tokprune's, the same for every model

    def append(self, stream: Stream, ids: Tensor) -> Stream:
        """New tokens (B, n) alone -> Stream at layer 0; the rows before are in the cache."""
        x = self.language_model.embed_tokens(ids)                               # (B, n, C)
        next_pos = stream.next_pos + ids.shape[1]
        pos = torch.arange(stream.next_pos, next_pos, device=x.device)[None]
        return replace(stream, layer=0, x=x, pos=pos, next_pos=next_pos, queries=None)

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens the model would emit for that answer; "Yes" after "ASSISTANT:" is "▁Yes"."""
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
        """-> x, this layer's queries (B, H, T, D), and the cache of all rows so far."""
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
        q = self.q_proj(x).view(B, T, self.H, self.D).transpose(1, 2)           # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.G, self.D).transpose(1, 2)           # (B, G, T, D)
        v = self.v_proj(x).view(B, T, self.G, self.D).transpose(1, 2)           # (B, G, T, D)
        q = rotate(q, rope)
        k = rotate(k, rope)
        cache = KV(k, v) if past is None else past.append(k, v)                 # (B, G, S, D)
        mask = None
        if past is not None and T > 1:          # new rows are causal among themselves alone
            # imported here: it takes as long as torch itself, and most runs need no mask
            from torch.nn.attention.bias import causal_lower_right
            mask = causal_lower_right(T, cache.keys.shape[2])
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
    """Normalises in float32 and rounds before it multiplies by the weight, as the original does."""

    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def signed_cos_sin(angles: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """(..., D/2) -> cos and sin (..., D) for `rotate`; the first half of sin is negated."""
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, rope) -> Tensor:
    """Rotary embedding in LLaMA's half-split form: dimension i turns with i + D/2."""
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
        """(B, 3, side, side) -> patch features (B, V, width), and a function that returns (B, V)
        float32: how much CLS attends to each patch in the last block, mean over heads."""
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
        """-> x, and queries and keys (B, H, 1+V, D)."""
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
    """The image in the middle of a square of CLIP's mean colour, alpha dropped (LLaVA's
    mm_utils.expand2square)."""
    image = image.convert("RGB")
    side = max(image.size)
    colour = tuple(int(m * 255) for m in CLIP_MEAN)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as in transformers 5 (transformers 4 drops alpha)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def resize_shortest_edge(image: Image.Image, size: int) -> Image.Image:
    long = int(size * max(image.size) / min(image.size))
    shape = (size, long) if image.width <= image.height else (long, size)
    return image.resize(shape, Image.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def normalize(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) float32, rounded step by step as the PIL processors of transformers do."""
    x = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    x = (x - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())


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
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

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
    hidden_act: str = "quick_gelu"


@dataclass
class Config:
    text: TextConfig
    vision: VisionConfig
    image_token: int = 32000
    tie_word_embeddings: bool = False
    vision_feature_layer: int = -2

    @property
    def vision_blocks(self) -> int:
        """How many CLIP blocks run: hidden state 0 lies before the first, so -2 of 24 is 23."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer


def read_config(path: Path) -> Config:
    """config.json of a LLaVA-1.5 folder, in any form transformers has written it. Raises
    InputError."""
    file = path / "config.json"
    raw = read_json(file)
    if "mm_vision_tower" in raw:
        raise InputError(f"{path}: original LLaVA layout (its own key names, no vision tower "
                         "inside); want the converted folder, e.g. llava-hf/llava-1.5-7b-hf")
    if raw.get("model_type") != "llava":
        raise InputError(f"{file}: model_type is {raw.get('model_type')!r}, want 'llava'")
    raw = {key: value for key, value in raw.items() if value is not None}       # null is left out
    text = checkpoint.section(raw, "text_config", file)
    vision = checkpoint.section(raw, "vision_config", file)
    old_rope = checkpoint.section(text, "rope_scaling", file)                   # transformers 4
    new_rope = checkpoint.section(text, "rope_parameters", file)                # transformers 5
    if new_rope.get("rope_theta") is not None:
        text = text | {"rope_theta": new_rope["rope_theta"]}
    config = Config(text=checkpoint.fill(TextConfig, text, path),
                    vision=checkpoint.fill(VisionConfig, vision, path),
                    image_token=raw.get("image_token_index", raw.get("image_token_id", 32000)),
                    tie_word_embeddings=checkpoint.is_tied(raw, text),
                    vision_feature_layer=raw.get("vision_feature_layer", -2))
    check_config(path, config, raw, [old_rope, new_rope])
    return config


def check_config(path: Path, config: Config, raw: dict, ropes: list[dict]):
    text = config.text
    vision = config.vision
    rules = [("rope type", rope.get("rope_type", rope.get("type", "default")), "default")
             for rope in ropes]
    strategy = raw.get("vision_feature_select_strategy", "default")
    checkpoint.check_values(path, rules + [
        ("text hidden_act", text.hidden_act, "silu"),
        ("attention_bias", text.attention_bias, False),
        ("mlp_bias", text.mlp_bias, False),
        ("heads % key/value heads", text.num_attention_heads % text.num_key_value_heads, 0),
        ("vision hidden_act", vision.hidden_act, "quick_gelu"),
        ("vision hidden_size % heads", vision.hidden_size % vision.num_attention_heads, 0),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), "gelu"),
        ("vision_feature_select_strategy", strategy, "default")])
    layer = config.vision_feature_layer
    if type(layer) is not int or not 1 <= config.vision_blocks <= vision.num_hidden_layers:
        raise InputError(f"{path}/config.json: vision_feature_layer is {layer!r}, of "
                         f"{vision.num_hidden_layers} layers; want one after the first block")


# ---- loading -------------------------------------------------------------------------------------

# every layout that transformers 4 and 5 have written -> one set of names
RENAMES = [(r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
           (r"^language_model\.lm_head\.", "lm_head."),
           (r"^language_model\.model\.", "language_model."),
           (r"^vision_tower\.vision_model\.", "vision_tower.")]
IGNORED = r"rotary_emb\.inv_freq|embeddings\.position_ids|post_layernorm"
EOS = [2]                                               # LLaMA's </s>


def load(path, device=None, dtype=None) -> Llava:
    """LLaVA-1.5, 7B or 13B, from a folder as published: config.json, tokenizer.json, safetensors.

    device: CUDA if there is one, else the CPU. dtype: bfloat16 on CUDA, float32 on the CPU. The
    model has to fit one device: 7B takes 14 GB in bfloat16, 13B 27 GB. Raises InputError.
    """
    path = Path(path)
    checkpoint.check_folder(path)
    device, dtype = checkpoint.device_and_dtype(device, dtype)
    config = read_config(path)
    tokenizer = checkpoint.read_tokenizer(path)
    model = checkpoint.empty(Llava, config, tokenizer, checkpoint.read_eos(path, EOS))
    unused = range(config.vision_blocks, config.vision.num_hidden_layers)
    ignored = IGNORED
    for block in unused:                                # after the feature layer, never built
        ignored += rf"|vision_tower\.encoder\.layers\.{block}\."
    tied = None
    if config.tie_word_embeddings:
        tied = ("language_model.embed_tokens.weight", "lm_head.weight")
    checkpoint.load_weights(model, path, device, dtype, RENAMES, ignored, tied)
    return model.eval().requires_grad_(False)
