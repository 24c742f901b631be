"""How much of a vision-language model's score is left when a method prunes its visual tokens.

    python eval.py --layer 20 --ratio 0.9                  every method, on the built-in model
    python eval.py --layer all --ratio 0.9 --plot c.svg    score against layer, a method a line
    python eval.py --schedule "dart@2=20 none@22"          a method, then nothing past the horizon
    torchrun --nproc-per-node 8 eval.py ...                the same results, faster

In this order: the loop over schedules, scores, what the flags ask for, the program.
"""
from collections import Counter
from dataclasses import dataclass

import numpy as np

from information import (MEASURES, answer_to_measure, count_spaces, inputs_of_layers,
                         measure_beforehand)
from support import flags, report
from support.benchmarks import Question, images_of, is_overlong, official_totals, score
from support.pictures import plot
from support.run import (RANK, collect, grouped, look_at, open_folder, provenance, settings_of,
                         start, write_result)
from support.statistics import paired_difference, standard_error
from tokprune import (METHODS, ORACLES, Decoding, InputError, Stream, decode, flops,
                      format_schedule, number_kept, prefill, together, visual_tokens)


# ---- the loop over schedules ---------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """A schedule, run with one seed."""
    name: str                       # of its row in the table
    schedule: tuple                 # of (layer, method, amount); empty for the unpruned model
    seed: int = 0
    compared_with: tuple = ()       # another schedule, for the column "- first"

    @property
    def key(self) -> str:
        """Return the key of its answers in answers.jsonl."""
        if not self.schedule:
            return "unpruned"
        return f"{format_schedule(self.schedule)} seed {self.seed}"


def answer_cells(model, streams: dict[int, Stream], cells: list[Cell], info: dict,
                 seeds: list[int], decoding: Decoding = Decoding(),
                 positions: str = "keep") -> list[dict[str, str]]:
    """Return the greedy answer of every cell to each prompt, by the cell's key.

    The unpruned stream runs once, and the cells go on from there.

    streams: the unpruned one at layer 0, and wherever else it has been run to, by layer. info: what
    methods need beforehand, as `prefill` takes it. seeds: of each prompt, added to the cell's.
    """
    def shape(cell: Cell) -> tuple:                     # those of one shape are one batch
        return tuple((layer, number_kept(amount, streams[0].N))
                     for layer, _, amount in cell.schedule)
    full_streams = inputs_of_layers(model, streams, [first_layer(model, cell) for cell in cells])
    answers = [{} for _ in seeds]
    for batch in grouped(cells, shape).values():
        stages = []                                     # layers and counts are the same in all
        for same in zip(*(cell.schedule for cell in batch)):
            layer, _, amount = same[0]
            stages.append((layer, [method for _, method, _ in same] * len(seeds), amount))
        reached = full_streams[first_layer(model, batch[0])]
        variant_seeds = [seed + cell.seed for seed in seeds for cell in batch]
        pruned_stream = prefill(model, reached, stages, variant_seeds, info, positions)
        found = decode(model, pruned_stream, *decoding)
        for i, of_prompt in enumerate(answers):
            for cell, answer in zip(batch, found[i * len(batch):]):
                of_prompt[cell.key] = answer
    return answers


def first_layer(model, cell: Cell) -> int:
    """Return the layer up to which a cell is unpruned."""
    return cell.schedule[0][0] if cell.schedule else model.num_layers


def layers_to_measure(cells: list[Cell]) -> dict[str, set[int]]:
    """Return where each method that needs something beforehand prunes."""
    layers_of = {}
    for cell in cells:
        for layer, method, _ in cell.schedule:
            if METHODS[method].measure:
                layers_of.setdefault(method, set()).add(layer)
    return layers_of


def most_variants(cells: list[Cell]) -> int:
    """Return the most cells that can be in one batch: those that prune at the same layers."""
    return max(Counter(tuple(layer for layer, _, _ in cell.schedule) for cell in cells).values())


def answer_questions(model, questions: list[Question], images: list, cells: list[Cell],
                     whose: str, max_batch_tokens: int, decoding: Decoding,
                     positions: str) -> list[dict]:
    """Return the records of questions of equal shape: answers, what the metric reads in them
    ("parsed"), scores, and how many rows there were.

    whose: "gold" or "own", the answers whose information the oracles measure.
    """
    stream = together([model.begin(image, question.prompt)
                       for question, image in zip(questions, images)])
    layers_of = layers_to_measure(cells)
    layers = {0, model.num_layers}.union(*layers_of.values(),
                                         {first_layer(model, cell) for cell in cells})
    streams = inputs_of_layers(model, {0: stream}, layers)
    own_answers = decode(model, streams[model.num_layers], *decoding)

    def answers_for(method) -> list[str]:
        if not method.needs_gold:
            return own_answers
        target = MEASURES[method.measure].target
        return [answer_to_measure(question, whose, target, own)
                for question, own in zip(questions, own_answers)]
    info = measure_beforehand(model, streams, layers_of, answers_for, max_batch_tokens)
    seeds = [question.seed for question in questions]
    pruned_cells = [cell for cell in cells if cell.schedule]
    found = answer_cells(model, streams, pruned_cells, info, seeds, decoding, positions)
    return [record_of(question, stream, {"unpruned": own} | of_prompt)
            for question, own, of_prompt in zip(questions, own_answers, found)]


def record_of(question: Question, stream: Stream, answers: dict[str, str]) -> dict:
    read = {key: score(answer, question) for key, answer in answers.items()}
    return {"answers": answers,
            "parsed": {key: parsed for key, (parsed, _) in read.items()},
            "scores": {key: value for key, (_, value) in read.items()},
            "visual_tokens": stream.N, "text_rows": stream.x.shape[1] - stream.N}


# ---- scores --------------------------------------------------------------------------------------

def summarize(model, questions: list[Question], records: list[dict],
              cells: list[Cell]) -> list[dict]:
    """Return a row for each schedule, its seeds averaged: score and paired differences in percent,
    tokens, FLOPs, counts of odd answers."""
    image = images_of(questions)
    # by the schedule's text: as tuples, keep 0 equals remove 0.0
    groups = grouped(cells, lambda cell: format_schedule(cell.schedule))
    scores = {}
    for schedule, group in groups.items():
        scores[schedule] = [[record["scores"][cell.key] for record in records] for cell in group]
    means = {schedule: 100 * np.mean(of_seeds, 0) for schedule, of_seeds in scores.items()}
    rows = []
    for schedule, group in groups.items():
        row = {"method": group[0].name, "schedule": schedule,
               "layer": group[0].schedule[0][0] if schedule else None,
               "score": float(means[schedule].mean()), "seeds": len(group),
               "standard_error": standard_error(means[schedule], image)}
        row |= differences(group[0], means, image)
        row |= costs(model, group[0], records)
        row["totals"] = totals(questions, scores[schedule])
        row |= odd_answers(group, questions, records)
        rows.append(row)
    return rows


def differences(cell: Cell, means: dict[str, np.ndarray], image: np.ndarray) -> dict:
    """Return paired differences from the rows that are there: of the unpruned model; of the same
    schedule by random or an oracle; of none at its first layer; of the first schedule."""
    own = format_schedule(cell.schedule)

    def minus(other: tuple):
        text = format_schedule(other)
        if text not in means or text == own:
            return None
        return paired_difference(means[own], means[text], image)
    with_oracles = {name: minus(with_method(cell.schedule, name)) for name in ORACLES}
    return {"minus_unpruned": minus(()),
            "minus_random": minus(with_method(cell.schedule, "random")),
            "minus_none": minus(((cell.schedule[0][0], "none", 0),)) if cell.schedule else None,
            "minus_first": minus(cell.compared_with) if cell.compared_with else None,
            "minus_oracles": {name: value for name, value in with_oracles.items() if value}}


def with_method(schedule: tuple, method: str) -> tuple:
    """Return the same layers and amounts by one method; a stage that keeps nothing stays."""
    return tuple((layer, old if METHODS[old].keeps_none else method, amount)
                 for layer, old, amount in schedule)


def costs(model, cell: Cell, records: list[dict]) -> dict:
    """Return means over the questions: tokens kept at last, tokens at a layer's input, prefill
    GFLOPs."""
    alive = np.array([visual_tokens(cell.schedule, record["visual_tokens"], model.num_layers)
                      for record in records])                       # (questions, layers)
    rows = alive + [[record["text_rows"]] for record in records]
    gflops = [flops(model.config.text, of_question) / 1e9 for of_question in rows.tolist()]
    return {"kept": float(alive[:, -1].mean()), "mean_visual_tokens": float(alive.mean()),
            "gflops": float(np.mean(gflops))}


def totals(questions: list[Question], of_seeds: list[list[float]]) -> dict:
    """Return what the benchmark's paper reports, averaged over seeds; {} if that is the score."""
    each = [official_totals(questions, np.array(scores)) for scores in of_seeds]
    means = {}
    for name, value in each[0].items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        means[name] = float(np.mean([run[name] for run in each])) if is_number else value
    return means


def odd_answers(group: list[Cell], questions: list[Question], records: list[dict]) -> dict:
    """Count the answers that are empty, that the metric cannot read, or that begin with a right one
    and go on."""
    counts = {"empty": 0, "unparsed": 0, "overlong": 0}
    for question, record in zip(questions, records):
        for cell in group:
            parsed = record["parsed"][cell.key]
            counts["empty"] += not record["answers"][cell.key].strip()
            counts["unparsed"] += parsed is None
            counts["overlong"] += is_overlong(parsed, question)
    return counts


# ---- what the flags ask for ----------------------------------------------------------------------

def parse_arguments(argv: list[str]):
    p = flags.Parser("eval.py", "Scores of a vision-language model with its visual tokens pruned.")
    group = p.add_argument_group("pruning")
    flags.add_pruning_flags(group, METHODS, "20")
    group.add_argument("--positions", choices=["keep", "compact"], default="keep",
                       help="positions of kept tokens: original or renumbered (default: keep)")
    group.add_argument("--seeds", type=flags.whole(1), default=3, metavar="N",
                       help="seeds that methods which draw are averaged over (default: 3)")
    flags.add_information_flags(group)
    flags.add_answer_flags(flags.add_model_flags(p))
    flags.add_data_flags(p)
    flags.add_output_flags(p, "draw score against layer")
    args = p.parse_args(argv)
    flags.resolve_pruning(args, "20")
    if args.plot and args.schedule:
        raise InputError("--plot: draws score against layer; want --layer and --ratio, not "
                         "--schedule")
    flags.check_picture(args.plot)
    return args


def parse_cells(args, L: int) -> list[Cell]:
    """Return what the flags ask for, each with its seeds, behind the unpruned model and no image at
    all. Beside each --schedule is random in the place of its methods. L: layers of the model."""
    schedules = flags.schedules_of(args, ["none", "random"], METHODS, L)
    rows = [("unpruned", (), ()), ("no image", ((0, "none", 0),), ())]
    first = schedules[0] if len(schedules) > 1 else ()  # what others are compared with
    for schedule in schedules:
        if args.schedule:
            for one in (schedule, with_method(schedule, "random")):
                rows.append((format_schedule(one), one, first))
        else:
            rows.append((schedule[0][1], schedule, ()))
    cells = {}
    for name, schedule, compared_with in rows:
        is_drawn = any(METHODS[method].draws for _, method, _ in schedule)
        for seed in range(args.seeds if is_drawn else 1):
            cell = Cell(name, schedule, args.seed + seed, compared_with)
            cells.setdefault(cell.key, cell)            # what is asked for twice runs once
    return list(cells.values())


# ---- the program ---------------------------------------------------------------------------------

def main(argv: list[str]):
    args = parse_arguments(argv)
    cells = parse_cells(args, flags.num_layers(args))       # wrong flags are named before loading
    data = flags.load_data(args)
    model = flags.load_model(args)
    samples = {name: flags.sample(known, args.limit, args.seed) for name, known in data.items()}
    look_at(model, samples)
    settings = settings_of(args, model, data)
    out = open_folder(args, settings)
    result = settings | provenance(args, model) | {"prompts": {}, "benchmarks": {}, "space": {}}

    def work(questions, images):
        return answer_questions(model, questions, images, cells, args.answers,
                                args.max_batch_tokens, flags.decoding(args), args.positions)
    at_once = flags.at_once(args, most_variants(cells))
    for benchmark, questions in data.items():
        asked = samples[benchmark]
        prompt = report.print_asked(benchmark, asked, questions, flags.template(model))
        records = collect(out, benchmark, asked, model, work, at_once)
        rows = summarize(model, asked, records, cells)
        for row in rows:
            row |= {"asked": len(asked), "of": len(questions)}
            if "complete" in row["totals"]:
                row["totals"]["complete"] &= len(asked) == len(questions)
        report.print_scores(benchmark, rows, len({question.image for question in asked}))
        result["prompts"][benchmark] = prompt
        result["benchmarks"][benchmark] = rows
        measured = {METHODS[method].measure for method in layers_to_measure(cells)}
        if any(MEASURES[measure].target == "first" for measure in measured):
            space = count_spaces(model, asked, records, args.answers)
            result["space"][benchmark] = space
            report.print_space(benchmark, space, len(asked))
    print(f"{flags.where(model)}; {flags.penalty(args)}; answers in {out}")
    if args.plot and RANK == 0:
        plot(result["benchmarks"], args.plot)
    write_result(out, result, args.json)


if __name__ == "__main__":
    start(main)
