"""Token information and the information horizon, as in arXiv 2512.07580.

    python information.py                       by layer, on the built-in model and benchmarks
    python information.py --model tiny/qwen --target answer --mode leave-one-out

The information of a window w of visual tokens at layer K, as the paper's code measures it:

    I(w, K) = P(y | of the visual tokens only w is left from the input of layer K on)
            - P(y | none is left from the input of layer K on)

y is the first token of the gold answer, P a softmax over the whole vocabulary. It is signed: below
0, the window alone makes the answer less likely than no image at all. The horizon is the layer from
which on dropping every visual token costs nothing.
"""
import base64
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support import report, runs, statistics
from support.benchmarks import images_of, score
from support.files import read_image
from support.pictures import plot_information
from support.records import RANK, collect
from tokprune import (KV, InputError, Stream, attention, attention_of_raters, flops, keep,
                      view_of)

MODES = ("keep-one", "leave-one-out")
TARGETS = ("first", "answer", "each")


# ---- information ---------------------------------------------------------------------------------

def information(model, image, question: str, answer: str, layers: list[int], window: int = 2,
                mode: str = "keep-one", target: str = "first") -> Tensor:
    """Of one question: (len(layers), rows, cols) float32, signed; see `token_information`."""
    stream = model.begin(image, question)
    return token_information(model, stream, answer, layers, window, mode, target)


def token_information(model, stream: Stream, answer: str, layers: list[int], window: int = 2,
                      mode: str = "keep-one", target: str = "first",
                      max_batch_tokens: int = 2 ** 15) -> Tensor:
    """The information of each window of window x window tokens at the input of each layer K, from a
    stream at layer 0: (len(layers), rows, cols) float32, rows and cols counted in windows.

    mode "keep-one", as the paper's code has it:    I(w, K) = P(y | only w) - P(y | none)
    mode "leave-one-out", as its abstract reads:    I(w, K) = P(y | all) - P(y | all but w)
    target "first", the paper's: y is the first token of the answer, at the last prompt row.
    "answer", ours: the sum over the answer's tokens of P(y_t | y_<t), teacher-forced. "each": the
    same terms, not summed, and one more, that the answer ends: (len(layers), rows, cols, tokens+1).

    All layers share one unpruned run. Rows before every removed token are not computed again: their
    keys and values come from it. Raises InputError.
    """
    assert mode in MODES, f"mode is {mode!r}, want one of {MODES}"
    assert target in TARGETS, f"target is {target!r}, want one of {TARGETS}"
    assert stream.layer == 0, f"the stream is at layer {stream.layer}, want 0"
    check_grid(stream)
    ids = model.answer_ids(answer)
    if not ids:
        raise InputError(f"information: the answer {answer!r} has no token; want one at least")
    if target == "first":
        ids = ids[:1]
    said = [[token] for token in ids]                   # any of several ids may end the answer
    if target == "each":
        said.append(sorted(model.eos))
    prompt = with_answer(model, stream, [tokens[0] for tokens in said[:-1]])
    streams = inputs_of_layers(model, prompt, layers)
    full = model.run(streams[-1])
    groups = groups_of_windows(stream.grid, window, mode)
    values = torch.zeros(len(streams), sum(len(group.windows) for group in groups), len(said))
    for group in groups:
        values[:, group.windows] = probabilities_left(
            model, streams, full, group.prefix, group.kept, said, max_batch_tokens)
    if mode == "keep-one":
        nothing = torch.zeros(1, 0, dtype=torch.long)
        values -= probabilities_left(model, streams, full, 0, nothing, said, max_batch_tokens)
    else:
        values = probabilities(model, full, said).cpu() - values
    place = {stream.layer: i for i, stream in enumerate(streams)}
    values = values[[place[layer] for layer in layers]]
    rows, cols = stream.grid
    values = values.unflatten(1, (-(-rows // window), -(-cols // window)))
    return values if target == "each" else values.sum(-1)


def check_grid(stream: Stream):
    rows, cols = stream.grid
    if stream.N != rows * cols:
        raise InputError(f"information is measured in windows of a grid, and the {stream.N} visual "
                         f"tokens of this model are not {rows} x {cols}")


def with_answer(model, stream: Stream, ids: list[int]) -> Stream:
    """A stream at layer 0 with tokens of an answer behind the prompt, for teacher forcing."""
    answer = model.append(stream, torch.tensor([ids], dtype=torch.long, device=stream.x.device))
    x = torch.cat([stream.x, answer.x], 1)
    pos = torch.cat([stream.pos, answer.pos], -1)
    return replace(stream, x=x, pos=pos)


def inputs_of_layers(model, stream: Stream, layers: list[int]) -> list[Stream]:
    """The unpruned stream at the input of each of the layers, once each, ascending."""
    streams = []
    for layer in sorted(set(layers)):
        stream = model.run(stream, stop=layer)
        streams.append(stream)
    return streams


def probabilities_left(model, streams: list[Stream], full: Stream, prefix: int, kept: Tensor,
                       said: list[list[int]], max_batch_tokens: int) -> Tensor:
    """(layers, windows, tokens): `probabilities` where, from the layer of each stream on, the first
    `prefix` visual tokens and those of `kept` are left. kept: (windows, n), counted from `prefix`.
    """
    _, V = full.visual
    rows = full.x.shape[1] - V + prefix + kept.shape[1]
    room = max(1, max_batch_tokens // rows)                     # variants in a batch
    values = torch.zeros(len(streams), len(kept), len(said))
    for some_layers, some_windows in batches(len(streams), len(kept), room):
        together = streams[some_layers]
        ends = run_together(model, together, full, prefix, kept[some_windows])
        found = probabilities(model, ends, said).cpu()
        values[some_layers, some_windows] = found.unflatten(0, (len(together), -1))
    return values


def batches(layers: int, windows: int, room: int) -> list[tuple[slice, slice]]:
    """All pairs of a layer and a window, in batches of at most `room`: as many layers as possible
    together. batches(2, 3, 4) -> layers 0:2 with windows 0:2, then layers 0:2 with windows 2:4."""
    slices = []
    for i in range(0, layers, room):
        together = min(room, layers - i)
        step = room // together
        for j in range(0, windows, step):
            slices.append((slice(i, i + together), slice(j, j + step)))
    return slices


def run_together(model, streams: list[Stream], full: Stream, prefix: int, kept: Tensor) -> Stream:
    """Runs every window at every layer as one batch, to past the last layer. Variants are ordered
    by layer, then by window; each joins the batch at its own layer.

    Streams at layers 3 and 5 and windows a and b: layers 3 and 4 run the batch [3a, 3b], layers 5
    and later run [3a, 3b, 5a, 5b].
    """
    start, _ = full.visual
    shared = start + prefix                             # rows whose cache the unpruned run has
    cache = [KV(kv.keys[:, :, :shared], kv.values[:, :, :shared]) for kv in full.cache]
    joining = {stream.layer: stream for stream in streams}
    batch = None
    for layer in range(streams[0].layer, model.num_layers):
        if layer in joining:
            variants = keep(rows_behind(joining[layer], prefix), kept)
            batch = variants if batch is None else join(batch, variants)
        # each layer begins from the shared rows: nobody asks for this batch's own keys again
        batch = model.run(replace(batch, cache=cache), stop=layer + 1)
    return batch


def rows_behind(stream: Stream, prefix: int) -> Stream:
    """The rows of a stream from visual token `prefix` on; the cache holds those before."""
    start, V = stream.visual
    first = start + prefix
    return replace(stream, x=stream.x[:, first:], pos=stream.pos[..., first:],
                   visual=(0, V - prefix), origin=stream.origin[:, prefix:], queries=None)


def join(a: Stream, b: Stream) -> Stream:
    """The variants of both, at the layer of both."""
    return replace(b, x=torch.cat([a.x, b.x]), pos=torch.cat([a.pos, b.pos], -2),
                   origin=torch.cat([a.origin, b.origin]), queries=None)


def probabilities(model, stream: Stream, said: list[list[int]]) -> Tensor:
    """(B, tokens) float32: P of each token of the answer, which the stream ends with, but for the
    last. said: a token's ids; the end of an answer has several, whose probabilities add up."""
    columns = []
    for t, ids in enumerate(said):
        logits = model.logits(stream, row=t - len(said))
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
    """Keep-one computes the tokens of a window alone. Leave-one-out computes every token behind a
    removed one. Windows side by side share the prefix that ends before their rows, so that they can
    be one batch."""
    rows, cols = grid
    together = {}
    for number, tokens in enumerate(windows_of(grid, window)):
        prefix = 0
        kept = tokens
        if mode == "leave-one-out":
            strip = window * cols
            prefix = int(tokens[0]) // strip * strip
            removed = set(tokens.tolist())
            others = [token for token in range(prefix, rows * cols) if token not in removed]
            kept = torch.tensor(others, dtype=torch.long) - prefix
        together.setdefault((prefix, len(kept)), []).append((number, kept))
    groups = []
    for (prefix, _), members in together.items():
        numbers = [number for number, _ in members]
        groups.append(Group(numbers, prefix, torch.stack([kept for _, kept in members])))
    return groups


def windows_of(grid: tuple[int, int], window: int) -> list[Tensor]:
    """The tokens of each window, in raster order. Windows are smaller at the right and bottom."""
    rows, cols = grid
    token = torch.arange(rows * cols).view(grid)
    windows = []
    for r in range(0, rows, window):
        for c in range(0, cols, window):
            windows.append(token[r:r + window, c:c + window].flatten())
    return windows


def per_token(values: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(rows, cols, ...) in windows -> (N, ...): the tokens of a window share its value."""
    rows, cols = grid
    values = values.repeat_interleave(window, 0).repeat_interleave(window, 1)
    return values[:rows, :cols].flatten(0, 1)


def information_flops(config, text: tuple[int, int], grid: tuple[int, int], layers: list[int],
                      window: int = 2, mode: str = "keep-one") -> tuple[int, int]:
    """Prefill FLOPs of `token_information` with target "first" for one question, and of the
    official procedure, which runs the whole prompt through the whole model for each layer and
    window.

    config: the text config. text: rows before and after the image.
    """
    before, after = text
    N = grid[0] * grid[1]
    L = config.num_hidden_layers
    whole = before + N + after
    groups = groups_of_windows(grid, window, mode)
    ours = flops(config, [whole] * L)
    official = 0
    for K in layers:
        if mode == "keep-one":                          # the run with none
            ours += flops(config, [after] * (L - K), before)
            official += flops(config, [whole] * K + [before + after] * (L - K))
        else:                                           # the unpruned run: counted above
            official += flops(config, [whole] * L)
        for group in groups:
            n = group.kept.shape[1]
            variants = len(group.windows)
            ours += variants * flops(config, [n + after] * (L - K), before + group.prefix)
            rows = before + group.prefix + n + after
            official += variants * flops(config, [whole] * K + [rows] * (L - K))
    return ours, official


# ---- what methods need beforehand ----------------------------------------------------------------
# Each is measured on one question, from its stream at layer 0: {layer: values of the N tokens}.
# args: window, max_batch_tokens, answers, max_new_tokens, repetition_penalty.

def information_of_windows(model, stream: Stream, question, layers: list[int], args) -> dict:
    """(N,) for the paper's oracle: the first token of the answer, in windows."""
    answer = answer_to_measure(model, stream, question, "first", args)
    values = token_information(model, stream, answer, layers, args.window,
                               max_batch_tokens=args.max_batch_tokens)
    return {layer: per_token(windows, stream.grid, args.window)
            for layer, windows in zip(layers, values)}


def information_of_tokens(model, stream: Stream, question, layers: list[int], args) -> dict:
    """(N, t): every token of the answer and its end, of single visual tokens."""
    answer = answer_to_measure(model, stream, question, "answer", args)
    values = token_information(model, stream, answer, layers, window=1, target="each",
                               max_batch_tokens=args.max_batch_tokens)
    return {layer: tokens.flatten(0, 1) for layer, tokens in zip(layers, values)}


def attention_of_answer(model, stream: Stream, question, layers: list[int], args) -> dict:
    """(N, t): attention of the rows that write each token of the model's own greedy answer, in the
    unpruned run, mean over heads and over the layers K and later."""
    full = model.run(stream)
    answer = model.decode(full, args.max_new_tokens, args.repetition_penalty)[0]
    writing = rows_that_write(model, stream, full, model.answer_ids(answer))
    start, N = stream.visual
    rows = torch.arange(writing.x.shape[1])
    seen = []                                                       # by layer, (N, t)
    for layer in range(model.num_layers):
        writing = model.run(writing, stop=layer + 1)
        keys = writing.cache[layer].keys[0]
        probability = attention(writing.queries[0], keys, rows)     # (H, t, rows so far)
        seen.append(probability[:, :, start:start + N].mean(0).T)
    return {layer: torch.stack(seen[layer:]).mean(0) for layer in layers}


def rows_that_write(model, stream: Stream, full: Stream, ids: list[int]) -> Stream:
    """The last prompt row, which writes the first token, and the answer's tokens but the last: a
    stream at layer 0 behind the cache of all rows before, which the unpruned run `full` has."""
    answer = model.append(full, torch.tensor([ids[:-1]], dtype=torch.long, device=full.x.device))
    x = torch.cat([stream.x[:, -1:], answer.x], 1)
    pos = torch.cat([stream.pos[..., -1:], answer.pos], -1)
    cache = [KV(kv.keys[:, :, :-1], kv.values[:, :, :-1]) for kv in full.cache]
    return replace(answer, x=x, pos=pos, cache=cache)


MEASURES = {"windows": information_of_windows, "tokens": information_of_tokens,
            "attention": attention_of_answer}


def answer_to_measure(model, stream: Stream, question, target: str, args) -> str:
    """The gold answer for this target or, with --answers own, the model's own; where that is empty,
    the gold one. Raises InputError where there is neither."""
    if args.answers == "own":
        answer = own_answer(model, stream, args)
        if answer:
            return answer
        if not question.gold:
            raise InputError(f"question {question.id}: the model's own answer is empty, and it has "
                             "no gold one; there is nothing to measure")
    return gold_to_measure(question, target)


def gold_to_measure(question, target: str) -> str:
    return question.gold_normalized if target == "first" else question.gold_written


def own_answer(model, stream: Stream, args) -> str:
    """The greedy answer of the unpruned model."""
    full = model.run(stream)
    return model.decode(full, args.max_new_tokens, args.repetition_penalty)[0]


# ---- agreement -----------------------------------------------------------------------------------

def agreement_of_scores(model, stream: Stream, question, layers: list[int], args) -> dict:
    """{name: of each layer}: Spearman's rank correlation, over the N visual tokens, of what methods
    rank by, and of other measures, with the information of single tokens for the whole answer.

    layers: ascending, 1 or later.
    """
    answer = answer_to_measure(model, stream, question, "answer", args)
    first = answer_to_measure(model, stream, question, "first", args)

    def measured(answer, mode, target):
        return token_information(model, stream, answer, layers, 1, mode, target,
                                 args.max_batch_tokens).flatten(1)                  # (layers, N)
    exact = measured(answer, "keep-one", "answer")
    writing = attention_of_answer(model, stream, question, layers, args)
    scores = {"attention of the own answer, as hindsight": [writing[K].sum(1) for K in layers],
              "information of the first token": measured(first, "keep-one", "first"),
              "leave-one-out information": measured(answer, "leave-one-out", "answer")}
    for reached in inputs_of_layers(model, stream, layers):
        for name, ranked_by in scores_of_methods(model, reached).items():
            scores.setdefault(name, []).append(ranked_by)
    found = {}
    for name, of_layers in scores.items():
        found[name] = [statistics.rank_correlation(ranked_by.cpu().numpy(), truth.numpy())
                       for ranked_by, truth in zip(of_layers, exact)]
    return found


def scores_of_methods(model, reached: Stream) -> dict[str, Tensor]:
    """(N,) each: what published methods rank by at the layer an unpruned stream has reached."""
    view = view_of(model, reached, 0, 0, None)
    start, N = view.visual
    last = torch.tensor([len(view.x) - 1])
    return {"attention of the last prompt row": view.attention(last)[:, 0, start:start + N].mean(0),
            "attention of SparseVLM's raters": attention_of_raters(view),
            "norm of keys, as DART": view.keys[start:start + N].float().abs().sum(1),
            "saliency of the tower": view.saliency()}


def agreement_of_answers(own: Tensor, gold: Tensor) -> list:
    """Of each layer, the rank correlation of the maps of two answers."""
    return [statistics.rank_correlation(a.numpy().ravel(), b.numpy().ravel())
            for a, b in zip(own, gold)]


# ---- the horizon ---------------------------------------------------------------------------------

def horizon(curve, full: float, tolerance: float = 0.01) -> int:
    """The first layer from which on dropping every visual token never costs more than `tolerance`
    of the full score, the unpruned model's. The paper gives no rule; this one is ours.

    curve: the score with all dropped at the input of layer 0, 1, ... -> len(curve) if none.
    """
    layer = len(curve)
    while layer > 0 and curve[layer - 1] >= full - tolerance * full:
        layer -= 1
    return layer


def answers_without_image(model, stream: Stream, max_new_tokens: int = 16,
                          repetition_penalty: float = 1.0) -> dict[str, str]:
    """The greedy answer, "unpruned" and with every visual token dropped at the input of layer "0",
    "1", ..., from a stream at layer 0."""
    nothing = torch.zeros(0, dtype=torch.long)
    answers = {}
    for layer in range(model.num_layers):
        stream = model.run(stream, stop=layer)
        dropped = model.run(keep(stream, nothing))
        answers[str(layer)] = model.decode(dropped, max_new_tokens, repetition_penalty)[0]
    full = model.run(stream)
    answers["unpruned"] = model.decode(full, max_new_tokens, repetition_penalty)[0]
    return answers


def divergence_without_image(model, stream: Stream, answer: str) -> list[float]:
    """KL(P unpruned || P with every visual token dropped at the input of layer K), for K = 0, 1,
    ..., in nats, summed over the tokens of the model's own answer, teacher-forced.

    Needs no gold answer. Ours.
    """
    ids = model.answer_ids(answer)
    if not ids:
        return [0.0] * model.num_layers
    prompt = with_answer(model, stream, ids[:-1])
    streams = inputs_of_layers(model, prompt, range(model.num_layers))
    full = model.run(streams[-1])
    nothing = torch.zeros(1, 0, dtype=torch.long)
    dropped = run_together(model, streams, full, 0, nothing)
    total = torch.zeros(model.num_layers)
    for t in range(len(ids)):
        row = t - len(ids)
        want = model.logits(full, row).log_softmax(-1)                          # (1, vocab)
        got = model.logits(dropped, row).log_softmax(-1)                        # (L, vocab)
        total += F.kl_div(got, want.expand_as(got), log_target=True, reduction="none").sum(-1).cpu()
    return total.tolist()


def divergence_horizon(curve, threshold: float = 0.002) -> int:
    """The horizon without gold answers: the first layer from which on the mean divergence is at
    most `threshold` of layer 0's. Ours; the threshold was chosen after seeing the built-in models.
    """
    layer = len(curve)
    while layer > 0 and curve[layer - 1] <= threshold * curve[0]:
        layer -= 1
    return layer


# ---- a benchmark ---------------------------------------------------------------------------------

def measure_horizon(model, benchmark: str, questions: list, args, out: Path, measure=None) -> list:
    """The record of every question: answers and scores by the layer where everything is dropped,
    and the divergence; with measure(stream, question), whatever that returns, too."""
    def prepare(question):
        return model.preprocess(read_image(question.image))

    def work(question, image):
        stream = model.begin(image, question.prompt)
        answers = answers_without_image(model, stream, args.max_new_tokens,
                                        args.repetition_penalty)
        scores = {layer: points(answer, question, answers["unpruned"])
                  for layer, answer in answers.items()}
        divergence = divergence_without_image(model, stream, answers["unpruned"])
        record = {"prompt": runs.short_hash([question.prompt]), "answers": answers,
                  "scores": scores, "divergence": divergence}
        if measure:
            record |= measure(stream, question)
        return record
    return collect(out, benchmark, questions, prepare, work, args.workers)


def points(answer: str, question, unpruned: str) -> float:
    """The score of an answer; of a question without a gold answer, whether it is the unpruned one.
    """
    if not question.gold:
        return float(answer == unpruned)
    return score(answer, question)[1]


def horizons_of(questions: list, records: list[dict], args) -> dict:
    """By both rules, {"score": {...}, "divergence": {...}}: what `horizon_interval` returns, "cost"
    elsewhere, and the curve ("unpruned" and "scores", or "nats")."""
    image = images_of(questions)
    layers = [str(layer) for layer in range(len(records[0]["divergence"]))]
    scores = np.array([[record["scores"][key] for key in ["unpruned", *layers]]
                       for record in records])
    divergence = np.array([record["divergence"] for record in records])

    def by_score(curve):
        return horizon(curve[1:], curve[0], args.tolerance)

    def by_divergence(curve):
        return divergence_horizon(curve, args.threshold)
    rules = {"score": (scores, by_score), "divergence": (divergence, by_divergence)}
    horizons = {}
    for name, (curves, rule) in rules.items():
        horizons[name] = statistics.horizon_interval(curves, image, rule)
        horizons[name]["cost"] = None
        if len(questions) > 2 * args.calibrate:
            horizons[name]["cost"] = statistics.cost_elsewhere(curves, scores, image, rule,
                                                               args.calibrate)
    horizons["score"]["unpruned"] = 100 * float(scores[:, 0].mean())
    horizons["score"]["scores"] = (100 * scores[:, 1:].mean(0)).tolist()
    horizons["divergence"]["nats"] = divergence.mean(0).tolist()
    return horizons


def calibrate(model, benchmark: str, questions: list, args, out: Path) -> tuple[int, list, int]:
    """The horizon on about --calibrate questions, drawn by --seed; the other questions; and how
    many failed for want of memory. Raises InputError if there is no horizon, or no other question.
    """
    chosen = runs.sample(questions, args.calibrate, args.seed)
    images = {question.image for question in chosen}
    others = [question for question in questions if question.image not in images]
    if not others:
        raise InputError(f"--calibrate: {args.calibrate}, and {benchmark} has {len(questions)} "
                         "questions; want some that remain to be scored")
    folder = out / "calibration"
    folder.mkdir(exist_ok=True)
    records = measure_horizon(model, benchmark, chosen, args, folder)
    answered = [(q, record) for q, record in zip(chosen, records) if record]
    layer = horizons_of(*zip(*answered), args)[args.rule]["layer"]
    if layer == model.num_layers:
        raise InputError(f"--layer horizon: {benchmark} has none; even at the last layer, dropping "
                         "every visual token costs more than the rule allows")
    print(f"{benchmark}: horizon at layer {layer}, measured on {len(answered)} questions; "
          f"{len(others)} others remain to be scored")
    return layer, others, len(chosen) - len(answered)


# ---- the program ---------------------------------------------------------------------------------

def parse_arguments(argv: list[str]):
    p = runs.Parser("information.py", "Token information by layer, and the information horizon.")
    group = p.add_argument_group("what to measure")
    group.add_argument("--layer", default="all", help="20, or 2,10,20, or all (default: all)")
    group.add_argument("--mode", choices=MODES, default=MODES[0],
                       help=f"what a window is compared with (default: {MODES[0]})")
    group.add_argument("--target", choices=["first", "answer"], default="first",
                       help="the gold answer's first token, or all of it (default: first)")
    group.add_argument("--agreement", action="store_true",
                       help="also rank single tokens by cheap scores, against their information")
    runs.add_answer_flags(runs.add_model_flags(p))
    runs.add_data_flags(p)
    runs.add_measuring_flags(p)
    runs.add_output_flags(p)
    p.add_argument("--plot", type=Path, metavar="PNG", help="default: information.png in --out")
    args = p.parse_args(argv)
    runs.check_picture(args.plot)
    return args


def main(argv: list[str]) -> int:
    """-> how many questions failed for want of memory."""
    args = parse_arguments(argv)
    layers = sorted(set(runs.parse_layers(args.layer, runs.num_layers(args))))
    if args.agreement and layers[0] == 0:
        raise InputError("--agreement: compares with attention of the layer before; want --layer 1 "
                         "or later")
    data = runs.load_data(args, gold=args.answers == "gold")
    model = runs.load_model(args)
    settings = runs.settings_of(args, model, data)
    out = runs.open_folder(args, settings)
    result = settings | runs.provenance(args, model, data)
    result |= {"prompts": {}, "benchmarks": {}, "failed": 0}
    examples = {}
    maps = {"layers": np.array(layers)}
    for benchmark, questions in data.items():
        asked = runs.sample(questions, args.limit, args.seed)
        prompt = report.print_asked(benchmark, asked, questions, runs.template(model))
        result["prompts"][benchmark] = prompt
        found, examples[benchmark] = measure_benchmark(model, benchmark, asked, layers, args, out,
                                                       maps)
        result["benchmarks"][benchmark] = found
        result["failed"] += found["failed"]
    report.print_distance_of_horizons(result["benchmarks"])
    for found in result["benchmarks"].values():
        for rule in ("score", "divergence"):
            del found["horizons"][rule]["draws"]
    picture = args.plot or out / "information.png"
    if RANK == 0:
        save_maps(out / "information.npz", maps)
        plot_information(result["benchmarks"], examples, picture)
    print(f"{args.mode}, {args.target}, windows of {args.window} x {args.window}; "
          f"{runs.where(model)}; maps in {out / 'information.npz'}, picture in {picture}")
    runs.write_result(out, result, args.json)
    return result["failed"]


def measure_benchmark(model, benchmark: str, questions: list, layers: list[int], args, out: Path,
                      maps: dict) -> tuple[dict, tuple]:
    """Information and horizons of a benchmark, printed: the part of result.json, and an example
    for the picture. The map of each question goes into maps."""
    def measure(stream, question):
        return measure_question(model, stream, question, layers, args)
    records = measure_horizon(model, benchmark, questions, args, out, measure)
    answered = [(question, record) for question, record in zip(questions, records) if record]
    asked, records = zip(*answered)
    values = [from_json(record["information"]) for record in records]
    for question, value in zip(asked, values):
        maps[f"{benchmark}/{question.id}"] = value
    chosen = question_to_show(asked)
    found, picture = look_at_one(model, asked[chosen], layers, args)
    rows = statistics.information_by_layer(values, images_of(asked), layers)
    horizons = horizons_of(asked, records, args)
    vanishes = statistics.layer_without_information(rows, found["noise"])
    with_gold = [pair for pair in answered if pair[0].gold]
    right = [question for question, record in with_gold if record["scores"]["unpruned"] == 1]
    found |= {"information": rows, "horizons": horizons, "horizon": horizons["score"],
              "vanishes": vanishes, "asked": len(asked), "failed": len(questions) - len(asked),
              "with_gold": len(with_gold), "right": len(right),
              "blank": sum(first_token_is_blank(model, question) for question in asked),
              "own_and_gold": [record["own_and_gold"] for record in records
                               if "own_and_gold" in record]}
    if args.agreement:
        found["agreement"] = statistics.agreement_by_layer(
            [record["agreement"] for record in records], images_of(asked))
    report.print_information(benchmark, found, args)
    canvas, prompt, answer = picture
    return found, (canvas, values[chosen], prompt, answer)


def measure_question(model, stream: Stream, question, layers: list[int], args) -> dict:
    """The part of a record that holds its information."""
    def information_of(answer):
        return token_information(model, stream, answer, layers, args.window, args.mode, args.target,
                                 args.max_batch_tokens)
    answer = answer_to_measure(model, stream, question, args.target, args)
    values = information_of(answer)
    found = {"information": to_json(values.numpy())}
    if args.answers == "own" and question.gold and score(answer, question)[1] < 1:
        gold = information_of(gold_to_measure(question, args.target))
        found["own_and_gold"] = agreement_of_answers(values, gold)
    if args.agreement:
        found["agreement"] = agreement_of_scores(model, stream, question, layers, args)
    return found


def question_to_show(questions: list) -> int:
    """The first whose image is asked about more than once, the answers beginning with different
    letters: its map can then be of one answer alone. 0 if there is none."""
    letters = {}
    for question in questions:
        letters.setdefault(question.image, []).append("".join(question.gold)[:1].lower())
    for i, question in enumerate(questions):
        of_image = letters[question.image]
        if len(of_image) > 1 and len(set(of_image)) == len(of_image):
            return i
    return 0


def look_at_one(model, question, layers: list[int], args) -> tuple[dict, tuple]:
    """What is measured of one question alone: FLOPs, and what a batch changes. And of its picture:
    canvas, prompt, answer."""
    image = read_image(question.image)
    stream = model.begin(image, question.prompt)
    text = stream.visual[0], stream.x.shape[1] - stream.visual[0] - stream.N
    cost = information_flops(model.config.text, text, stream.grid, layers, args.window, args.mode)
    answer = answer_to_measure(model, stream, question, args.target, args)
    noise = noise_of_batches(model, stream, answer, layers[len(layers) // 2], args)
    found = {"gflops": [work / 1e9 for work in cost], "noise": noise}
    return found, (model.canvas(image), question.prompt, answer)


def noise_of_batches(model, stream: Stream, answer: str, layer: int, args) -> float:
    """The largest difference between the same windows measured in one batch and one by one: a GPU
    picks its kernels by shape, and rounds differently. Less information than that is none."""
    together, alone = [token_information(model, stream, answer, [layer], args.window, args.mode,
                                         args.target, bound)
                       for bound in (args.max_batch_tokens, 1)]
    return float((together - alone).abs().max())


def first_token_is_blank(model, question) -> bool:
    """Whether target "first" sees no content of the gold answer: LLaMA's vocabulary begins a number
    with a blank of its own, so that the first token of "2" and of "7" is the same."""
    if not question.gold:
        return False
    return not model.tokenizer.decode(model.answer_ids(question.gold_normalized)[:1]).strip()


def save_maps(file: Path, maps: dict[str, np.ndarray]):
    """Raises InputError; answers.jsonl holds the maps too."""
    try:
        np.savez(file, **maps)
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror}); want room for it")


def to_json(values: np.ndarray) -> dict:
    """An array as JSON: a line of answers.jsonl holds it without loss."""
    data = base64.b64encode(values.astype("<f4").tobytes()).decode()
    return {"shape": list(values.shape), "float32": data}


def from_json(stored: dict) -> np.ndarray:
    data = base64.b64decode(stored["float32"])
    return np.frombuffer(data, "<f4").reshape(stored["shape"])


if __name__ == "__main__":
    runs.start(main)
