"""How much of a vision-language model's score is left when a method prunes its visual tokens.

    python eval.py --layer 20 --ratio 0.9                  every method, on the built-in model
    python eval.py --layer all --ratio 0.9 --plot c.png    score against layer, a method a line
    python eval.py --schedule "dart@2=20 random@22=4"      a method, then random past the horizon
    torchrun --nproc-per-node 8 eval.py ...                the same results, faster

In this order: the loop over questions, scores, what the flags ask for, the program.
"""
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from torch import Tensor

from information import MEASURES, calibrate, first_token_is_blank
from support import report, runs
from support.benchmarks import Question, images_of, is_overlong, official_totals, score
from support.files import read_image
from support.pictures import plot
from support.records import RANK, collect
from support.statistics import paired_difference, standard_error
from support.timing import now
from tokprune import (METHODS, ORACLES, InputError, Stream, at_budget, check_method, flops,
                      format_schedule, number_kept, parse_schedule, prune, visual_tokens)


# ---- the loop over questions ---------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """A schedule, run with one seed."""
    name: str                       # of its row in the table
    schedule: tuple                 # of (layer, method, amount); empty for the unpruned model
    seed: int = 0
    compared_with: tuple = ()       # another schedule, for the column "- first"

    @property
    def key(self) -> str:
        """What its answers stand under in answers.jsonl."""
        if not self.schedule:
            return "unpruned"
        return f"{format_schedule(self.schedule)} seed {self.seed}"


def answer_cells(model, stream: Stream, question: Question, cells: list[Cell], args) -> dict:
    """The greedy answer of every cell, by its key, from the question's stream at layer 0."""
    unpruned = unpruned_streams(model, stream, cells)
    info = measure_beforehand(model, stream, question, cells, args)
    answers = {}
    for batch in batches_of_equal_shape(cells, stream.N):
        finished = prune_and_finish(model, unpruned, info, question, batch, args)
        answers |= decode_batch(model, finished, batch, args)
    return answers


def unpruned_streams(model, stream: Stream, cells: list[Cell]) -> dict[int, Stream]:
    """The unpruned stream at each layer where a cell prunes, and past the last layer: it runs once,
    and the cells go on from there."""
    layers = {layer for cell in cells for layer, _, _ in cell.schedule}
    if any(not cell.schedule for cell in cells):
        layers.add(model.num_layers)
    streams = {}
    for layer in sorted(layers):
        stream = model.run(stream, stop=layer)
        streams[layer] = stream
    return streams


def measure_beforehand(model, stream: Stream, question: Question, cells: list[Cell],
                       args) -> dict[int, dict[str, Tensor]]:
    """{layer: {method: values of the N visual tokens}}, for oracles and for methods that need an
    unpruned pass first."""
    layers_of = {}
    for cell in cells:
        for layer, method, _ in cell.schedule:
            if METHODS[method].measure:
                layers_of.setdefault(method, set()).add(layer)
    info = {}
    for method, layers in layers_of.items():
        measure = MEASURES[METHODS[method].measure]
        for layer, values in measure(model, stream, question, sorted(layers), args).items():
            info.setdefault(layer, {})[method] = values
    return info


def batches_of_equal_shape(cells: list[Cell], N: int) -> list[list[Cell]]:
    """Cells that keep equally many tokens at the same layers are variants of one batch."""
    batches = {}
    for cell in cells:
        shape = tuple((layer, number_kept(amount, N)) for layer, _, amount in cell.schedule)
        batches.setdefault(shape, []).append(cell)
    return list(batches.values())


def prune_and_finish(model, unpruned: dict, info: dict, question: Question, batch: list[Cell],
                     args) -> Stream:
    """The cells of a batch as variants: each prunes by its own methods, and all layers run."""
    schedule = batch[0].schedule                        # layers and counts are the same in all
    seeds = [cell.seed + question.seed for cell in batch]
    stream = unpruned[schedule[0][0] if schedule else model.num_layers]
    for stage, (layer, _, amount) in enumerate(schedule):
        stream = model.run(stream, stop=layer)          # no layer to run at the first stage
        methods = [cell.schedule[stage][1] for cell in batch]
        n = number_kept(amount, stream.N)
        stream = prune(model, stream, methods, n, seeds, info.get(layer), args.positions)
    return model.run(stream)


def decode_batch(model, stream: Stream, batch: list[Cell], args) -> dict[str, str]:
    answers = model.decode(stream, args.max_new_tokens, args.repetition_penalty)
    return {cell.key: answer for cell, answer in zip(batch, answers)}


def evaluate(model, benchmark: str, questions: list[Question], cells: list[Cell], args,
             out: Path) -> list[dict]:
    """The record of every question, None where memory ran out. "parsed" is what the metric reads in
    an answer; "visual_tokens" is what `steps` returns."""
    device = next(model.parameters()).device

    def prepare(question):
        return model.preprocess(read_image(question.image))

    def work(question, image):
        began = now(device)
        stream = model.begin(image, question.prompt)
        answers = answer_cells(model, stream, question, cells, args)
        ms = round(now(device) - began, 1)
        read = {key: score(answer, question) for key, answer in answers.items()}
        return {"prompt": runs.short_hash([question.prompt]), "answers": answers,
                "parsed": {key: parsed for key, (parsed, _) in read.items()},
                "scores": {key: value for key, (_, value) in read.items()},
                "visual_tokens": {cell.key: steps(cell.schedule, stream.N, model.num_layers)
                                  for cell in cells},
                "text_rows": stream.x.shape[1] - stream.N, "ms": ms}
    return collect(out, benchmark, questions, prepare, work, args.workers)


def steps(schedule: tuple, N: int, L: int) -> list[list[int]]:
    """[layer, visual tokens from there on], for layer 0 and wherever they become fewer."""
    tokens = visual_tokens(schedule, N, L)
    changes = [[0, tokens[0]]]
    for layer in range(1, L):
        if tokens[layer] != tokens[layer - 1]:
            changes.append([layer, tokens[layer]])
    return changes


# ---- scores --------------------------------------------------------------------------------------

def summarise(model, benchmark: str, questions: list[Question], records: list,
              cells: list[Cell]) -> list[dict]:
    """A row for each schedule, its seeds averaged: score and paired differences in percent, tokens,
    FLOPs, counts of odd answers. A question whose record is None scores 0."""
    image = images_of(questions)
    answered = [record for record in records if record]
    groups = {}                     # by the schedule's text: as tuples, keep 0 equals remove 0.0
    for cell in cells:
        groups.setdefault(format_schedule(cell.schedule), []).append(cell)
    scores = {}
    for schedule, group in groups.items():
        scores[schedule] = [[score_in(record, cell) for record in records] for cell in group]
    means = {schedule: 100 * np.mean(of_seeds, 0) for schedule, of_seeds in scores.items()}
    rows = []
    for schedule, group in groups.items():
        row = {"method": group[0].name, "schedule": schedule,
               "layer": group[0].schedule[0][0] if schedule else None,
               "score": float(means[schedule].mean()), "seeds": len(group),
               "standard_error": standard_error(means[schedule], image)}
        row |= differences(group[0], means, image)
        row |= costs(model, group[0], answered)
        row["totals"] = totals(questions, scores[schedule])
        row |= odd_answers(group, questions, records)
        rows.append(row)
    return rows


def score_in(record: dict | None, cell: Cell) -> float:
    return record["scores"][cell.key] if record else 0.0


def differences(cell: Cell, means: dict[str, np.ndarray], image: np.ndarray) -> dict:
    """Paired differences from other rows that are there: the unpruned model; random, nothing and
    each oracle in the place of the cell's methods; the schedule it is compared with."""
    own = format_schedule(cell.schedule)

    def minus(other: str):
        if other not in means or other == own:
            return None
        return paired_difference(means[own], means[other], image)
    others = {name: format_schedule(with_method(cell.schedule, name))
              for name in ("random", *ORACLES)}
    minus_oracles = {name: minus(others[name]) for name in ORACLES}
    minus_none = None
    if len(cell.schedule) == 1:
        [(layer, _, _)] = cell.schedule
        minus_none = minus(format_schedule(drop_all(layer)))
    minus_first = None
    if cell.compared_with:
        minus_first = minus(format_schedule(cell.compared_with))
    return {"minus_unpruned": minus(""), "minus_random": minus(others["random"]),
            "minus_none": minus_none, "minus_first": minus_first,
            "minus_oracles": {name: value for name, value in minus_oracles.items() if value}}


def with_method(schedule: tuple, method: str) -> tuple:
    """The same layers and amounts, all by one method."""
    return tuple((layer, method, amount) for layer, _, amount in schedule)


def drop_all(layer: int) -> tuple:
    """The schedule that keeps nothing from that layer on. The method does not matter."""
    return ((layer, "random", 0),)


def costs(model, cell: Cell, answered: list[dict]) -> dict:
    """Means over the questions: tokens kept at last, tokens at a layer's input, prefill GFLOPs."""
    kept = []
    tokens = []
    gflops = []
    for record in answered:
        N = record["visual_tokens"]["unpruned"][0][1]
        alive = visual_tokens(cell.schedule, N, model.num_layers)
        rows = [record["text_rows"] + V for V in alive]
        kept.append(alive[-1])
        tokens.append(np.mean(alive))
        gflops.append(flops(model.config.text, rows) / 1e9)
    return {"kept": float(np.mean(kept)), "mean_visual_tokens": float(np.mean(tokens)),
            "gflops": float(np.mean(gflops))}


def totals(questions: list[Question], of_seeds: list[list[float]]) -> dict:
    """What the benchmark's paper reports, averaged over seeds; nothing where that is the score."""
    each = [official_totals(questions, np.array(scores)) for scores in of_seeds]
    means = {}
    for name, value in each[0].items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        means[name] = float(np.mean([run[name] for run in each])) if is_number else value
    return means


def odd_answers(group: list[Cell], questions: list[Question], records: list) -> dict:
    """How many answers failed for want of memory, are empty, cannot be read by the metric, or begin
    with a right one and go on."""
    failed = sum(record is None for record in records)
    counts = {"failed": failed, "empty": 0, "unparsed": 0, "overlong": 0}
    for question, record in zip(questions, records):
        for cell in group:
            if record:
                parsed = record["parsed"][cell.key]
                counts["empty"] += not record["answers"][cell.key].strip()
                counts["unparsed"] += parsed is None
                counts["overlong"] += is_overlong(parsed, question)
    return counts


# ---- what the flags ask for ----------------------------------------------------------------------

def parse_arguments(argv: list[str]):
    p = runs.Parser("eval.py", "Scores of a vision-language model with its visual tokens pruned.")
    group = p.add_argument_group("pruning")
    group.add_argument("--method", metavar="NAMES", help=f"of {', '.join(METHODS)} (default: all; "
                       "with --budget: dart,divprune)")
    group.add_argument("--layer", help="tokens leave at its input: 20; 2,10,20; all; or horizon, "
                       "as measured (default: 20; with --budget: horizon)")
    group.add_argument("--ratio", type=runs.share,
                       help="fraction of the visual tokens removed, 0 to 1 (default: 0.9)")
    group.add_argument("--schedule", action="append", metavar="S", help="instead of these three: "
                       "'dart@2=252 random@20:0.9'; repeatable")
    group.add_argument("--budget", metavar="B", help="mean shares of the tokens, as 1/3,1/9: a "
                       "method alone, and with random or nothing from --layer on")
    group.add_argument("--positions", choices=["keep", "compact"], default="keep",
                       help="of kept tokens: original or renumbered (default: keep)")
    group.add_argument("--seeds", type=runs.whole(1), default=3, metavar="N",
                       help="seeds that methods which draw are averaged over (default: 3)")
    runs.add_answer_flags(runs.add_model_flags(p))
    runs.add_data_flags(p)
    group = runs.add_measuring_flags(p)
    group.add_argument("--rule", choices=["divergence", "score"], default="divergence",
                       help="of --layer horizon: by the divergence, or by the gold score (default: "
                            "divergence)")
    group = runs.add_output_flags(p)
    group.add_argument("--plot", type=Path, metavar="PNG", help="draw score against layer")
    args = p.parse_args(argv)
    if args.schedule and (args.method or args.layer or args.ratio is not None):
        raise InputError("--schedule: stands for --method, --layer and --ratio; want it or them")
    if args.budget and (args.schedule or args.ratio is not None):
        raise InputError("--budget: takes --method and --layer, and no --ratio or --schedule")
    if args.plot and (args.schedule or args.budget):
        raise InputError("--plot: draws score against layer; want --layer and --ratio, not "
                         "--schedule or --budget")
    runs.check_picture(args.plot)
    if args.layer is None:
        args.layer = "horizon" if args.budget else "20"
    if args.method is not None:
        args.method = args.method.split(",")
    return args


def asks_for_horizon(args) -> bool:
    return any("horizon" in text for text in args.schedule or [args.layer])


def parse_cells(args, L: int, horizon_layer: int = 0, N: int = 576) -> list[Cell]:
    """The unpruned model, no image at all, then what the flags ask for, each with its seeds.

    L: layers of the model. horizon_layer: what the word horizon stands for. N: the visual tokens
    that a budget is divided by.
    """
    rows = [("unpruned", (), ()), ("no image", drop_all(0), ())]
    if args.schedule:
        rows += rows_of_schedules(args, horizon_layer)
    elif args.budget:
        rows += rows_of_budgets(args, L, horizon_layer, N)
    else:
        rows += rows_of_methods(args, L, horizon_layer)
    cells = {}
    for name, schedule, compared_with in rows:
        for layer, _, _ in schedule:
            runs.check_layer(layer, L)
        for seed in range(args.seeds if is_drawn(schedule) else 1):
            cell = Cell(name, schedule, args.seed + seed, compared_with)
            cells.setdefault(cell.key, cell)            # what is asked for twice runs once
    return list(cells.values())


def is_drawn(schedule: tuple) -> bool:
    """Whether its seed matters. Where all or none are kept, nothing is drawn."""
    for _, method, amount in schedule:
        keeps_one = amount == 1 and isinstance(amount, int)
        keeps_none_or_all = amount in (0, 1) and not keeps_one              # =0, :0 or :1
        if METHODS[method].draws and not keeps_none_or_all:
            return True
    return False


def rows_of_methods(args, L: int, horizon_layer: int) -> list[tuple]:
    """At each layer: nothing kept, and each method that can act there."""
    ratio = 0.9 if args.ratio is None else args.ratio
    rows = []
    for layer in runs.parse_layers(args.layer, L, horizon_layer):
        rows.append(("none", drop_all(layer), ()))
        for method in dict.fromkeys(["random", *(args.method or METHODS)]):
            # a method that cannot act at layer 0 is left out, unless both were asked for by name
            named = args.method and args.layer != "all"
            if layer == 0 and method in METHODS and METHODS[method].needs_layer and not named:
                continue
            check_method(method, layer)
            rows.append((method, ((layer, method, ratio),), ()))
    return rows


def rows_of_schedules(args, horizon_layer: int) -> list[tuple]:
    """Each schedule, and random in its place. All are compared with the first."""
    schedules = []
    for text in args.schedule:
        text = re.sub(r"@horizon(?=[:=])", f"@{horizon_layer}", text)
        schedule = tuple(parse_schedule(text))
        if not schedule:
            raise InputError("--schedule: empty, want e.g. 'dart@2=252 random@20:0.9'")
        schedules.append(schedule)
    first = schedules[0] if len(schedules) > 1 else ()
    rows = []
    for schedule in schedules:
        for one in (schedule, with_method(schedule, "random")):
            rows.append((format_schedule(one), one, first))
    return rows


def rows_of_budgets(args, L: int, horizon_layer: int, N: int) -> list[tuple]:
    """Each method at each budget: alone; random in its place; followed by random, or by nothing,
    from the horizon on. The last two are compared with the method alone, in column "- first"."""
    layers = runs.parse_layers(args.layer, L, horizon_layer)
    if len(layers) != 1:
        raise InputError(f"--budget: takes --layer, one or horizon, not {args.layer}")
    rows = []
    for text in args.budget.split(","):
        budget = parse_budget(text)
        for method in args.method or ["dart", "divprune"]:
            check_method(method, 1)
            alone, *others = at_budget(method, budget, layers[0], N, L)
            for one in (alone, with_method(alone, "random")):
                rows.append((format_schedule(one), one, ()))
            for one in others:
                rows.append((format_schedule(one), one, alone))
    return rows


def parse_budget(text: str) -> float:
    """"1/3" or "0.25" -> a share of the visual tokens."""
    try:
        budget = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--budget {text}: want a share of the visual tokens, as 1/3 or 0.25")
    if not 0 < budget < 1:
        raise InputError(f"--budget {text}: want more than 0 and less than 1, a share of the "
                         "visual tokens")
    return float(budget)


# ---- the program ---------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    """-> how many questions failed for want of memory."""
    args = parse_arguments(argv)
    L = runs.num_layers(args)
    parse_cells(args, L, L - 1)                         # wrong flags are named before loading
    data = runs.load_data(args)
    model = runs.load_model(args)
    settings = runs.settings_of(args, model, data)
    out = runs.open_folder(args, settings)
    result = settings | runs.provenance(args, model, data)
    result |= {"prompts": {}, "horizon": {}, "benchmarks": {}, "blank": {}, "failed": 0}
    for benchmark, questions in data.items():
        run_benchmark(model, benchmark, questions, args, out, result)
    print(f"{runs.where(model)}; repetition penalty {args.repetition_penalty:g}; answers in {out}")
    if args.plot and RANK == 0:
        plot(result["benchmarks"], args.plot, result["horizon"])
    runs.write_result(out, result, args.json)
    return result["failed"]


def run_benchmark(model, benchmark: str, known: list[Question], args, out: Path, result: dict):
    """Every cell on the questions of a benchmark; its table and verdict, and its part of result."""
    horizon_layer = 0
    questions = known
    if asks_for_horizon(args):
        horizon_layer, questions, failed = calibrate(model, benchmark, known, args, out)
        result["horizon"][benchmark] = horizon_layer
        result["failed"] += failed
    questions = runs.sample(questions, args.limit, args.seed)
    N = 0
    if args.budget:
        first = questions[0]
        N = model.begin(read_image(first.image), first.prompt).N
    cells = parse_cells(args, model.num_layers, horizon_layer, N)
    prompt = report.print_asked(benchmark, questions, known, runs.template(model))
    records = evaluate(model, benchmark, questions, cells, args, out)
    rows = summarise(model, benchmark, questions, records, cells)
    for row in rows:
        row["asked"] = len(questions)
        row["of"] = len(known)
        if "complete" in row["totals"]:
            row["totals"]["complete"] &= len(questions) == len(known)
    result["prompts"][benchmark] = prompt
    result["benchmarks"][benchmark] = rows
    result["failed"] += rows[0]["failed"]
    if len(report.layers_of(rows)) > 1:
        report.print_sweep(benchmark, rows)
    else:
        report.print_table(benchmark, rows)
        report.print_verdict(benchmark, rows, len({question.image for question in questions}))
    report.print_odd(benchmark, rows)
    measured = [METHODS[method].measure for cell in cells for _, method, _ in cell.schedule]
    if "windows" in measured:                           # of the answer's first token
        blank = sum(first_token_is_blank(model, question) for question in questions)
        result["blank"][benchmark] = blank
        report.print_blank(benchmark, blank, len(questions))


if __name__ == "__main__":
    runs.start(main)
