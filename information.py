"""Token information and the information horizon, as in arXiv 2512.07580.

    python information.py                       by layer, on the built-in model and benchmarks
    python information.py --model tiny/qwen --target answer --mode leave-one-out

The information of a window w of visual tokens at layer K, as the paper's code measures it:

    I(w, K) = P(y | of the visual tokens only w is left from the input of layer K on)
            - P(y | none is left from the input of layer K on)

y is the first token of the gold answer, P a softmax over the whole vocabulary. It is signed: below
0, the window alone makes the answer less likely than no image at all. The horizon is the layer from
which on dropping every visual token costs at most 1 % of the score; without gold answers, the one
from which on the answer's distribution hardly changes. Both are found of a benchmark, of each group
of its questions, and of each token of the answers.
"""
import base64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support import flags, report, statistics
from support.benchmarks import images_of
from support.files import read_image
from support.pictures import plot_information
from support.run import (RANK, collect, grouped, look_at, open_folder, provenance, settings_of,
                         start, write_result)
from support.statistics import from_there_on
from tokprune import (KV, METHODS, Decoding, InputError, Stream, attention, decode, keep, prefill,
                      some_of, together)

MODES = ("keep-one", "leave-one-out")
TARGETS = ("first", "answer", "each")
ROWS = 2 ** 15                          # most rows in a batch of variants, unless given
CPU_ROWS = 2 ** 12                      # on a CPU: more do not fit its caches, and take longer


# ---- information ---------------------------------------------------------------------------------

def information(model, image, question: str, answer: str, layers: list[int], window: int = 2,
                mode: str = "keep-one", target: str = "first") -> Tensor:
    """Return the information of one question: (len(layers), rows, cols) float32, signed; with one
    more dimension for target "each". See `token_information`.
    """
    stream = model.begin(image, question)
    return token_information(model, stream, answer, layers, window, mode, target)


def token_information(model, stream: Stream, answer: str, layers: list[int], window: int = 2,
                      mode: str = "keep-one", target: str = "first",
                      max_batch_tokens: int = ROWS) -> Tensor:
    """Measure the information of each window of window x window tokens at the input of each layer
    K, from a stream at layer 0 -> (len(layers), rows, cols) float32, counted in windows.

    mode "keep-one", as the paper's code has it:    I(w, K) = P(y | only w) - P(y | none)
    mode "leave-one-out", as its abstract reads:    I(w, K) = P(y | all) - P(y | all but w)
    target "first", the paper's: y is the first token of the answer, at the last prompt row.
    "answer", ours: the sum over the answer's tokens of P(y_t | y_<t), teacher-forced. "each": the
    same terms, not summed, and one more, that the answer ends: (len(layers), rows, cols, tokens+1).
    An empty answer has that one alone.

    All layers share one unpruned run. Rows before every removed token are not computed again: their
    keys and values come from it. Raises InputError.
    """
    assert stream.layer == 0, f"the stream is at layer {stream.layer}, want 0"
    [values] = information_of_prompts(model, {0: stream}, [answer], layers, window, mode, target,
                                      max_batch_tokens)
    return values


def information_of_prompts(model, streams: dict[int, Stream], answers: list[str],
                           layers: list[int], window: int = 2, mode: str = "keep-one",
                           target: str = "first", max_batch_tokens: int = ROWS) -> list[Tensor]:
    """Return `token_information` of each prompt, for its answer. Prompts whose answers have equally
    many tokens share the unpruned run.

    streams: unpruned, by layer, as `inputs_of_layers` takes them.
    """
    assert mode in MODES, f"mode is {mode!r}, want one of {MODES}"
    assert target in TARGETS, f"target is {target!r}, want one of {TARGETS}"
    check_grid(streams[0])
    ids_of = [model.answer_ids(answer) for answer in answers]
    if target == "first":
        ids_of = [ids[:1] for ids in ids_of]
    found = [None] * len(answers)
    for prompts in of_equal_length(ids_of):
        forced = torch.tensor([ids_of[p] for p in prompts], device=streams[0].x.device)
        if target != "each":
            forced = forced[:, :-1]                     # nothing is asked behind the last token
        if forced.shape[1]:
            known = {0: with_answer(model, some_of(streams[0], prompts), forced)}
            numbers = range(len(prompts))               # of the prompts in these streams
        else:                                           # nothing is forced: the prompts themselves
            known = streams
            numbers = prompts
        full_streams = inputs_of_layers(model, known, [*layers, model.num_layers])
        for p, number in zip(prompts, numbers):
            ids_at = [[token] for token in ids_of[p]]
            if target == "each" or not ids_at:
                ids_at.append(sorted(model.eos))        # any of several ids may end an answer
            *of_prompt, last = [some_of(one, [number]) for one in full_streams.values()]
            values = terms_of_windows(model, of_prompt, last, ids_at, layers, window, mode,
                                      max_batch_tokens)
            found[p] = values if target == "each" else values.sum(-1)
    return found


def of_equal_length(ids_of: list[list[int]]) -> list[list[int]]:
    """Return which prompts have answers of equally many tokens: their numbers, group by group."""
    return list(grouped(range(len(ids_of)), lambda p: len(ids_of[p])).values())


def terms_of_windows(model, streams: list[Stream], full_stream: Stream, ids_at: list[list[int]],
                     layers: list[int], window: int, mode: str, max_batch_tokens: int) -> Tensor:
    """Return (len(layers), rows, cols, tokens): the terms of I(w, K) for each answer token.

    streams: one prompt and its answer, unpruned, at the input of each layer; full_stream: past the
    last.
    """
    groups = groups_of_windows(full_stream.grid, window, mode)
    values = torch.zeros(len(streams), sum(len(group.windows) for group in groups), len(ids_at))
    for group in groups:
        values[:, group.windows] = probabilities_left(
            model, streams, full_stream, group.prefix, group.kept, ids_at, max_batch_tokens)
    if mode == "keep-one":
        nothing = torch.zeros(1, 0, dtype=torch.long)
        values -= probabilities_left(model, streams, full_stream, 0, nothing, ids_at,
                                     max_batch_tokens)
    else:
        values = probabilities(model, full_stream, ids_at).cpu() - values
    place = {stream.layer: i for i, stream in enumerate(streams)}
    values = values[[place[layer] for layer in layers]]
    rows, cols = full_stream.grid
    return values.unflatten(1, (-(-rows // window), -(-cols // window)))


def check_grid(stream: Stream):
    """Raise InputError where the visual tokens do not tile the image."""
    rows, cols = stream.grid
    if stream.N != rows * cols:
        raise InputError(f"information is measured in windows of a grid, and the {stream.N} visual "
                         f"tokens of this model are not {rows} x {cols}")


def with_answer(model, stream: Stream, ids: Tensor) -> Stream:
    """Return a stream at layer 0 with an answer's tokens (P, n) behind each prompt, for teacher
    forcing."""
    answer_stream = model.append(stream, ids)
    x = torch.cat([stream.x, answer_stream.x], 1)
    pos = torch.cat([stream.pos, answer_stream.pos], -1)
    return replace(stream, x=x, pos=pos)


def inputs_of_layers(model, streams: dict[int, Stream], layers: list[int]) -> dict[int, Stream]:
    """Return the unpruned stream at the input of each of the layers, ascending; `num_layers` is
    past the last one.

    streams: those that are there already, by layer; the one at layer 0 at least. From them the
    model runs on to the others.
    """
    streams = dict(streams)
    for layer in sorted(set(layers)):
        if layer not in streams:
            before = max(there for there in streams if there < layer)
            streams[layer] = model.run(streams[before], stop=layer)
    return {layer: streams[layer] for layer in sorted(set(layers))}


def probabilities_left(model, streams: list[Stream], full_stream: Stream, prefix: int, kept: Tensor,
                       ids_at: list[list[int]], max_batch_tokens: int) -> Tensor:
    """Return `probabilities` (layers, windows, tokens) where, from the layer of each stream on, the
    first `prefix` visual tokens and those of `kept` are left.

    kept: (windows, n), counted from `prefix`.
    """
    _, V = full_stream.visual
    rows = full_stream.x.shape[1] - V + prefix + kept.shape[1]
    if full_stream.x.device.type == "cpu":
        max_batch_tokens = min(max_batch_tokens, CPU_ROWS)
    room = max(1, max_batch_tokens // rows)                     # variants in a batch
    values = torch.zeros(len(streams), len(kept), len(ids_at))
    for some_layers, some_windows in batches(len(streams), len(kept), room):
        some_streams = streams[some_layers]
        last_stream = run_together(model, some_streams, full_stream, prefix, kept[some_windows])
        found = probabilities(model, last_stream, ids_at).cpu()
        values[some_layers, some_windows] = found.unflatten(0, (len(some_streams), -1))
    return values


def batches(layers: int, windows: int, room: int) -> list[tuple[slice, slice]]:
    """Divide all pairs of a layer and a window into batches of at most `room`. As many windows as
    possible share one, for a batch is small until its last layer has joined. batches(3, 2, 4) ->
    layers 0:2 with windows 0:2, then 2:4 with 0:2."""
    width = min(windows, room)                          # windows in a batch
    depth = room // width                               # layers in a batch
    return [(slice(i, i + depth), slice(j, j + width))
            for i in range(0, layers, depth) for j in range(0, windows, width)]


def run_together(model, streams: list[Stream], full_stream: Stream, prefix: int,
                 kept: Tensor) -> Stream:
    """Run every window at every layer as one batch, to past the last layer. Variants are ordered by
    layer, then by window; each joins the batch at its own layer.

    Streams at layers 3 and 5 and windows a and b: layers 3 and 4 run the batch [3a, 3b], layers 5
    and later run [3a, 3b, 5a, 5b].
    """
    first, _ = full_stream.visual
    shared = first + prefix                             # rows whose cache the unpruned run has
    cache = [KV(kv.keys[:, :, :shared], kv.values[:, :, :shared]) for kv in full_stream.cache]
    joining = {stream.layer: stream for stream in streams}
    batch = None
    for layer in range(streams[0].layer, model.num_layers):
        if layer in joining:
            variants = keep(rows_behind(joining[layer], prefix), kept)
            batch = variants if batch is None else join(batch, variants)
        # variants read the shared rows alone: what the layer appended to the cache is dropped
        batch = model.run(replace(batch, cache=cache), stop=layer + 1)
    return batch


def rows_behind(stream: Stream, prefix: int) -> Stream:
    """Return the rows of a stream from visual token `prefix` on; the cache holds those before."""
    first, V = stream.visual
    behind = slice(first + prefix, None)
    return replace(stream, x=stream.x[:, behind], pos=stream.pos[..., behind],
                   visual=(0, V - prefix), origin=stream.origin[:, prefix:], queries=None)


def join(a: Stream, b: Stream) -> Stream:
    """Return the variants of both streams, at the layer of both."""
    return replace(b, x=torch.cat([a.x, b.x]), pos=torch.cat([a.pos, b.pos], -2),
                   origin=torch.cat([a.origin, b.origin]), queries=None)


def probabilities(model, stream: Stream, ids_at: list[list[int]]) -> Tensor:
    """Return the probability of each answer token (B, tokens) float32, teacher-forced: the stream
    ends with all of them but the last.

    ids_at[t]: the ids that count at step t; several for the end of the answer, summed.
    """
    columns = []
    for t, ids in enumerate(ids_at):
        logits = model.logits(stream, row=t - len(ids_at))
        columns.append(logits.softmax(-1)[:, ids].sum(-1))
    return torch.stack(columns, 1)


# ---- windows -------------------------------------------------------------------------------------

@dataclass
class Group:
    """Windows that leave equally many rows to compute, so that they can be one batch."""
    windows: list[int]      # numbers of the windows, in raster order
    prefix: int             # visual tokens before every removed one: taken from the unpruned run
    kept: Tensor            # (windows, n) those computed anew, counted from the prefix


def groups_of_windows(grid: tuple[int, int], window: int, mode: str) -> list[Group]:
    """Divide the windows of a grid into groups that can each be one batch.

    Keep-one computes the tokens of a window only. Leave-one-out computes every token behind a
    removed one. Windows side by side share the prefix that ends before their rows.
    """
    rows, cols = grid
    alike = {}
    for number, tokens in enumerate(windows_of(grid, window)):
        prefix = 0
        kept = tokens
        if mode == "leave-one-out":
            strip = window * cols
            prefix = int(tokens[0]) // strip * strip
            removed = set(tokens.tolist())
            others = [token for token in range(prefix, rows * cols) if token not in removed]
            kept = torch.tensor(others, dtype=torch.long) - prefix
        alike.setdefault((prefix, len(kept)), []).append((number, kept))
    groups = []
    for (prefix, _), members in alike.items():
        numbers = [number for number, _ in members]
        groups.append(Group(numbers, prefix, torch.stack([kept for _, kept in members])))
    return groups


def windows_of(grid: tuple[int, int], window: int) -> list[Tensor]:
    """Return the tokens of each window, in raster order. Windows are smaller at the right and
    bottom."""
    rows, cols = grid
    token = torch.arange(rows * cols).view(grid)
    windows = []
    for r in range(0, rows, window):
        for c in range(0, cols, window):
            windows.append(token[r:r + window, c:c + window].flatten())
    return windows


def per_token(values: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Return values (rows, cols, ...) of windows as (N, ...): a window's tokens share its value."""
    rows, cols = grid
    values = values.repeat_interleave(window, 0).repeat_interleave(window, 1)
    return values[:rows, :cols].flatten(0, 1)


# ---- what methods need beforehand ----------------------------------------------------------------
# Each is measured for an answer to each prompt of unpruned streams, by layer, as `inputs_of_layers`
# takes them: (layers, N, ...) a prompt.

def information_of_windows(model, streams: dict[int, Stream], answers: list[str],
                           layers: list[int], max_batch_tokens: int = ROWS) -> list[Tensor]:
    """Return (layers, N) a prompt for the paper's oracle: the answer's first token, windows of
    2x2."""
    found = information_of_prompts(model, streams, answers, layers,
                                   max_batch_tokens=max_batch_tokens)
    return [torch.stack([per_token(windows, streams[0].grid, 2) for windows in values])
            for values in found]


def information_of_tokens(model, streams: dict[int, Stream], answers: list[str], layers: list[int],
                          max_batch_tokens: int = ROWS) -> list[Tensor]:
    """Return (layers, N, t) a prompt: each answer token and the answer's end, of single visual
    tokens."""
    found = information_of_prompts(model, streams, answers, layers, window=1, target="each",
                                   max_batch_tokens=max_batch_tokens)
    return [values.flatten(1, 2) for values in found]


def attention_of_answer(model, streams: dict[int, Stream], answers: list[str], layers: list[int],
                        max_batch_tokens: int = ROWS) -> list[Tensor]:
    """Return (layers, N, t) a prompt: attention of the rows that write each token of the answer, in
    the unpruned run, mean over heads and over the layers K and later. One row an answer token is
    computed, so that max_batch_tokens bounds nothing."""
    stream, full_stream = inputs_of_layers(model, streams, [0, model.num_layers]).values()
    first, N = stream.visual
    ids_of = [model.answer_ids(answer) for answer in answers]
    found = [None] * len(answers)
    for prompts in of_equal_length(ids_of):
        ids = torch.tensor([ids_of[p] for p in prompts], dtype=torch.long, device=stream.x.device)
        answer_stream = rows_that_write(model, some_of(stream, prompts),
                                        some_of(full_stream, prompts), ids)
        rows = torch.arange(answer_stream.x.shape[1])
        attended = []
        for layer in range(model.num_layers):
            answer_stream = model.run(answer_stream, stop=layer + 1)
            keys = answer_stream.cache[layer].keys
            of_prompts = [attention(q, k, rows)[:, :, first:first + N].mean(0).T
                          for q, k in zip(answer_stream.queries, keys)]
            attended.append(torch.stack(of_prompts))
        attended = torch.stack(attended)                            # (L, prompts, N, t)
        for i, p in enumerate(prompts):
            found[p] = torch.stack([attended[layer:, i].mean(0) for layer in layers])
    return found


def rows_that_write(model, stream: Stream, full_stream: Stream, ids: Tensor) -> Stream:
    """Return the rows that write the answers (P, n), at layer 0: the last prompt row, which writes
    the first token, and the answer's tokens but the last. The rows before them are in the cache,
    which the unpruned run has."""
    answer_stream = model.append(full_stream, ids[:, :-1])
    x = torch.cat([stream.x[:, -1:], answer_stream.x], 1)
    pos = torch.cat([stream.pos[..., -1:], answer_stream.pos], -1)
    cache = [KV(kv.keys[:, :, :-1], kv.values[:, :, :-1]) for kv in full_stream.cache]
    return replace(answer_stream, x=x, pos=pos, cache=cache)


@dataclass(frozen=True)
class Measure:
    """What a method may need beforehand: a function of the unpruned streams and an answer to each
    prompt."""
    function: Callable      # (model, streams, answers, layers, max_batch_tokens) -> values a prompt
    target: str             # which gold answer it is for: "first", or "answer" as a whole


MEASURES = {"windows": Measure(information_of_windows, "first"),
            "tokens": Measure(information_of_tokens, "answer"),
            "attention": Measure(attention_of_answer, "answer")}


def measure_beforehand(model, streams: dict[int, Stream], layers_of: dict[str, set[int]],
                       answers_for, max_batch_tokens: int = ROWS) -> dict[int, dict]:
    """Return {layer: {method: values of the N visual tokens, a prompt}}, as `prefill` takes it.

    streams: unpruned, by layer, as `inputs_of_layers` takes them. layers_of: where each method
    prunes. answers_for(method) -> the answer to each prompt that it measures.
    """
    info = {}
    for name, at in layers_of.items():
        method = METHODS[name]
        if method.measure:
            layers = sorted(at)
            measure = MEASURES[method.measure].function
            found = measure(model, streams, answers_for(method), layers, max_batch_tokens)
            for i, layer in enumerate(layers):
                info.setdefault(layer, {})[name] = [values[i] for values in found]
    return info


# ---- the horizon ---------------------------------------------------------------------------------

def horizon(curve, full: float, tolerance: float = 0.01) -> int:
    """Find the first layer from which on dropping every visual token never costs more than
    `tolerance` of the full score, the unpruned model's. The paper gives no rule; this one is ours.

    curve: the score with all dropped at the input of layer 0, 1, ... -> len(curve) if there is
    none, or if the full score is 0, which can show no loss.
    """
    return from_there_on([full > 0 and pruned >= full - tolerance * full for pruned in curve])


def answers_without_image(model, stream: Stream,
                          decoding: Decoding = Decoding()) -> list[dict[str, str]]:
    """Return the greedy answers to each prompt, "unpruned" and with every visual token dropped at
    the input of layer "0", "1", ..., from a stream at layer 0."""
    answers = [{} for _ in stream.x]
    for layer in range(model.num_layers + 1):
        stream = model.run(stream, stop=layer)
        last = layer == model.num_layers
        without_stream = stream if last else prefill(model, stream, [(layer, "none", 0)])
        key = "unpruned" if last else str(layer)
        for of_prompt, answer in zip(answers, decode(model, without_stream, *decoding)):
            of_prompt[key] = answer
    return answers


def tokens_without_image(model, stream: Stream, answer: str) -> tuple[list, list]:
    """Return what dropping every visual token at the input of layer K = 0, 1, ... does to each
    token of the model's own answer, teacher-forced, and to what follows, its end.

    Two lists of shape (L, tokens + 1): the divergence KL(P unpruned || P with all dropped), in
    nats, and whether the most likely token is the same. Needs no gold answer. Ours.
    """
    ids = model.answer_ids(answer)
    answer_ids = torch.tensor([ids], dtype=torch.long, device=stream.x.device)
    prompt_stream = with_answer(model, stream, answer_ids)
    layers = range(model.num_layers + 1)
    *streams, full_stream = inputs_of_layers(model, {0: prompt_stream}, layers).values()
    nothing = torch.zeros(1, 0, dtype=torch.long)
    without_streams = run_together(model, streams, full_stream, 0, nothing)
    divergence = []
    same = []
    for row in range(-len(ids) - 1, 0):
        want = model.logits(full_stream, row).log_softmax(-1)                   # (1, vocab)
        got = model.logits(without_streams, row).log_softmax(-1)                # (L, vocab)
        terms = F.kl_div(got, want.expand_as(got), log_target=True, reduction="none")
        divergence.append(terms.sum(-1))
        same.append(got.argmax(-1) == want.argmax(-1))
    return torch.stack(divergence, 1).tolist(), torch.stack(same, 1).tolist()


def divergence_horizon(curve, threshold: float = 0.002) -> int:
    """Find the horizon without gold answers: the first layer from which on the mean divergence is
    at most `threshold` of layer 0's. Ours; the threshold was chosen after seeing the built-in
    models.
    """
    return from_there_on([nats <= threshold * curve[0] for nats in curve])


# ---- a benchmark ---------------------------------------------------------------------------------

def measure_questions(model, questions: list, images: list, layers: list[int], whose: str,
                      window: int, mode: str, target: str, max_batch_tokens: int,
                      decoding: Decoding) -> list[dict]:
    """Return the records of questions of equal shape: answers and scores by the layer where
    everything is dropped, what `tokens_without_image` finds, and the information of the answer.

    whose: "gold", or "own" for the model's.
    """
    streams = [model.begin(image, question.prompt) for question, image in zip(questions, images)]
    records = []
    for question, stream, said in zip(questions, streams,
                                      answers_without_image(model, together(streams), decoding)):
        own = said["unpruned"]
        # without a gold answer, the unpruned one is right
        scores = {layer: question.points(answer) if question.gold else float(answer == own)
                  for layer, answer in said.items()}
        answer = answer_to_measure(question, whose, target, own)
        values = token_information(model, stream, answer, layers, window, mode, target,
                                   max_batch_tokens)
        divergence, same = tokens_without_image(model, stream, own)
        records.append({"answers": said, "scores": scores, "divergence": divergence, "same": same,
                        "information": to_json(values.numpy())})
    return records


def answer_to_measure(question, whose: str, target: str, own: str) -> str:
    """Return the gold answer for this target or, if whose is "own", the model's own; where that is
    empty, the gold one if there is one."""
    if whose == "own" and (own or not question.gold):
        return own
    return question.gold_for(target)


def horizons_of(questions: list, records: list[dict], tolerance: float, threshold: float) -> dict:
    """Return the horizon by both rules, {"score": {...}, "divergence": {...}}: layer, interval and
    draws as `horizon_interval` does, and the curve ("unpruned" and "scores", or "nats").

    "half" is the first layer from which on half of what the image adds to the score is there, or at
    most half of layer 0's divergence is left. The divergence is that of the answer without its end.
    """
    image = images_of(questions)
    keys = [str(layer) for layer in range(len(records[0]["divergence"]))]
    scores = np.array([[record["scores"][key] for key in ["unpruned", *keys]]
                       for record in records])
    divergence = np.array([np.array(record["divergence"])[:, :-1].sum(1) for record in records])
    by_score = statistics.horizon_interval(
        scores, image, lambda curve: horizon(curve[1:], curve[0], tolerance))
    full, *pruned = scores.mean(0).tolist()
    half = [score >= (full + pruned[0]) / 2 for score in pruned]
    by_score |= {"unpruned": 100 * full, "half": from_there_on(half),
                 "scores": [100 * score for score in pruned]}
    by_divergence = statistics.horizon_interval(
        divergence, image, lambda curve: divergence_horizon(curve, threshold))
    nats = divergence.mean(0).tolist()
    by_divergence |= {"nats": nats, "half": divergence_horizon(nats, 0.5)}
    return {"score": by_score, "divergence": by_divergence, "questions": len(questions)}


def horizons_of_parts(questions: list, records: list[dict], tolerance: float,
                      threshold: float) -> dict[str, dict]:
    """Return `horizons_of` each group of a benchmark's questions that has images enough for an
    interval, and of each token of the model's own answers: the first, the second, ... as far as
    half of the answers go, the last, and the answer's end. A token scores 1 while it stays the most
    likely one.
    """
    parts = {}                                          # name -> which questions, their records
    numbers = range(len(questions))
    for group, members in grouped(numbers, lambda i: questions[i].group).items():
        if group and len({questions[i].image for i in members}) >= statistics.FEW:
            parts[group] = members, [records[i] for i in members]
    lengths = [len(record["divergence"][0]) - 1 for record in records]
    places = {f"token {t + 1}": t for t in range(int(np.median(lengths)))}
    places |= {"last token": -2, "the answer's end": -1}
    for name, place in places.items():
        # an answer of n tokens has n + 1 places, of which the last is its end
        have = [i for i, n in enumerate(lengths) if -n - 1 <= place < n]
        if have:
            parts[name] = have, [record_of_token(records[i], place) for i in have]
    return {name: horizons_of([questions[i] for i in members], found, tolerance, threshold)
            for name, (members, found) in parts.items()}


def record_of_token(record: dict, place: int) -> dict:
    """Return the record of a question as if its answer were the token at a place."""
    same = {str(layer): float(of_layer[place]) for layer, of_layer in enumerate(record["same"])}
    end = 0.0                                           # which `horizons_of` leaves out
    return {"scores": {"unpruned": 1.0, **same},
            "divergence": [[of_layer[place], end] for of_layer in record["divergence"]]}


def count_spaces(model, questions: list, records: list[dict], whose: str) -> int:
    """Count the answers whose first token is only a space, which says nothing about them. LLaMA's
    tokenizer writes one before a number: "2" and "7" have the same first token."""
    spaces = 0
    for question, record in zip(questions, records):
        answer = answer_to_measure(question, whose, "first", record["answers"]["unpruned"])
        ids = model.answer_ids(answer)[:1]
        spaces += bool(ids) and not model.tokenizer.decode(ids).strip()
    return spaces


def to_json(values: np.ndarray) -> dict:
    """Write an array as JSON without loss: for a line of answers.jsonl."""
    data = base64.b64encode(values.astype("<f4").tobytes()).decode()
    return {"shape": list(values.shape), "float32": data}


def from_json(stored: dict) -> np.ndarray:
    """Read what `to_json` wrote."""
    data = base64.b64decode(stored["float32"])
    return np.frombuffer(data, "<f4").reshape(stored["shape"])


# ---- the program ---------------------------------------------------------------------------------

def parse_arguments(argv: list[str]):
    p = flags.Parser("information.py", "Token information by layer, and the information horizon.")
    group = p.add_argument_group("what to measure")
    group.add_argument("--layer", default="all",
                       help="layers to measure information at: 20, or 2,10,20, or all (default: "
                            "all)")
    group.add_argument("--mode", choices=MODES, default=MODES[0],
                       help=f"compare a window kept with none kept, or all with the window removed "
                            f"(default: {MODES[0]})")
    group.add_argument("--target", choices=["first", "answer"], default="first",
                       help="measure the answer's first token, or all of them (default: first)")
    group.add_argument("--window", type=flags.whole(1), default=2, metavar="N",
                       help="measure windows of N x N visual tokens (default: 2)")
    flags.add_information_flags(group)
    group.add_argument("--tolerance", type=flags.share, default=0.01, metavar="T",
                       help="share of the score that may be lost past the horizon (default: 0.01)")
    group.add_argument("--threshold", type=flags.share, default=0.002, metavar="T",
                       help="divergence past the horizon, as a share of layer 0's (default: 0.002)")
    flags.add_answer_flags(flags.add_model_flags(p))
    flags.add_data_flags(p, limit=100)
    flags.add_output_flags(p, "picture to write (default: information.svg in the run folder)")
    args = p.parse_args(argv)
    flags.check_picture(args.plot)
    return args


def main(argv: list[str]):
    args = parse_arguments(argv)
    layers = sorted(set(flags.parse_layers(args.layer, flags.num_layers(args))))
    data = flags.load_data(args, gold=args.answers == "gold")
    model = flags.load_model(args)
    samples = {name: flags.sample(known, args.limit, args.seed) for name, known in data.items()}
    look_at(model, samples)
    settings = settings_of(args, model, data)
    out = open_folder(args, settings)
    result = settings | provenance(args, model) | {"prompts": {}, "benchmarks": {}}
    examples = {}
    maps = {"layers": np.array(layers)}

    def work(questions, images):
        return measure_questions(model, questions, images, layers, args.answers, args.window,
                                 args.mode, args.target, args.max_batch_tokens,
                                 flags.decoding(args))
    for benchmark, questions in data.items():
        asked = samples[benchmark]
        prompt = report.print_asked(benchmark, asked, questions, flags.template(model))
        records = collect(out, benchmark, asked, model, work, flags.at_once(args, 1))
        values = [from_json(record["information"]) for record in records]
        for question, value in zip(asked, values):
            maps[f"{benchmark}/{question.id}"] = value
        found = summarize(asked, records, values, layers, args.tolerance, args.threshold)
        found["space"] = count_spaces(model, asked, records, args.answers)
        report.print_information(benchmark, found, args.tolerance, args.threshold, args.target)
        result["prompts"][benchmark] = prompt
        result["benchmarks"][benchmark] = found
        answer = answer_to_measure(asked[0], args.answers, args.target,
                                   records[0]["answers"]["unpruned"])
        canvas = model.canvas(read_image(asked[0].image))
        examples[benchmark] = canvas, values[0], asked[0].prompt, answer
    report.print_distance_of_horizons(result["benchmarks"])
    result["benchmarks"] = without_draws(result["benchmarks"])
    picture = args.plot or out / "information.svg"
    if RANK == 0:
        save_maps(out / "information.npz", maps)
        plot_information(result["benchmarks"], examples, picture)
    print(f"{args.mode}, {args.target}, windows of {args.window} x {args.window}; "
          f"{flags.where(model)}; {flags.penalty(args)}; maps in {out / 'information.npz'}, "
          f"picture in {picture}")
    write_result(out, result, args.json)


def summarize(questions: list, records: list[dict], values: list[np.ndarray], layers: list[int],
              tolerance: float, threshold: float) -> dict:
    """Return a benchmark's part of result.json: information by layer, horizons, counts."""
    rows = statistics.information_by_layer(values, images_of(questions), layers)
    horizons = horizons_of(questions, records, tolerance, threshold)
    with_gold = [record for question, record in zip(questions, records) if question.gold]
    return {"information": rows, "horizons": horizons, "horizon": horizons["score"],
            "parts": horizons_of_parts(questions, records, tolerance, threshold),
            "vanishes": statistics.layer_without_information(rows), "asked": len(questions),
            "images": len({question.image for question in questions}),
            "with_gold": len(with_gold),
            "right": sum(record["scores"]["unpruned"] == 1 for record in with_gold)}


def without_draws(found):
    """Return what was found without the draws of bootstraps."""
    if not isinstance(found, dict):
        return found
    return {key: without_draws(value) for key, value in found.items() if key != "draws"}


def save_maps(file: Path, maps: dict[str, np.ndarray]):
    """Write the map of every question, which answers.jsonl holds too. Raises InputError."""
    try:
        np.savez(file, **maps)
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror}); want room for it")


if __name__ == "__main__":
    start(main)
