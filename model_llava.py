"""LLaVA-1.5 in one file: config, LLaMA decoder, CLIP tower, projector, image, prompt, load.

The decoder loop is `Llava.run`: it moves a Stream forward by layers and stops wherever you ask, so that
tokprune can take visual rows out of it. Everything here is the published model; pruning is not its business.

    B variants of one prompt   T rows   V visual tokens   C width   H heads   G key/value heads   D head width   L layers
"""
import json
import re
from dataclasses import dataclass, replace
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

# vicuna_v1, the conversation of LLaVA's own evaluation; no blank after the last colon
PROMPT = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# ---- config -----------------------------------------------------------------------------------------------------

@dataclass
class TextConfig:
    """Defaults are what the published config.json leaves out (LLaVA-1.5-7B); 13B states its own."""
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
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"

    @property
    def vision_blocks(self) -> int:
        """How many CLIP blocks run. Hidden state 0 is before the first block, so -2 of 24 blocks means 23."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer


def read_config(path: Path) -> Config:
    """config.json of a LLaVA-1.5 folder, in any form transformers has written it. Raises InputError."""
    raw = read_json(path / "config.json")
    if "mm_vision_tower" in raw:
        raise InputError(f"{path}: original LLaVA layout (its own key names, no vision tower inside); "
                         "use the converted folder instead, e.g. llava-hf/llava-1.5-7b-hf")
    if raw.get("model_type") != "llava":
        raise InputError(f"{path}/config.json: model_type is {raw.get('model_type')!r}, want 'llava'")
    text, vision = section(raw, "text_config", path), section(raw, "vision_config", path)
    old, new = section(text, "rope_scaling", path), section(text, "rope_parameters", path)      # transformers 4 and 5
    config = Config(
        text=TextConfig(**known(TextConfig, text, path)),
        vision=VisionConfig(**known(VisionConfig, vision, path)),
        image_token=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        # transformers 4.57 writes the flag into text_config alone
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        **known(Config, raw, path, "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"))
    config.text.rope_theta = known(TextConfig, new, path, "rope_theta").get("rope_theta", config.text.rope_theta)
    for name, found, want in [
            ("rope type", old.get("rope_type", old.get("type", "default")), "default"),
            ("rope type", new.get("rope_type", new.get("type", "default")), "default"),
            ("text hidden_act", config.text.hidden_act, "silu"),
            ("attention_bias", config.text.attention_bias, False),
            ("mlp_bias", config.text.mlp_bias, False),
            ("vision hidden_act", config.vision.hidden_act, "quick_gelu"),
            ("heads % key/value heads", config.text.num_attention_heads % config.text.num_key_value_heads, 0),
            ("vision hidden_size % heads", config.vision.hidden_size % config.vision.num_attention_heads, 0),
            ("projector_hidden_act", config.projector_hidden_act, "gelu"),
            ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default")]:
        if found != want:
            raise InputError(f"{path}/config.json: {name} is {found!r}; LLaVA-1.5 has {want!r}, nothing else is implemented")
    if not 1 <= config.vision_blocks <= config.vision.num_hidden_layers:
        raise InputError(f"{path}/config.json: vision_feature_layer {config.vision_feature_layer} of "
                         f"{config.vision.num_hidden_layers} layers; want one after the first block")
    return config


def known(cls, raw: dict, path: Path, *names) -> dict:
    """The entries of raw that cls has a field for, of the field's type; null means left out."""
    found = {k: v for k, v in raw.items() if k in (names or cls.__dataclass_fields__) and v is not None}
    for name, value in found.items():
        default = cls.__dataclass_fields__[name].default
        kind = (int, float) if type(default) is float else type(default)
        if not isinstance(value, kind) or (type(default) is int and default >= 0 and value < 1):
            raise InputError(f"{path}/config.json: {name} is {value!r}, want the like of {default!r}")
    return found


def section(raw: dict, name: str, path: Path) -> dict:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}/config.json: {name} is {value!r}, want an object")
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

class Llava(nn.Module):
    """LLaVA-1.5 (arXiv 2310.03744). Parameters carry the names of the published checkpoint."""

    def __init__(self, config: Config, tokenizer: Tokenizer, eos: set):
        super().__init__()
        self.config, self.tokenizer, self.eos = config, tokenizer, eos
        self.num_layers = config.text.num_hidden_layers
        self.vision_tower = VisionTower(config.vision, config.vision_blocks)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        half = torch.arange(0, config.text.head_dim, 2, dtype=torch.float32, device="cpu") / config.text.head_dim
        # stays float32: `load` casts the weights alone
        self.register_buffer("inv_freq", 1 / config.text.rope_theta ** half, persistent=False)

    def preprocess(self, image: Image.Image, mode: str = "pad") -> Tensor:
        """PIL image -> (3, S, S) float32. `pad`: LLaVA's own evaluation; `crop`: the published processor config."""
        return normalize(self.canvas(image, mode))

    def canvas(self, image: Image.Image, mode: str = "pad") -> Image.Image:
        """The S x S image that the visual tokens tile."""
        size = self.config.vision.image_size
        image = pad_to_square(image) if mode == "pad" else on_white(image)
        return center_crop(resize_shortest_edge(image, size), size)

    @torch.inference_mode()
    def begin(self, image: Image.Image | Tensor, question: str) -> Stream:
        """A prompt about one image (or its pixels from `preprocess`) -> Stream at the input of layer 0, B = 1."""
        pixels = image if isinstance(image, Tensor) else self.preprocess(image)
        embed = self.language_model.embed_tokens
        device, dtype = embed.weight.device, embed.weight.dtype
        features, saliency = self.vision_tower(pixels[None].to(device, dtype))
        features = self.multi_modal_projector(features)[0]                         # (V, C)
        ids = self.tokenizer.encode(PROMPT.format(question=question)).ids
        places = [i for i, token in enumerate(ids) if token == self.config.image_token]
        if len(places) != 1:
            raise InputError(f"prompt holds {len(places)} <image> tokens (id {self.config.image_token}), want 1: {question!r}")
        start, V = places[0], len(features)
        ids = torch.tensor(ids[:start] + [ids[start]] * V + ids[start + 1:], device=device)
        x = embed(ids)                                                             # (T, C)
        x[start:start + V] = features
        T, side = len(x), self.config.vision.image_size // self.config.vision.patch_size
        return Stream(layer=0, x=x[None], pos=torch.arange(T, device=device)[None], next_pos=T, visual=(start, V),
                      origin=torch.arange(V, device=device)[None], grid=(side, side), cache=[None] * self.num_layers,
                      queries=None, ids=ids, embeds=x, saliency=lambda: saliency()[0])

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
            x, q, cache[layer] = self.language_model.layers[layer](x, rope, past=cache[layer])
        return replace(stream, layer=stop, x=x, cache=cache, queries=q)

    def rope(self, pos: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """Positions (B, T) -> cos and sin (B, 1, T, D), angles in float32."""
        angles = pos[:, None, :, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.language_model.norm(x)

    @torch.inference_mode()
    def logits(self, stream: Stream) -> Tensor:
        """(B, vocab) float32 logits of the next token; the stream must be past the last layer."""
        assert stream.layer == self.num_layers, f"stream is at layer {stream.layer}, want {self.num_layers}"
        return self.lm_head(self.final_norm(stream.x[:, -1])).float()

    @torch.inference_mode()
    def decode(self, stream: Stream, max_new_tokens: int = 16, repetition_penalty: float = 1.0) -> list[str]:
        """Greedy answers of the B variants, through each layer's own cache. Stops when all have ended.

        repetition_penalty: logits of every token of prompt or answer are divided by it, negative ones multiplied, as in
        transformers; 1 changes nothing and is what LLaVA is evaluated with.
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
        x = self.language_model.embed_tokens(ids)                                  # (B, n, C)
        after = stream.next_pos + ids.shape[1]
        return replace(stream, layer=0, x=x, pos=torch.arange(stream.next_pos, after, device=x.device)[None], next_pos=after,
                       queries=None)

    def answer(self, image: Image.Image, question: str, schedule=None, max_new_tokens: int = 16) -> str:
        """The greedy answer; schedule as `tokprune.parse_schedule` returns it."""
        return self.decode(prefill(self, self.begin(image, question), schedule or []), max_new_tokens)[0]

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens the model would emit for that answer; "Yes" after "ASSISTANT:" is the token "▁Yes"."""
        return self.tokenizer.encode(answer, add_special_tokens=False).ids

    def answer_id(self, answer: str) -> int:
        """The first of them."""
        return self.answer_ids(answer)[0]


# ---- LLaMA decoder ----------------------------------------------------------------------------------------------

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
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope, past=None, mask=None):
        """-> x, this layer's queries, (keys, values) of everything seen so far."""
        y, q, kv = self.self_attn(self.input_layernorm(x), rope, past, mask)
        y = x + y                                       # y again: attention's output is let go
        return y + self.mlp(self.post_attention_layernorm(y)), q, kv


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.H, self.G, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.D, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.D, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.D, bias=False)
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
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

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


# ---- CLIP vision tower and projector ----------------------------------------------------------------------------

class VisionTower(nn.Module):
    """CLIP ViT up to the feature layer: the last block and post_layernorm of the checkpoint are never built."""

    def __init__(self, c: VisionConfig, blocks: int):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)          # sic, the checkpoint's spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionBlock(c) for _ in range(blocks))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """(B, 3, S, S) -> patch features (B, V, width), and a function that returns (B, V) float32: how much CLS attends to
        each in the last block."""
        x = self.pre_layrnorm(self.embeddings(pixels))                             # (B, 1+V, width)
        for block in self.encoder.layers:
            x, q, k = block(x)

        def saliency():
            cls = (q[:, :, :1].float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)   # (B, H, 1, 1+V)
            return cls.mean(1)[:, 0, 1:]
        return x[:, 1:], saliency


class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)                # (B, V, width), raster order
        cls = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = VisionAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor):
        y, q, k = self.self_attn(self.layer_norm1(x))
        y = x + y
        return y + self.mlp(self.layer_norm2(y)), q, k


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.H = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor):
        q, k, v = (p(x).unflatten(-1, (self.H, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)                                # (B, H, 1+V, D)
        return self.out_proj(y.transpose(1, 2).flatten(2)), q, k


class VisionMLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x.mul_(torch.sigmoid_(1.702 * x)))                         # quick GELU


class Projector(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.linear_1 = nn.Linear(c.vision.hidden_size, c.text.hidden_size)
        self.linear_2 = nn.Linear(c.text.hidden_size, c.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))                             # exact GELU, not the tanh form


# ---- image ------------------------------------------------------------------------------------------------------

def pad_to_square(image: Image.Image) -> Image.Image:
    """LLaVA mm_utils.expand2square: the image in the middle of a square of CLIP's mean colour. Alpha is dropped."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in CLIP_MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as in transformers 5 (transformers 4 dropped alpha)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def resize_shortest_edge(image: Image.Image, size: int) -> Image.Image:
    w, h = image.size
    short, long = min(w, h), max(w, h)
    long = int(size * long / short)
    return image.resize((size, long) if w <= h else (long, size), Image.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def normalize(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32, rounded step by step as the PIL processors of transformers do."""
    x = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    x = (x - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())


# ---- load -------------------------------------------------------------------------------------------------------

# From every layout transformers 4 and 5 have written to one set of names, applied in order.
RENAMES = [(r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
           (r"^language_model\.lm_head\.", "lm_head."),
           (r"^language_model\.model\.", "language_model."),
           (r"^vision_tower\.vision_model\.", "vision_tower.")]
IGNORED = r"rotary_emb\.inv_freq|embeddings\.position_ids|post_layernorm"          # in checkpoints, of no use here


def load(path, device=None, dtype=None) -> Llava:
    """LLaVA-1.5 from a folder as published (config.json, tokenizer.json, *.safetensors or index + shards).

    device: cuda if there is one, else cpu. dtype: bfloat16 on cuda, float32 on cpu. Raises InputError.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; want a checkpoint folder with config.json and *.safetensors")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.backends.cudnn.allow_tf32 = False             # on by default: the patch embedding would not be float32
    config = read_config(path)
    with torch.device("meta"):
        model = Llava(config, read_tokenizer(path), read_eos(path))
    load_weights(model, path, device, dtype)
    return model.eval().requires_grad_(False)


def load_weights(model: Llava, path: Path, device, dtype):
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
            elif not (re.search(IGNORED, name) or is_unused_block(model, name)):
                raise InputError(f"{shard}: unknown tensor {key}")
    embed, head = "language_model.embed_tokens.weight", "lm_head.weight"
    if model.config.tie_word_embeddings and (embed in found) != (head in found):
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


def is_unused_block(model: Llava, name: str) -> bool:
    block = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    return block is not None and int(block[1]) >= model.config.vision_blocks


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
        raise InputError(f"{file}: not found; a folder with tokenizer.model alone must be converted first")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:                              # tokenizers raises a bare Exception
        raise InputError(f"{file}: not a valid tokenizer ({e})")


def read_eos(path: Path) -> set:
    """Ids that end an answer, from generation_config.json; LLaMA's </s> is 2."""
    file = path / "generation_config.json"
    eos = read_json(file).get("eos_token_id", 2) if file.exists() else 2
    return set(eos) if isinstance(eos, list) else {eos}
