"""Train the models: the losses, the loop, and the doubling of layers.

The loss is next-token cross entropy on the answers. Every row passes every layer, every visual
token included: nothing here knows about pruning.
"""
import math
import os
import re
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model_llava
import model_qwen
from tiny.batches import UNASKED, Batches, Stage
from tiny.scenes import GLYPHS
from tiny.vocabulary import COLORS, NUMBERS, SHAPES

WORK = Path(__file__).resolve().parent / "work"     # checkpoints and a log; not part of the project
LOADERS = max(1, (os.cpu_count() or 1) // 2)        # processes that draw images


def train(module: nn.Module, loss: Callable, batches: Batches, device: torch.device):
    """Train one stage: AdamW, 100 steps of warm-up, cosine decay. loss: of the tensors of a batch.

    Writes a checkpoint every 100 steps. An interrupted run resumes from it, to the same weights.
    """
    WORK.mkdir(exist_ok=True)
    stage = batches.stage
    file = WORK / f"{batches.name}.pt"
    opt = torch.optim.AdamW(module.parameters(), stage.rate, (0.9, 0.95), weight_decay=0.05)
    first = 0
    if file.exists():
        state = torch.load(file, map_location=device)
        module.load_state_dict(state["module"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
    steps = range(first, stage.steps)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps,
                                         num_workers=LOADERS, prefetch_factor=4)
    begun = time.time()
    mean = None
    for step, (grid, *data) in enumerate(loader, first):
        for group in opt.param_groups:
            group["lr"] = rate_at(step, stage)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(grid.tolist(), *(x.to(device) for x in data))
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        done = step + 1
        if done % 100 == 0 or done == stage.steps:
            minutes = (time.time() - begun) / 60
            line = f"{batches.name}: step {done}/{stage.steps}, loss {mean:.4f}, {minutes:.1f} min"
            print(line, flush=True)
            with (WORK / "log.txt").open("a") as log:
                log.write(line + "\n")
            state = {"module": module.state_dict(), "opt": opt.state_dict(), "step": done}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)      # whole, or not at all


def rate_at(step: int, stage: Stage) -> float:
    warm_up = (step + 1) / 100
    cosine = (1 + math.cos(math.pi * step / stage.decay)) / 2
    return stage.rate * min(warm_up, 0.02 + 0.98 * cosine)


# ---- losses --------------------------------------------------------------------------------------

def answer_loss(model, layer: Callable, grid, pixels, ids, pos, block, targets) -> Tensor:
    """Return the loss of packed questions (batches.py). layer: `masked_layer`, or it compiled."""
    if isinstance(model, model_qwen.Qwen):
        rotate = model_qwen.rotate
        decoder = model.model
        pos = pos.transpose(0, 1)                               # (3, B, T)
        features = model.visual(pixels, grid)[0]
    else:
        rotate = model_llava.rotate
        decoder = model.language_model
        pos = pos[:, 0]                                         # (B, T)
        features = model.multi_modal_projector(model.vision_tower(pixels)[0])
    first = (ids[0] == model.config.image_token).nonzero()[0].item()
    V = features.shape[1]
    x = decoder.embed_tokens(ids)
    x = torch.cat([x[:, :first], features.to(x.dtype), x[:, first + V:]], 1)
    rope = model.cos_sin(pos, torch.bfloat16)
    mask = visible(block)
    for module in decoder.layers:
        x = layer(module, x, rope, mask, rotate)
    asked = targets != UNASKED
    logits = model.lm_head(model.final_norm(x[asked]))
    return F.cross_entropy(logits.float(), targets[asked])


def visible(block: Tensor) -> Tensor:
    """Return (B, 1, T, T): a row sees the rows before it of its own question and the beginning."""
    T = block.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=block.device).tril()
    same = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    return (same & causal)[:, None]


def masked_layer(layer: nn.Module, x: Tensor, rope, mask: Tensor, rotate: Callable) -> Tensor:
    """Run a decoder layer of either model with a mask, which the models do without."""
    attn = layer.self_attn
    B, T, _ = x.shape
    y = layer.input_layernorm(x)
    q = rotate(attn.q_proj(y).view(B, T, attn.H, attn.D), rope).transpose(1, 2)
    k = rotate(attn.k_proj(y).view(B, T, attn.G, attn.D), rope).transpose(1, 2)
    v = attn.v_proj(y).view(B, T, attn.G, attn.D).transpose(1, 2)
    y = attention(q, k, v, mask)
    x = x + attn.o_proj(y.transpose(1, 2).reshape(B, T, attn.H * attn.D))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Spell softmax(QK^T)V out: the backward pass of the fused one is slow on a CPU."""
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    return scores.softmax(-1).to(v.dtype) @ v


def llava_tower(model: model_llava.Llava) -> tuple[nn.Module, Callable]:
    """Return what LLaVA's first stage trains and its loss: heads read glyph, place, color and shape
    off each patch feature; then they are thrown away."""
    classes = [len(GLYPHS), 6, len(COLORS), len(SHAPES)]
    heads = nn.ModuleList(nn.Linear(model.config.vision.hidden_size, n + 1) for n in classes)

    def loss(grid, pixels, labels):
        x = model.vision_tower(pixels)[0]
        return label_loss([head(x) for head in heads], labels)
    return nn.ModuleList([model.vision_tower, heads]), loss


def qwen_tower(model: model_qwen.Qwen) -> tuple[nn.Module, Callable]:
    """Return the same for Qwen, whose embeddings of the words serve as the heads. It is also asked
    in which half of the image each token lies."""
    choices = [list(GLYPHS)]
    for words in (NUMBERS[1:], COLORS, SHAPES, ["top", "bottom"], ["left", "right"]):
        choices.append(["Ġ" + word for word in words])
    embedding = model.model.embed_tokens

    def loss(grid, pixels, labels):
        x = model.visual(pixels, grid)[0]
        scores = []
        for tokens in choices:
            ids = [model.tokenizer.token_to_id(token) for token in tokens]
            scores.append(F.pad(x @ embedding.weight[ids].T, (1, 0)))       # 0 for none
        return label_loss(scores, labels)
    return nn.ModuleList([model.visual, embedding]), loss


def label_loss(scores: list[Tensor], labels: Tensor) -> Tensor:
    """Return the sum of the cross entropies of the columns of labels (B, V, columns)."""
    return sum(F.cross_entropy(column.float().flatten(0, 1), labels[..., i].flatten())
               for i, column in enumerate(scores))


# ---- speed and depth -----------------------------------------------------------------------------

def speed_up(model):
    """Compile the blocks of the tower, and spell their attention out. It lasts: only make.py, which
    does nothing else, may call it."""
    is_qwen = isinstance(model, model_qwen.Qwen)
    blocks = model.visual.blocks if is_qwen else model.vision_tower.encoder.layers
    F.scaled_dot_product_attention = attention
    torch._dynamo.config.recompile_limit = 64       # one version of a block for each image size
    for block in blocks:
        block.forward = torch.compile(block.forward)


def double(model, make: Callable):
    """Return a model with every decoder layer twice in a row, each adding half of what it did: to
    first order the same function. make: (layers, tokenizer) -> model."""
    state = model.state_dict()
    doubled = make(2 * model.num_layers, model.tokenizer)
    twice = {}
    for name in doubled.state_dict():
        single = re.sub(r"(?<=model\.layers\.)\d+", lambda i: str(int(i[0]) // 2), name)
        twice[name] = state[single]
        if "model.layers." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            twice[name] = state[single] / 2
    doubled.load_state_dict(twice)                  # copies
    return doubled
