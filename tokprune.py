"""Visual token pruning, as in arXiv 2512.07580 and the methods it compares. Knows no model and reads no file.

A model turns image and question into a Stream and moves it forward by layers; this file takes visual rows out of it:

    s = model.begin(image, question)        # the stream at the input of layer 0
    s = model.run(s, stop=20)               # layers 0..19 on everything
    s = prune(model, s, "dart", n=58)       # rows leave at the input of layer 20
    s = model.run(s)                        # the other layers, short

A method is a function of a View, `method(view, n) -> indices`, and an entry in METHODS at the end of its section.

    B variants of one prompt   T rows   V visual tokens alive   N at first   C width   H heads   G key/value heads   D head width
"""
import math
import re
from dataclasses import dataclass, replace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line to show."""


@dataclass
class Stream:
    """The residual stream at the input of a layer, for B variants of one prompt, and all that the layers to come need."""
    layer: int
    x: Tensor                       # (B, T, C)
    pos: Tensor                     # (..., B or 1, T) positions as the model's rotary embedding takes them
    next_pos: int                   # position of the first generated token: after the original prompt, whatever was removed
    visual: tuple[int, int]         # first visual row and V; visual rows are contiguous and keep their order
    origin: Tensor                  # (B or 1, V) index of each visual row among the N of the full image
    grid: tuple[int, int]           # rows and columns of the full image, N = rows * cols
    cache: list                     # per layer (keys, values), each (B or 1, G, T of that layer, D), or None; or `with_room`
    queries: Tensor | None          # (B, H, T, D) of the layer just run, for methods that look at attention
    ids: Tensor                     # (T at first,) token ids of the whole prompt, the image token's repeated
    embeds: Tensor                  # (T at first, C) their input embeddings, visual tokens in place
    saliency: Callable[[], Tensor]  # -> (N,) how much the vision tower itself attends to each visual token


def keep(stream: Stream, idx: Tensor, positions: str = "keep") -> Stream:
    """The stream with only visual rows idx, ascending, (n,) or one set a variant (B, n); text rows always stay.

    positions: "keep" leaves every row its original position; "compact" renumbers, as methods that shorten the prompt do.
    """
    idx = idx.to(stream.x.device)
    stream = expand(stream, max(len(stream.x), len(idx) if idx.dim() == 2 else 1))
    (start, V), (B, T, C) = stream.visual, stream.x.shape
    idx = idx.expand(B, -1)                                                                 # (B, n)
    row = torch.arange(T, device=idx.device).expand(B, T)
    rows = torch.cat([row[:, :start], start + idx, row[:, start + V:]], 1)                  # (B, T - V + n)
    x = stream.x.gather(1, rows[..., None].expand(-1, -1, C))
    pos = stream.pos.gather(-1, rows.expand(*stream.pos.shape[:-2], -1, -1))                # M-RoPE has an axis more, in front
    next_pos = stream.next_pos
    if positions == "compact":
        if pos.dim() > 2:
            raise InputError("positions compact: a visual token of this model has three positions (M-RoPE), its place in the "
                             "image, and no number to take another's; want keep")
        next_pos = x.shape[1]
        pos = torch.arange(next_pos, device=pos.device).expand(pos.shape)
    return replace(stream, x=x, pos=pos, next_pos=next_pos, visual=(start, idx.shape[1]), origin=stream.origin.gather(1, idx),
                   queries=None)


def prune(model, stream: Stream, method: str | list, n: int, seed: int | list = 0, info: dict[str, Tensor] = {},
          positions: str = "keep") -> Stream:
    """The stream after `method` has chosen n of its visual tokens (all of them if it has fewer).

    A list of methods, or of seeds, makes one variant of each. info: for each oracle by name, (N,) measured information.
    """
    n = min(n, stream.visual[1])
    B = max([len(stream.x)] + [len(given) for given in (method, seed) if isinstance(given, list)])
    methods, seeds = (given if isinstance(given, list) else [given] * B for given in (method, seed))
    stream = expand(stream, B)
    chosen = [choose(view_of(model, stream, b, seeds[b], info.get(methods[b])), methods[b], n) for b in range(B)]
    pruned = keep(stream, torch.stack([idx for idx, _ in chosen]), positions)
    for b, (_, merged) in enumerate(chosen):
        if merged is not None:
            start = stream.visual[0]
            pruned.x[b, start:start + n] = merged.to(pruned.x.dtype)
    return pruned


def expand(stream: Stream, B: int) -> Stream:
    """One variant as B equal ones, nothing copied; the cache stays shared."""
    q = stream.queries
    return replace(stream, x=stream.x.expand(B, -1, -1), pos=stream.pos.expand(*stream.pos.shape[:-2], B, -1),
                   origin=stream.origin.expand(B, -1), queries=None if q is None else q.expand(B, -1, -1, -1))


def choose(view: "View", method: str, n: int) -> tuple[Tensor, Tensor | None]:
    """Indices (n,) of the method, and the rows (n, C) to put there if it merges. To keep none or all needs no method."""
    V = view.visual[1]
    if n in (0, V):
        return torch.arange(n), None
    check_method(method, view.layer)
    assert method not in NEED_A_LAYER or view.keys is not None, f"{method} needs a layer run since rows last left"
    chosen = METHODS[method](view, n)
    idx, merged = chosen if isinstance(chosen, tuple) else (chosen, None)
    assert idx.shape == (n,) and (idx.diff() > 0).all(), f"{method} chose {idx.tolist()}, want {n} ascending of {V}"
    return idx.cpu(), merged


def prefill(model, stream: Stream, schedule: list, seed: int = 0, positions: str = "keep") -> Stream:
    """All layers under a schedule from `parse_schedule` -> Stream past the last layer."""
    N = stream.visual[1]
    for layer, method, amount in schedule:
        stream = prune(model, model.run(stream, stop=layer), method, count(amount, N), seed, positions=positions)
    return model.run(stream)


def with_room(stream: Stream, rows: int = 16) -> Stream:
    """The stream with its cache copied into tensors that have room for more rows, as (keys, values, how many are filled).

    Decoding writes there in place, where it would copy every row for each new one; so what this returns can be run on only
    once.
    """
    B = len(stream.x)
    return replace(stream, cache=[(roomy(k, B, rows), roomy(v, B, rows), k.shape[2]) for k, v in stream.cache])


def roomy(t: Tensor, B: int, rows: int) -> Tensor:
    """(B or 1, G, T, D) -> (B, G, T + rows, D), the last ones to be written."""
    room = t.new_empty(B, t.shape[1], t.shape[2] + rows, t.shape[3])
    room[:, :, :t.shape[2]] = t
    return room


def extend(past: tuple, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """A layer's cache and new rows (B, G, T, D) -> all keys, all values, and the cache that holds them."""
    if len(past) == 2:                                  # layers before the first pruning share one cache among variants
        k, v = (torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in zip(past, (k, v)))
        return k, v, (k, v)
    keys, values, filled = past
    end = filled + k.shape[2]
    if end > keys.shape[2]:
        keys, values = (roomy(t, len(t), end) for t in (keys, values))          # doubled
    keys[:, :, filled:end], values[:, :, filled:end] = k, v
    return keys[:, :, :end], values[:, :, :end], (keys, values, end)


# ---- what a method sees -----------------------------------------------------------------------------------------

@dataclass
class View:
    """What a method may look at, of one variant at the input of `layer`; tensors and functions, so one can be built by hand."""
    layer: int
    visual: tuple[int, int]                             # first visual row and V
    x: Tensor                                           # (T, C) hidden states
    embeds: Tensor | None = None                        # (T at first, C) input embeddings of the whole prompt
    embeds_visual: tuple[int, int] | None = None        # first visual row and N, in embeds
    keys: Tensor | None = None                          # (T, G*D) keys of layer-1, after rotary
    attention: Callable[[Tensor], Tensor] | None = None  # rows (R,) -> (H, R, T) probabilities in layer-1, float32
    normed: Callable[[], Tensor] | None = None          # -> (T, C) the model's final norm of x
    saliency: Callable[[], Tensor] | None = None        # -> (V,) float32
    grid: tuple[int, int] | None = None
    origin: Tensor | None = None                        # (V,)
    info: Tensor | None = None                          # (V,) measured information
    rng: torch.Generator | None = None                  # on the CPU

    @property
    def x_visual(self) -> Tensor:
        """(V, C) float32: every method selects in float32, bfloat16 changes the sets."""
        start, V = self.visual
        return self.x[start:start + V].float()


def view_of(model, stream: Stream, b: int, seed: int, info: Tensor | None) -> View:
    origin, N = stream.origin[b], stream.grid[0] * stream.grid[1]
    rng = torch.Generator().manual_seed(seed + 1_000_003 * stream.layer)     # stages of one schedule draw apart
    view = View(stream.layer, stream.visual, stream.x[b], stream.embeds, (stream.visual[0], N),
                normed=lambda: model.final_norm(stream.x[b]), saliency=lambda: stream.saliency()[origin], grid=stream.grid,
                origin=origin, info=None if info is None else info.to(origin.device)[origin], rng=rng)
    if stream.queries is not None:
        keys = stream.cache[stream.layer - 1][0]                             # (B, G, T, D), or one shared by all variants
        q, k = stream.queries[b], keys.expand(len(stream.x), -1, -1, -1)[b]
        view.keys = k.transpose(0, 1).flatten(1)
        view.attention = lambda rows: attention(q, k, rows)
    return view


def attention(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Causal attention probabilities of the given rows alone, (H, R, T) float32: no attention matrix is ever kept."""
    k = k.float().repeat_interleave(len(q) // len(k), 0)                     # grouped: key head j serves H/G queries
    scores = q[:, rows].float() @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    later = torch.arange(k.shape[1], device=k.device) > torch.as_tensor(rows, device=k.device)[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


# ---- methods ----------------------------------------------------------------------------------------------------

def random(view: View, n: int) -> Tensor:
    """Uniform without replacement: the baseline that no method beats past the information horizon."""
    return torch.randperm(view.visual[1], generator=view.rng)[:n].sort().values


def fastv(view: View, n: int) -> Tensor:
    """FastV (ECCV 2024, arXiv 2403.06764): attention of the last prompt token in layer-1, mean over heads.

    The paper averages over all later tokens; the authors' code reads the last row alone, and so do we.
    """
    start, V = view.visual
    last = torch.tensor([len(view.x) - 1])
    return top(view.attention(last)[:, 0, start:start + V].mean(0), n)


def sparsevlm(view: View, n: int) -> tuple[Tensor, Tensor]:
    """SparseVLM (ICML 2025, arXiv 2410.04417), code v1.5: text raters score, and the best of the rest are merged.

    The budget counts the merged tokens, n = k + c. Where n is too small for that, the n best are kept, none merged.
    """
    (first, N), (start, V) = view.embeds_visual, view.visual
    visual, text = view.embeds[first:first + N].float(), view.embeds[first + N:].float()
    m = (visual @ text.T).softmax(1).mean(0)                                 # (text,) how visual each text token is
    raters = (m > m.mean()).nonzero()[:, 0] if (m > m.mean()).any() else torch.arange(len(text))
    score = view.attention(start + V + raters)[:, :, start:start + V].mean((0, 1))
    order = score.argsort(descending=True, stable=True)

    def merging(k):                                                          # how many of the V - k others go into how many
        t = int(0.3 * (V - k)) + 1
        return t, int(t / 10) + 1
    fitting = [k for k in range(n) if k + merging(k)[1] <= n]
    if not fitting:
        return top(score, n), None
    k = max(fitting)
    t, c = merging(k)
    recycled = order[k:k + t]
    centers, means = cluster(view.x_visual[recycled], c)
    rows = view.x_visual.clone()
    rows[recycled[centers]] = means                                          # a merged token sits where its center sat
    idx = torch.cat([order[:k], recycled[centers]]).sort().values
    return idx, rows[idx]


def cluster(x: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN, as SparseVLM's code has it: (t, C) rows -> indices of the c centers, and the mean (c, C) of each cluster."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") * x.shape[1] ** -0.5
    density = (-distance.topk(c, largest=False).values.square().mean(1)).exp()              # itself is one of the nearest
    rank = density.argsort(descending=True, stable=True).argsort()                          # mutual neighbours tie exactly: the
    denser = rank[None] < rank[:, None]                                                     # lower index wins, not random noise
    separation = torch.where(denser, distance, distance.max()).amin(1)                      # to the nearest denser row
    centers = (density * separation).argsort(descending=True, stable=True)[:c]
    member = distance[:, centers].argmin(1)
    member[centers] = torch.arange(c, device=x.device)
    return centers, torch.stack([x[member == i].mean(0) for i in range(c)])


def dart(view: View, n: int) -> Tensor:
    """DART (EMNLP 2025, arXiv 2502.11494): 4 visual and 4 text pivots of the largest key norms; keep what is least like them.

    Visual pivots take their turns before text pivots, each by rank; the authors' order is that of a Python set, an accident.
    """
    start, V = view.visual
    norm = view.keys.float().abs().sum(1)                                                   # L1, all heads
    pivots = norm[start:start + V].argsort(descending=True, stable=True)[:4]
    text = norm[start + V:].argsort(descending=True, stable=True)[:4]
    if n <= len(pivots):
        return pivots[:n].sort().values
    h = F.normalize(view.normed().float(), dim=1)
    similarity = h[start:start + V] @ h[torch.cat([start + pivots, start + V + text])].T    # (V, 8)
    return least_similar_in_turn(similarity, pivots, n)


def least_similar_in_turn(similarity: Tensor, kept: Tensor, n: int) -> Tensor:
    """Each pivot (column) in turn adds an equal share of the n: the rows not yet kept that are least similar to it."""
    share, rest = divmod(n - len(kept), similarity.shape[1])
    taken = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    taken[kept] = True
    for i, column in enumerate(similarity.T):
        order = column.masked_fill(taken, torch.inf).argsort(stable=True)
        taken[order[:share + (i < rest)]] = True
    return taken.nonzero()[:, 0]


def divprune(view: View, n: int) -> Tensor:
    """DivPrune (CVPR 2025, arXiv 2503.02175): farthest-point sampling under cosine distance.

    A token once picked is never picked again; the authors' code repeats duplicates.
    """
    f = F.normalize(view.x_visual, dim=1)
    distance = 1 - f @ f.T                                                                  # (V, V)
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(1)
    picked = [nearest.argmax(0, keepdim=True)]                                             # (1,): a number would wait for the GPU
    nearest = distance[picked[0]][0]
    while len(picked) < n:
        nearest[picked[-1]] = -torch.inf
        picked.append(nearest.argmax(0, keepdim=True))
        nearest = torch.minimum(nearest, distance[picked[-1]][0])
    return torch.cat(picked).sort().values


def scope(view: View, n: int) -> Tensor:
    """SCOPE (NeurIPS 2025), greedy: a token gains what it adds to the coverage of all tokens, times its saliency."""
    f = F.normalize(view.x_visual, dim=1)
    similarity, saliency = f @ f.T, view.saliency()
    covered = torch.zeros_like(saliency)
    free = torch.ones_like(saliency, dtype=torch.bool)
    for _ in range(n):
        gain = (similarity - covered[:, None]).clamp(min=0).sum(0) * saliency
        pick = gain.masked_fill(~free, -torch.inf).argmax(0, keepdim=True)
        free[pick] = False
        covered = torch.maximum(covered, similarity[:, pick][:, 0])
    return (~free).nonzero()[:, 0]


def info(view: View, n: int) -> Tensor:
    """The paper's oracle: the tokens of the highest measured information at this layer. Needs the gold answer.

    As "info" of its first token, the paper's measure; as "info-answer" of all of it.
    """
    if view.info is None:
        raise InputError("info and info-answer are oracles: they need information measured with the gold answer, "
                         "which only an evaluation has")
    return top(view.info, n)


def top(score: Tensor, n: int) -> Tensor:
    """Ascending indices of the n highest, ties to the lowest index."""
    return score.argsort(descending=True, stable=True)[:n].sort().values


# Each is asked for 0 < n < V; `choose` sees to none and all.
METHODS = {"random": random, "fastv": fastv, "sparsevlm": sparsevlm, "dart": dart, "divprune": divprune, "scope": scope,
           "info": info, "info-answer": info}
ORACLES = ("info", "info-answer")
NEED_A_LAYER = {"fastv", "sparsevlm", "dart"}           # they read attention or keys of the layer before


# ---- information ------------------------------------------------------------------------------------------------

def information(model, image, question: str, answer: str, layers: list[int], window: int = 2, **options) -> Tensor:
    """Token information of one question, (len(layers), rows, cols) float32, signed, rows and cols in windows of
    window x window tokens, smaller at the edges. options: see `token_information`."""
    return token_information(model, model.begin(image, question), answer, layers, window, **options)


def token_information(model, stream: Stream, answer: str, layers: list[int], window: int = 2, mode: str = "keep-one",
                      target: str = "first", max_batch_tokens: int = 2 ** 15) -> Tensor:
    """What the visual tokens of each window w still tell at the input of each layer K, from a stream at layer 0.

    mode "keep-one", as the paper's code has it:    I(w, K) = P(y | only w) - P(y | none)
    mode "leave-one-out", as its abstract reads:    I(w, K) = P(y | all) - P(y | all but w)
    From K on only those visual tokens are left; P is a softmax over the whole vocabulary in float32.
    target "first", the paper's: y is the first token of the gold answer, at the last prompt row. "answer", ours: P(y) is
    the sum over the answer's tokens of P(y_t | y_<t), teacher-forced; "each": the terms, along one more axis at the end.

    All layers share one unpruned run, and rows that no removed token can reach are never computed again: their keys and
    values are taken from it. Windows with equally many rows left to run are one batch, over all layers, of at most
    max_batch_tokens rows.
    """
    assert mode in ("keep-one", "leave-one-out") and target in ("first", "answer", "each"), f"mode {mode!r}, target {target!r}"
    ids = model.answer_ids(answer)[:1 if target == "first" else None]
    forced = model.append(stream, torch.tensor([ids[:-1]], dtype=torch.long, device=stream.x.device))
    stream = replace(stream, x=torch.cat([stream.x, forced.x], 1), pos=torch.cat([stream.pos, forced.pos], -1))
    at = []
    for layer in sorted(set(layers)):
        stream = model.run(stream, stop=layer)
        at.append(stream)
    full, V = model.run(stream), stream.visual[1]
    windows = windows_of(stream.grid, window)
    found = torch.zeros(len(at), len(windows), len(ids))
    for (first, _), members in group_windows(stream.grid, window, mode).items():
        if mode == "leave-one-out":
            kept = torch.stack([torch.tensor(sorted({*range(first, V)} - {*windows[i].tolist()})) - first for i in members])
        else:
            kept = torch.stack([windows[i] for i in members])
        found[:, members] = left(model, at, full, first, kept, ids, max_batch_tokens)
    if mode == "leave-one-out":
        found = probabilities(model, full, ids).cpu() - found
    else:
        found -= left(model, at, full, 0, torch.zeros(1, 0, dtype=torch.long), ids, max_batch_tokens)
    found = found[[sorted(set(layers)).index(layer) for layer in layers]]
    found = found.unflatten(1, [-(-side // window) for side in stream.grid])
    return found if target == "each" else found.sum(-1)


def left(model, at: list[Stream], full: Stream, first: int, kept: Tensor, ids: list, max_batch_tokens: int) -> Tensor:
    """P(y_t), (layers, B, tokens), where from the layer of each stream in `at` on these visual tokens are left: all before
    `first`, and of the others kept (B, n), counted from it.

    Rows before `first` are taken from the cache of the unpruned run `full`. What begins at a deeper layer joins there.
    """
    start, V = full.visual
    room = max(1, max_batch_tokens // (full.x.shape[1] - V + first + kept.shape[1]))          # variants in a batch
    if len(at) > room:
        return torch.cat([left(model, at[i:i + room], full, first, kept, ids, max_batch_tokens) for i in range(0, len(at), room)])
    if len(at) * len(kept) > room:
        return torch.cat([left(model, at, full, first, part, ids, max_batch_tokens) for part in kept.split(room // len(at))], 1)
    cache = [(k[:, :, :start + first], v[:, :, :start + first]) for k, v in full.cache]
    begin, going = {stream.layer: stream for stream in at}, None
    for layer in range(at[0].layer, model.num_layers):
        if stream := begin.get(layer):
            new = keep(replace(stream, x=stream.x[:, start + first:], pos=stream.pos[..., start + first:],
                               visual=(0, V - first), origin=stream.origin[:, first:]), kept)
            going = new if going is None else replace(
                new, x=torch.cat([going.x, new.x]), pos=torch.cat([going.pos, new.pos], -2),
                origin=torch.cat([going.origin, new.origin]))
        going = model.run(replace(going, cache=cache), stop=layer + 1)          # nobody asks for the new keys and values again
    return probabilities(model, going, ids).unflatten(0, (len(at), -1)).cpu()


def probabilities(model, stream: Stream, ids: list) -> Tensor:
    """Of the answer's tokens, at the last rows of a stream past the last layer, (B, tokens) float32."""
    ends = [stream.x.shape[1] - len(ids) + t + 1 for t in range(len(ids))]
    return torch.stack([model.logits(replace(stream, x=stream.x[:, :end])).softmax(-1)[:, y] for end, y in zip(ends, ids)], 1)


def windows_of(grid: tuple[int, int], window: int) -> list[Tensor]:
    """The tokens of each window, in raster order."""
    token = torch.arange(grid[0] * grid[1]).view(grid)
    return [token[r:r + window, c:c + window].flatten() for r in range(0, grid[0], window) for c in range(0, grid[1], window)]


def group_windows(grid: tuple[int, int], window: int, mode: str) -> dict[tuple[int, int], list[int]]:
    """Which windows are one batch: {(first visual token computed anew, visual tokens computed): windows}.

    Keep-one computes those of w alone. Leave-one-out has to compute every token after a removed one; windows side by side
    are one batch, from the first token of their rows on.
    """
    groups = {}
    for i, w in enumerate(windows_of(grid, window)):
        first = int(w[0]) // (window * grid[1]) * window * grid[1] if mode == "leave-one-out" else 0
        rows = grid[0] * grid[1] - first - len(w) if mode == "leave-one-out" else len(w)
        groups.setdefault((first, rows), []).append(i)
    return groups


def information_flops(config, text: tuple[int, int], grid: tuple[int, int], layers: list[int], window: int = 2,
                      mode: str = "keep-one") -> tuple[int, int]:
    """Prefill FLOPs of `token_information` for one question, and of the official procedure, which runs the whole prompt
    through the whole model for every layer and window. text: rows before and after the image; config: the text config."""
    before, after = text
    N, L = grid[0] * grid[1], config.num_hidden_layers
    ours, official = flops(config, [before + N + after] * L), 0
    for K in layers:
        base = 0 if mode == "leave-one-out" else after                       # the run with none, or the unpruned one
        ours += flops(config, [base] * (L - K), before) if base else 0
        official += flops(config, [before + N + after] * K + [before + (N if base == 0 else 0) + after] * (L - K))
        for (first, rows), members in group_windows(grid, window, mode).items():
            ours += len(members) * flops(config, [rows + after] * (L - K), before + first)
            official += len(members) * flops(config, [before + N + after] * K + [before + first + rows + after] * (L - K))
    return ours, official


def horizon(curve, full: float, tolerance: float = 0.01) -> int:
    """Ours, the paper gives no rule: the first layer from which on dropping every visual token never costs more than
    `tolerance` of the unpruned score. curve: the score with all dropped at the input of layer 0, 1, ...; len(curve) if none."""
    below = [layer for layer, score in enumerate(curve) if score < full - tolerance * full]
    return below[-1] + 1 if below else 0


def per_token(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(rows, cols) in windows -> (N,): the tokens of a window share its value."""
    return windows.repeat_interleave(window, 0).repeat_interleave(window, 1)[:grid[0], :grid[1]].flatten()


# ---- schedules and cost -----------------------------------------------------------------------------------------

def parse_schedule(text: str) -> list[tuple[int, str, float | int]]:
    """"divprune@0:0.5 random@20=38" -> [(0, "divprune", 0.5), (20, "random", 38)], layers ascending.

    ":" gives the fraction of the N original tokens removed (float), "=" the number kept (int). Raises InputError.
    """
    schedule = []
    for part in text.split():
        match = re.fullmatch(r"([\w-]+)@(\d+)(?::(\d*\.?\d+)|=(\d+))", part)
        if not match:
            raise InputError(f"schedule part {part!r} does not parse; want method@layer:ratio or method@layer=count, "
                             "e.g. 'dart@2=252 random@20:0.9'")
        method, layer, ratio, number = match.groups()
        check_method(method, int(layer))
        if ratio and float(ratio) > 1:
            raise InputError(f"schedule part {part!r}: ratio is {ratio}, want 0..1, the fraction removed")
        if schedule and int(layer) <= schedule[-1][0]:
            raise InputError(f"schedule {text!r}: layer {layer} after layer {schedule[-1][0]}; layers must ascend")
        schedule.append((int(layer), method, float(ratio) if ratio else int(number)))
    return schedule


def format_schedule(schedule) -> str:
    """The inverse of `parse_schedule`."""
    return " ".join(f"{method}@{layer}" + (f"={amount}" if isinstance(amount, int) else f":{amount}")
                    for layer, method, amount in schedule)


def check_method(method: str, layer: int):
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; want one of {', '.join(METHODS)}")
    if layer == 0 and method in NEED_A_LAYER:
        raise InputError(f"{method} reads the layer before the one it prunes at: it cannot act at layer 0; want 1 or later")


def count(amount: float | int, N: int) -> int:
    """How many of N tokens a schedule's amount keeps: an int is that many, a float the fraction removed."""
    return min(amount, N) if isinstance(amount, int) else round(N * (1 - amount))


def visual_tokens(schedule: list, N: int, L: int) -> list[int]:
    """Visual tokens at the input of each of the L layers."""
    tokens = [N] * L
    for layer, _, amount in schedule:
        tokens[layer:] = [min(count(amount, N), tokens[layer])] * (L - layer)
    return tokens


def mean_visual_tokens(schedule: list, N: int, L: int) -> float:
    """Mean over the L layers of the visual tokens at each layer's input: the budget that makes methods comparable."""
    return sum(visual_tokens(schedule, N, L)) / L


def at_budget(method: str, budget: float, deep: int, N: int, L: int) -> list[tuple]:
    """Three schedules that hold `budget` of the N tokens in the mean over L layers: the method alone; with random pruning at
    layer `deep`, the horizon; and with everything dropped there. What the deep layers give up, the others keep.

    As the official code divides it: a method that reads a layer starts at 2, or at 1 where that would take over a quarter
    of the budget; random keeps a fifth of the mean (at a mean of 192: dart@2=252 or divprune@0=284, then random@20=39 or 38).
    Rounded in favour of the method alone. Raises InputError where a stage would keep less than one token, or more than all.
    """
    first = 0 if method not in NEED_A_LAYER else 2 if 2 <= budget * L / 4 else 1
    alone = math.ceil((budget * L - first) * N / (L - first))
    total = first * N + (L - first) * alone
    few = round(total / L / 5)
    if deep <= first:
        raise InputError(f"layer {deep}: random cannot follow {method}, which starts at layer {first}; want a later one")
    with_random, with_none = ((total - first * N - (L - deep) * n) // (deep - first) for n in (few, 0))
    if min(alone, few, with_random) < 1 or with_none > N:
        raise InputError(f"budget {budget:.3g} does not fit {method} from layer {first} on and random from layer {deep} on: they "
                         f"would keep {alone} alone, {with_random} and {few}, {with_none} and 0, of {N} tokens")

    def stages(*kept):
        return tuple((layer, name, round(1 - n / N, 4)) for layer, name, n in kept)
    return [stages((first, method, alone)), stages((first, method, with_random), (deep, "random", few)),
            stages((first, method, with_none), (deep, "random", 0))]


def flops(config, rows: list[int], past: int = 0) -> int:
    """Prefill FLOPs of the decoder layers, two per multiply-add; config: the text config; rows at each layer's input;
    past: rows before them whose keys and values are in the cache.

    Exact for grouped queries and three MLP matrices; attention counts its causal half. Vision tower and head are apart.
    """
    d, m = config.hidden_size, config.intermediate_size
    d_q, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return sum(2 * n * d * (d_q + 2 * d_kv) + 2 * n * d_q * d + 2 * n * (n + 2 * past) * d_q + 6 * n * d * m for n in rows)
