"""Visual token pruning, as in arXiv 2512.07580 and the methods it compares. Knows no model.

An image and a question become a Stream, the residual stream at the input of a layer. A model moves
the stream forward by layers; this file takes visual rows out of it:

    s = model.begin(image, question)        # the stream at the input of layer 0
    s = model.run(s, stop=20)               # layers 0..19 on everything
    s = prune(model, s, "dart", n=58)       # rows leave at the input of layer 20
    s = model.run(s)                        # the other layers, short
    decode(model, s, max_new_tokens=16)     # greedy

A method is a function of a View, `method(view, n) -> indices`, or (indices, rows) if it merges,
and an entry in METHODS.

A model is one file. It has to hold
    PROMPT, read_config(path) -> config, load(path, device=None, dtype=None) -> model
and the model, an nn.Module,
    num_layers, config.text, tokenizer, lm_head, eos (the ids that end an answer)
    preprocess(image)                       what `begin` takes in place of a PIL image
    canvas(image)                           the PIL image that the visual tokens tile
    shape(size, question)                   -> (rows, first visual row, grid) of that prompt
    begin(image, question)                  -> Stream at layer 0, B = 1
    run(stream, stop=None)                  -> Stream at layer `stop` (None: past the last layer)
    append(stream, ids)                     -> Stream at layer 0 of the new tokens (B, n) only
    final_norm(x)
    logits(stream, row=-1)                  -> (B, vocab) float32, of the token after that row
    answer_ids(answer)                      -> the tokens the model would emit for that answer
    decode = decode                         this file's
support/checkpoint.py names the file for its model_type; nothing else knows which models exist.

    B variants of P prompts of equal shape (nothing is padded), a prompt's variants side by side
    T rows   V visual tokens alive   N of them at first   C width   H heads   G key/value heads
    D head width   L layers
"""
import re
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """The input cannot be used. The message is the one line to show."""


def finite(values: Tensor, what: str, dtype) -> Tensor:
    """Return the values. Raises InputError where one of them is infinite or not a number, which a
    model in that precision has made of its input."""
    if not values.isfinite().all():
        wider = {torch.float16: "bfloat16", torch.bfloat16: "float32"}.get(dtype, "other weights")
        raise InputError(f"{what} are not finite in {str(dtype)[6:]}; want {wider}")
    return values


# ---- the stream ----------------------------------------------------------------------------------

@dataclass
class Stream:
    """The residual stream at the input of a layer, of B variants of P prompts, with everything that
    the layers to come need. An axis of length 1 is shared by all variants, one of length P by the
    variants of a prompt.

    Visual rows are contiguous and keep their order. At first V = N; where the visual tokens tile
    the image, N = rows * cols of the grid, in raster order. A model that has other visual rows too
    (row separators, tiles) gives a larger N, and what relies on the grid refuses it.
    """
    layer: int
    x: Tensor                       # (B, T, C)
    pos: Tensor                     # (..., B | 1, T) positions, as the rotary embedding takes them
    next_pos: int                   # position of the first generated token, whatever was removed
    visual: tuple[int, int]         # first visual row, and V
    origin: Tensor                  # (B, V) index of each visual row among the N
    N: int
    grid: tuple[int, int]           # rows and columns of visual tokens in the full image
    cache: list                     # per layer a KV or None
    queries: Tensor | None          # (B, H, T, D) of the layer before, if no row has left since
    ids: Tensor                     # (P, T at first) the prompts, the image token repeated
    embeds: Tensor                  # (P, T at first, C) their input embeddings
    saliency: Callable[[], Tensor]  # -> (P, N) how much the vision tower attends to each token
    planes: tuple = ()              # (P, N, C) each: added to the visual rows after layer 0, 1, ...


@dataclass
class KV:
    """The cache of a layer: keys and values (B | P | 1, G, T, D)."""
    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor) -> "KV":
        """Return the cache with new rows (B, G, n, D) behind these; copies all."""
        B = len(k)
        keys = torch.cat([per_variant(self.keys, B), k], 2)
        values = torch.cat([per_variant(self.values, B), v], 2)
        return KV(keys, values)


def causal_mask(T: int, S: int, device: torch.device):
    """Return the mask (T, S) of the last T of S rows: each sees every row up to itself.

    On a GPU it is a form that is never laid out in memory, so that the fast kernels take it.
    """
    if device.type == "cuda":
        # imported here: it takes as long as torch itself
        from torch.nn.attention.bias import causal_lower_right
        return causal_lower_right(T, S)
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def per_variant(t: Tensor, B: int, dim: int = 0) -> Tensor:
    """Return t with B entries along `dim`: one is expanded, P are each repeated B / P times, the
    copies side by side."""
    if t.shape[dim] == 1:
        return t.expand(*t.shape[:dim], B, *t.shape[dim + 1:])
    if t.shape[dim] == B:
        return t
    return t.repeat_interleave(B // t.shape[dim], dim)


def together(streams: list[Stream]) -> Stream:
    """Return prompts of equal shape, at layer 0, as one stream."""
    first = streams[0]
    shapes = {(s.layer, s.x.shape, s.visual, s.grid, s.next_pos) for s in streams}
    assert len(shapes) == 1 and first.layer == 0, f"prompts of several shapes: {shapes}"
    return replace(
        first, x=torch.cat([s.x for s in streams]), origin=torch.cat([s.origin for s in streams]),
        ids=torch.cat([s.ids for s in streams]), embeds=torch.cat([s.embeds for s in streams]),
        saliency=lambda: torch.cat([s.saliency() for s in streams]),
        planes=tuple(torch.cat(planes) for planes in zip(*(s.planes for s in streams))))


def some_of(stream: Stream, prompts: list[int]) -> Stream:
    """Return some of a stream's prompts, each of one variant: the inverse of `together`."""
    def of(t: Tensor, dim: int = 0) -> Tensor:
        if t.shape[dim] == 1:
            return t
        return t.index_select(dim, torch.tensor(prompts, device=t.device))
    cache = [kv and KV(of(kv.keys), of(kv.values)) for kv in stream.cache]
    return replace(stream, x=of(stream.x), pos=of(stream.pos, -2), origin=of(stream.origin),
                   cache=cache, queries=None, ids=of(stream.ids), embeds=of(stream.embeds),
                   saliency=lambda: of(stream.saliency()), planes=tuple(map(of, stream.planes)))


# ---- pruning -------------------------------------------------------------------------------------

def prune(model, stream: Stream, method: str | list, n: int, seed: int | list = 0,
          info: dict[str, list[Tensor]] | None = None, positions: str = "keep") -> Stream:
    """Return the stream with only the n visual tokens that `method` chooses (all if it has fewer).

    A list of methods, or of seeds, makes one variant of each: those of the first prompt, then those
    of the next. info: by the name of a method that needs it, what was measured of the N visual
    tokens beforehand, (N,) or (N, t) for each prompt. positions: see `keep`. Raises InputError.
    """
    if isinstance(method, list) and isinstance(seed, list):
        assert len(method) == len(seed), f"{len(method)} methods and {len(seed)} seeds"
    B = len(stream.x)
    for given in (method, seed):
        if isinstance(given, list):
            assert len(given) % B == 0, f"{len(given)} methods or seeds for {B} variants"
            B = len(given)
    methods = method if isinstance(method, list) else [method] * B
    seeds = seed if isinstance(seed, list) else [seed] * B
    if 0 < n < stream.visual[1]:                        # once, as a check waits for the GPU
        finite(stream.x, f"hidden states at layer {stream.layer}", stream.x.dtype)
    stream = expand(stream, B)
    kept = []
    merged = []
    for b in range(B):
        measured = info.get(methods[b]) if info else None
        view = view_of(model, stream, b, seeds[b], measured)
        idx, rows = choose(view, methods[b], n)
        kept.append(idx)
        merged.append(rows)
    assert len({len(idx) for idx in kept}) == 1, f"{methods} keep unequal numbers of tokens"
    pruned = keep(stream, torch.stack(kept), positions)
    start, V = pruned.visual
    for b in range(B):
        if merged[b] is not None:
            pruned.x[b, start:start + V] = merged[b].to(pruned.x.dtype)
    return pruned


def choose(view: "View", method: str, n: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices (n,) that a method chooses, and the rows (n, C) to put there if it merges.

    To keep none or all of them takes no method. Raises InputError.
    """
    V = view.visual[1]
    assert method in METHODS, f"unknown method {method!r}"
    entry = METHODS[method]
    if n == 0 or n >= V or entry.keeps_none:
        return torch.arange(0 if entry.keeps_none else min(n, V)), None
    check_method(method, view.layer)
    assert view.keys is not None or not entry.needs_layer, \
        f"{method} needs a layer run since rows last left"
    if entry.measure and view.info is None:
        raise InputError(f"{method} needs its {entry.measure} measured beforehand, which `prune` "
                         "takes as info; see information.MEASURES")
    if view.info is not None:
        finite(view.info, f"{method}'s measured values", view.x.dtype)
    if entry.merges:
        idx, rows = entry(view, n)
    else:
        idx = entry(view, n)
        rows = None
        assert isinstance(idx, Tensor), f"{method} returned {type(idx).__name__}; want merges=True?"
    assert rows is None or len(rows) == n, f"{method} merged into {len(rows)} rows, want {n}"
    assert idx.shape == (n,) and (idx.diff() > 0).all(), \
        f"{method} chose {idx.tolist()}, want {n} ascending of {V}"
    return idx.cpu(), rows


def keep(stream: Stream, idx: Tensor, positions: str = "keep") -> Stream:
    """Return the stream with only visual rows idx, ascending, counted among those alive; text rows
    stay.

    idx: (n,), or (B, n) for another set in each variant. positions: "keep" leaves every row its
    position; "compact" renumbers the rows, as methods that shorten the prompt do. Raises
    InputError where a model's positions cannot be renumbered.
    """
    idx = idx.to(stream.x.device)
    if idx.dim() == 2:
        stream = expand(stream, max(len(stream.x), len(idx)))
    B, T, C = stream.x.shape
    start, V = stream.visual
    idx = idx.expand(B, -1)                                                     # (B, n)
    every_row = torch.arange(T, device=idx.device).expand(B, T)
    before = every_row[:, :start]
    after = every_row[:, start + V:]
    rows = torch.cat([before, start + idx, after], 1)                           # (B, T - V + n)
    x = stream.x.gather(1, rows[..., None].expand(-1, -1, C))
    axes = stream.pos.shape[:-2]                                                # M-RoPE has three
    pos = per_variant(stream.pos, B, -2).gather(-1, rows.expand(*axes, -1, -1))
    next_pos = stream.next_pos
    if positions == "compact":
        if axes:
            raise InputError("positions compact: a visual token of this model has three positions "
                             "(M-RoPE), its place in the image, not a number; want keep")
        next_pos = x.shape[1]
        pos = torch.arange(next_pos, device=pos.device).expand(pos.shape)
    origin = per_variant(stream.origin, B).gather(1, idx)
    return replace(stream, x=x, pos=pos, next_pos=next_pos, visual=(start, idx.shape[1]),
                   origin=origin, queries=None)


def expand(stream: Stream, B: int) -> Stream:
    """Return the stream's variants as B, each one's copies side by side. They share the cache, and
    copies of a single one share everything."""
    queries = stream.queries
    if queries is not None:
        queries = per_variant(queries, B)
    return replace(stream, x=per_variant(stream.x, B), pos=per_variant(stream.pos, B, -2),
                   origin=per_variant(stream.origin, B), queries=queries)


def prefill(model, stream: Stream, schedule: list, seed: int | list = 0,
            info: dict[int, dict] | None = None, positions: str = "keep") -> Stream:
    """Run all layers under a schedule -> Stream past the last layer: the loop over its stages.

    schedule: (layer, method, amount) a stage, as `parse_schedule` returns them. A method and the
    seed may be lists: variants of the prompt. The stream may have run already, up to the layer of
    the first stage. info: by layer, what `prune` takes. Raises InputError.
    """
    for layer, method, amount in schedule:
        stream = model.run(stream, stop=layer)
        n = number_kept(amount, stream.N)
        measured = info.get(layer) if info else None
        stream = prune(model, stream, method, n, seed, measured, positions)
    return model.run(stream)


# ---- what a method sees --------------------------------------------------------------------------

@dataclass
class View:
    """What a method may look at: one variant at the input of `layer`.

    Plain tensors and functions, so that one can be built by hand.
    """
    layer: int
    visual: tuple[int, int]                                 # first visual row, and V
    x: Tensor                                               # (T, C) hidden states
    embeds: Tensor | None = None                            # (T at first, C) input embeddings
    embeds_visual: tuple[int, int] | None = None            # first visual row in embeds, and N
    # of the layer before: keys after the rotary embedding, and attention probabilities
    keys: Tensor | None = None                              # (T, G*D)
    attention: Callable[[Tensor], Tensor] | None = None     # rows (R,) -> (H, R, T)
    normed: Callable[[], Tensor] | None = None              # -> (T, C) the final norm of x
    saliency: Callable[[], Tensor] | None = None            # -> (V,) float32
    grid: tuple[int, int] | None = None
    origin: Tensor | None = None                            # (V,)
    info: Tensor | None = None                              # (V,) or (V, t), measured beforehand
    rng: torch.Generator | None = None                      # on the CPU

    @property
    def x_visual(self) -> Tensor:
        """Return (V, C) float32: every method selects in float32; bfloat16 changes the sets."""
        start, V = self.visual
        return self.x[start:start + V].float()


def view_of(model, stream: Stream, b: int, seed: int, info: list[Tensor] | None = None) -> View:
    """Return variant b of the stream, as a method sees it. info: (N,) or (N, t) of each prompt."""
    B = len(stream.x)
    prompt = b * len(stream.ids) // B
    origin = stream.origin[b]
    seed = seed + 1_000_003 * stream.layer          # each stage of a schedule draws on its own
    view = View(layer=stream.layer, visual=stream.visual, x=stream.x[b],
                embeds=stream.embeds[prompt], embeds_visual=(stream.visual[0], stream.N),
                grid=stream.grid, origin=origin, rng=torch.Generator().manual_seed(seed))
    view.normed = lambda: model.final_norm(stream.x[b])
    view.saliency = lambda: saliency_of(stream)[prompt, origin]
    if info is not None:
        view.info = info[prompt].to(origin.device)[origin]
    if stream.queries is not None:
        q = stream.queries[b]                                               # (H, T, D)
        keys = stream.cache[stream.layer - 1].keys
        k = keys[b * len(keys) // B]                                        # (G, T, D)
        view.keys = k.transpose(0, 1).flatten(1)
        view.attention = lambda rows: attention(q, k, rows)
    return view


def saliency_of(stream: Stream) -> Tensor:
    """Return the vision tower's saliency (P, N). Raises InputError where it scores fewer tokens."""
    saliency = stream.saliency()
    if saliency.shape[1] != stream.N:
        raise InputError(f"the vision tower scores {saliency.shape[1]} visual tokens but the model "
                         f"has {stream.N}, so methods that use saliency cannot run")
    return saliency


def attention(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Return causal attention probabilities of the given rows of q only: (H, R, S) float32.

    q: (H, T, D) of the last T of S rows. k: (G, S, D). A whole attention matrix is never kept.
    """
    k = k.float().repeat_interleave(len(q) // len(k), 0)        # a key head serves H / G queries
    scores = q[:, rows].float() @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    row = torch.as_tensor(rows, device=k.device) + k.shape[1] - q.shape[1]
    later = torch.arange(k.shape[1], device=k.device) > row[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


# ---- methods -------------------------------------------------------------------------------------
# Each is asked for 0 < n < V indices; `choose` sees to none and all.

def nothing(view: View, n: int) -> Tensor:
    """Keep nothing: every visual token leaves, whatever n is."""
    return torch.arange(0)


def uniform(view: View, n: int) -> Tensor:
    """Draw uniformly, without replacement: the baseline that no method beats past the horizon."""
    order = torch.randperm(view.visual[1], generator=view.rng)
    return order[:n].sort().values


def evenly_spaced(view: View, n: int) -> Tensor:
    """Take every so many-th token in raster order: the other baseline that looks at nothing."""
    V = view.visual[1]
    return (2 * torch.arange(n) + 1) * V // (2 * n)


def fastv(view: View, n: int) -> Tensor:
    """FastV (ECCV 2024, arXiv 2403.06764): attention of the last prompt token, mean over heads.

    The paper averages over all later tokens; the authors' code reads the last row only, as here.
    """
    start, V = view.visual
    last = torch.tensor([len(view.x) - 1])
    score = view.attention(last)[:, 0, start:start + V].mean(0)
    return highest(score, n)


def sparsevlm(view: View, n: int) -> tuple[Tensor, Tensor | None]:
    """SparseVLM (ICML 2025, arXiv 2410.04417), code v1.5: text raters score the visual tokens, and
    the best of those that leave are merged into a few.

    The n tokens are k kept and c merged. Where n is too small for that, n are kept, none merged.
    """
    score = attention_of_raters(view)
    order = score.argsort(descending=True, stable=True)
    split = recycling(n, view.visual[1])
    if split is None:
        return highest(score, n), None
    k, t, c = split
    recycled = order[k:k + t]
    centers, means = cluster(view.x_visual[recycled], c)
    rows = view.x_visual.clone()
    rows[recycled[centers]] = means             # a merged token takes the place of its center
    idx = torch.cat([order[:k], recycled[centers]]).sort().values
    return idx, rows[idx]


def attention_of_raters(view: View) -> Tensor:
    """Return SparseVLM's score (V,): attention of the text tokens that look most like the image."""
    start, V = view.visual
    first, N = view.embeds_visual
    visual = view.embeds[first:first + N].float()
    text = view.embeds[first + N:].float()
    relevance = (visual @ text.T).softmax(1).mean(0)                            # (text,)
    raters = (relevance > relevance.mean()).nonzero()[:, 0]
    if len(raters) == 0:
        raters = torch.arange(len(text))
    return view.attention(start + V + raters)[:, :, start:start + V].mean((0, 1))


def recycling(n: int, V: int) -> tuple[int, int, int] | None:
    """Divide n of V tokens as SparseVLM does: the largest k, so that k kept and c merged ones fit.

    Of the V - k others, t = int(0.3 * (V - k)) + 1 are recycled into c = int(t / 10) + 1.
    n = 6, V = 64: k = 4 are kept, and t = 19 become c = 2. None if not even k = 0 fits.
    """
    for k in range(n - 1, -1, -1):
        t = int(0.3 * (V - k)) + 1
        c = int(t / 10) + 1
        if k + c <= n:
            return k, t, c
    return None


def cluster(x: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Cluster rows (t, C) by DPC-kNN, as SparseVLM's code does -> indices of the c centers, and the
    mean (c, C) of each cluster.

    A center is dense and far from every denser row. Mutual neighbors are equally dense: then the
    lower index counts as denser, where the original adds random noise.
    """
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance * x.shape[1] ** -0.5
    nearest = distance.topk(c, largest=False).values                    # a row is one of its own
    density = (-nearest.square().mean(1)).exp()
    rank = density.argsort(descending=True, stable=True).argsort()
    denser = rank[None] < rank[:, None]
    separation = torch.where(denser, distance, distance.max()).amin(1)
    centers = (density * separation).argsort(descending=True, stable=True)[:c]
    member = distance[:, centers].argmin(1)
    member[centers] = torch.arange(c, device=x.device)
    belongs = (member == torch.arange(c, device=x.device)[:, None]).float()     # (c, t)
    return centers, belongs @ x / belongs.sum(1, keepdim=True)


def dart(view: View, n: int) -> Tensor:
    """DART (EMNLP 2025, arXiv 2502.11494): keep what is least like a few pivots.

    Pivots are the 4 visual and 4 text tokens of the largest key norms. They take turns by rank,
    the visual ones first; the authors' order is that of a Python set, an accident.
    """
    start, V = view.visual
    norm = view.keys.float().abs().sum(1)                               # L1, over all heads
    pivots = norm[start:start + V].argsort(descending=True, stable=True)[:4]
    text = norm[start + V:].argsort(descending=True, stable=True)[:4]
    if n <= len(pivots):
        return pivots[:n].sort().values
    h = F.normalize(view.normed().float(), dim=1)
    rows = torch.cat([start + pivots, start + V + text])
    similarity = h[start:start + V] @ h[rows].T                         # (V, 8)
    return least_similar_in_turn(similarity, pivots, n)


def least_similar_in_turn(similarity: Tensor, kept: Tensor, n: int) -> Tensor:
    """Add to the kept, until they are n: each pivot (column) in turn takes an equal share of the
    rows that are not yet kept and least similar to it. -> (n,) ascending."""
    share, rest = divmod(n - len(kept), similarity.shape[1])
    taken = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    taken[kept] = True
    for i, column in enumerate(similarity.T):
        order = column.masked_fill(taken, torch.inf).argsort(stable=True)
        size = share + 1 if i < rest else share
        taken[order[:size]] = True
    return taken.nonzero()[:, 0]


def divprune(view: View, n: int) -> Tensor:
    """DivPrune (CVPR 2025, arXiv 2503.02175): farthest-point sampling under cosine distance.

    A token is picked once; the authors' code picks duplicates again.
    """
    f = F.normalize(view.x_visual, dim=1)
    distance = (1 - f @ f.T).cpu().numpy()          # (V, V); each pick would wait for a GPU
    nearest = (distance + np.diag(np.full(len(f), np.inf, np.float32))).min(1)
    pick = nearest.argmax()                         # ties to the lowest index
    picked = [pick]
    nearest = distance[pick].copy()
    while len(picked) < n:
        nearest[pick] = -np.inf
        pick = nearest.argmax()
        picked.append(pick)
        np.minimum(nearest, distance[pick], out=nearest)
    return torch.tensor(sorted(picked))


def scope(view: View, n: int) -> Tensor:
    """SCOPE (NeurIPS 2025), greedy: a token gains what it adds to the coverage of all tokens, times
    the vision tower's saliency."""
    f = F.normalize(view.x_visual, dim=1)
    similarity = f @ f.T                                                # (V, V)
    saliency = view.saliency()
    covered = torch.zeros_like(saliency)
    picked = torch.zeros_like(saliency)             # -inf where a token is picked
    for _ in range(n):
        gain = (similarity - covered[:, None]).clamp_(min=0).sum(0)
        pick = torch.addcmul(picked, gain, saliency).argmax(0, keepdim=True)
        picked.index_fill_(0, pick, -torch.inf)
        covered = torch.maximum(covered, similarity.index_select(1, pick)[:, 0])
    return picked.isinf().nonzero()[:, 0]


def most_informative(view: View, n: int) -> Tensor:
    """Keep the tokens of the highest information, View.info (V,): the paper's oracle."""
    return highest(view.info, n)


def take_turns(view: View, n: int) -> Tensor:
    """Let the answer's tokens, columns of View.info (V, t), pick in turn: each takes the visual
    token of the highest value in its column that is not yet picked, ties to the lowest index."""
    columns = view.info.float().cpu().clone()       # each pick would wait for a GPU
    picked = []
    for turn in range(n):
        column = columns[:, turn % columns.shape[1]]
        pick = column.argmax()
        picked.append(pick)
        columns[pick] = -torch.inf
    return torch.stack(picked).sort().values


def highest(score: Tensor, n: int) -> Tensor:
    """Return the ascending indices of the n highest, ties to the lowest index."""
    return score.argsort(descending=True, stable=True)[:n].sort().values


@dataclass(frozen=True)
class Method:
    """A pruning method and what is true of it. Programs ask these fields and compare no names."""
    function: Callable              # (view, n) -> indices (n,), ascending
    color: str                      # "#rrggbb", in every picture
    needs_layer: bool = False       # it reads attention or keys of the layer before
    draws: bool = False             # at random: several seeds are averaged
    merges: bool = False            # it returns (indices, rows (n, C) to put there, or None)
    keeps_none: bool = False        # whatever n is: a stage of it has no amount
    measure: str = ""               # it needs View.info: the entry of information.MEASURES for it
    needs_gold: bool = False        # an oracle: its View.info is measured with the gold answer

    def __call__(self, view: View, n: int):
        return self.function(view, n)


METHODS = {
    "none": Method(nothing, "#000000", keeps_none=True),
    "random": Method(uniform, "#7f7f7f", draws=True),
    "grid": Method(evenly_spaced, "#b5651d"),
    "fastv": Method(fastv, "#d55e00", needs_layer=True),
    "sparsevlm": Method(sparsevlm, "#e69f00", needs_layer=True, merges=True),
    "dart": Method(dart, "#009e73", needs_layer=True),
    "divprune": Method(divprune, "#0072b2"),
    "scope": Method(scope, "#cc79a7"),
    "hindsight": Method(take_turns, "#882255", measure="attention"),
    "info": Method(most_informative, "#111111", measure="windows", needs_gold=True),
    "info-turns": Method(take_turns, "#56b4e9", measure="tokens", needs_gold=True),
}
ORACLES = tuple(name for name, method in METHODS.items() if method.needs_gold)


def check_method(name: str, layer: int):
    """Raise InputError if there is no such method, or if it cannot act at this layer."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; want one of {', '.join(METHODS)}")
    if layer == 0 and METHODS[name].needs_layer:
        raise InputError(f"{name} reads the layer before the one it prunes at: it cannot act at "
                         "layer 0; want 1 or later")


# ---- schedules and cost --------------------------------------------------------------------------

def parse_schedule(text: str) -> list[tuple[int, str, float | int]]:
    """Parse "divprune@0:0.5 none@20" -> [(0, "divprune", 0.5), (20, "none", 0)].

    A stage is (layer, method, amount), layers ascending. The amount after ":" is the fraction of
    the N tokens removed, a float; after "=" the number kept, an int; none has no amount. Raises
    InputError.
    """
    schedule = []
    for part in text.split():
        match = re.fullmatch(r"([\w-]+)@(\d{1,9})(?::(\d*\.?\d+(?:e-\d+)?)|=(\d{1,9}))?", part)
        if not match:
            raise InputError(f"schedule part {part!r} does not parse; want method@layer:ratio, "
                             "method@layer=count or none@layer, e.g. 'dart@2=252 none@20'")
        method, layer, ratio, number = match.groups()
        layer = int(layer)
        check_method(method, layer)
        has_amount = ratio is not None or number is not None
        if not has_amount and not METHODS[method].keeps_none:
            raise InputError(f"schedule part {part!r}: how many tokens stay? want {part}:0.9, the "
                             f"fraction removed, or {part}=20, the number kept")
        if has_amount and METHODS[method].keeps_none:
            raise InputError(f"schedule part {part!r}: {method} keeps nothing; want "
                             f"{method}@{layer}")
        if ratio and float(ratio) > 1:
            raise InputError(f"schedule part {part!r}: ratio is {ratio}, want 0..1, the fraction "
                             "removed")
        if schedule and layer <= schedule[-1][0]:
            raise InputError(f"schedule {text!r}: layer {layer} after layer {schedule[-1][0]}; "
                             "layers must ascend")
        amount = float(ratio) if ratio else int(number or 0)
        schedule.append((layer, method, amount))
    return schedule


def format_schedule(schedule) -> str:
    """Write a schedule as `parse_schedule` reads it."""
    parts = []
    for layer, method, amount in schedule:
        part = f"{method}@{layer}"
        if not METHODS[method].keeps_none:
            part += f"={amount}" if isinstance(amount, int) else f":{amount}"
        parts.append(part)
    return " ".join(parts)


def number_kept(amount: float | int, N: int) -> int:
    """Return how many of N tokens an amount keeps: an int that many, a float the fraction removed.
    """
    if isinstance(amount, int):
        return min(amount, N)
    return round(N * (1 - amount))


def visual_tokens(schedule: list, N: int, L: int) -> list[int]:
    """Return the number of visual tokens at the input of each of the L layers."""
    tokens = [N] * L
    for layer, _, amount in schedule:
        n = min(number_kept(amount, N), tokens[layer])
        tokens[layer:] = [n] * (L - layer)
    return tokens


def mean_visual_tokens(schedule: list, N: int, L: int) -> float:
    """Return the mean over the layers of the visual tokens at each layer's input: the budget that
    makes methods comparable."""
    return sum(visual_tokens(schedule, N, L)) / L


def flops(config, rows: list[int], past: int = 0) -> int:
    """Count the prefill FLOPs of the decoder layers, two per multiply-add.

    config: the text config. rows: at each layer's input. past: rows before them whose keys and
    values are in the cache. Grouped queries and the three MLP matrices are counted as they are,
    attention as half of its square. The vision tower and the output head are not in it.
    """
    d = config.hidden_size
    m = config.intermediate_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    total = 0
    for n in rows:
        projections = 2 * n * d * (d_q + 2 * d_kv) + 2 * n * d_q * d
        attended = 2 * n * (n + 2 * past) * d_q
        mlp = 6 * n * d * m
        total += projections + attended + mlp
    return total


# ---- greedy decoding -----------------------------------------------------------------------------

class Decoding(NamedTuple):
    """How answers are decoded: what `decode` takes behind the stream."""
    max_new_tokens: int = 16
    repetition_penalty: float = 1.0


@torch.inference_mode()
def decode(model, stream: Stream, max_new_tokens: int = 16,
           repetition_penalty: float = 1.0) -> list[str]:
    """Return the greedy answers of the B variants of a stream past the last layer.

    Stops when all have ended. repetition_penalty: logits of every token of prompt (image included)
    or answer are divided by it, negative ones multiplied, as in transformers; 1 changes nothing.
    """
    stream = with_room(stream)
    B = len(stream.x)
    answers = [[] for _ in range(B)]
    ended = [False] * B
    seen = per_variant(stream.ids, B)                               # (B, prompt and answers so far)
    for step in range(max_new_tokens):
        logits = model.logits(stream)
        repeated = logits.gather(1, seen)
        penalized = torch.where(repeated < 0, repeated * repetition_penalty,
                                repeated / repetition_penalty)
        logits.scatter_(1, seen, penalized)
        ids = logits.argmax(-1)                                 # (B,), ties to the lowest id
        for b, token in enumerate(ids.tolist()):
            ended[b] = ended[b] or token in model.eos
            if not ended[b]:
                answers[b].append(token)
        if all(ended) or step == max_new_tokens - 1:
            break
        seen = torch.cat([seen, ids[:, None]], 1)
        stream = model.run(model.append(stream, ids[:, None]))
    return [model.tokenizer.decode(answer).strip() for answer in answers]


class RoomyKV(KV):
    """A cache that lies in larger tensors: new rows are written behind the old ones, not copied.

    So only one continuation of it can be run. `append` doubles the room when it is used up.
    """

    def __init__(self, keys_room: Tensor, values_room: Tensor, rows: int):
        super().__init__(keys_room[:, :, :rows], values_room[:, :, :rows])
        self.keys_room = keys_room
        self.values_room = values_room
        self.rows = rows

    def append(self, k: Tensor, v: Tensor) -> "RoomyKV":
        rows = self.rows + k.shape[2]
        keys_room = self.keys_room
        values_room = self.values_room
        if rows > keys_room.shape[2]:
            keys_room = copy_with_room(keys_room, len(k), rows)
            values_room = copy_with_room(values_room, len(k), rows)
        keys_room[:, :, self.rows:rows] = k
        values_room[:, :, self.rows:rows] = v
        return RoomyKV(keys_room, values_room, rows)


def with_room(stream: Stream, rows: int = 16) -> Stream:
    """Return the stream with its cache copied to where there is room for so many rows more."""
    B = len(stream.x)
    cache = []
    for kv in stream.cache:
        keys_room = copy_with_room(kv.keys, B, rows)
        values_room = copy_with_room(kv.values, B, rows)
        cache.append(RoomyKV(keys_room, values_room, kv.keys.shape[2]))
    return replace(stream, cache=cache)


def copy_with_room(t: Tensor, B: int, rows: int) -> Tensor:
    """Copy (B | P | 1, G, T, D) into (B, G, T + rows, D), the last rows yet to be written."""
    room = t.new_empty(B, t.shape[1], t.shape[2] + rows, t.shape[3])
    room[:, :, :t.shape[2]] = per_variant(t, B)
    return room
