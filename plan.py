"""The cheapest schedule that keeps a model's own answers, with a promise that holds.

    python plan.py                                      the built-in model and benchmarks
    python plan.py --bench mine.jsonl --loss 0.05       questions of one's own, no gold answers
    torchrun --nproc-per-node 8 plan.py ...             the same results, faster

Questions are split by image in three. On some, about a hundred schedules are searched; what looks
best there is partly luck. So a few of them, from careful to cheap, are tested on other questions
(Learn then Test, arXiv 2110.01052; a walk as in Pareto Testing, arXiv 2210.07913), and only what
passes is promised: it changes at most a share --loss of the unpruned model's answers. The questions
that are left report how the promise was kept.

In this order: the promise, what guides the search, schedules and questions, a plan, the program.

    S schedules   Q questions   L layers   changed (Q, S): whether an answer is not the unpruned one
"""
import math
import random
from itertools import takewhile
from pathlib import Path

import numpy as np

from eval import Cell, answer_cells, most_variants
from support import flags
from support.benchmarks import METRICS, Question
from support.pictures import plot_plans
from support.report import print_plan
from support.run import (RANK, collect, grouped, look_at, open_folder, provenance, settings_of,
                         start, write_result)
from support.statistics import at_most, from_there_on
from tokprune import (METHODS, Decoding, InputError, Stream, flops, format_schedule,
                      parse_schedule, together, visual_tokens)


# ---- the promise ---------------------------------------------------------------------------------

def walk(p_values: list[float], confidence: float) -> int:
    """Return how many schedules pass, in an order that was fixed before their test was seen.

    The hypothesis of each is that it changes more than the loss; its p-value, how likely so few
    changed test questions, or fewer, would be if it changed exactly the loss. The first that cannot
    be rejected ends the walk. A false promise needs the first true hypothesis in the order to be
    rejected, so its probability is at most 1 - confidence, however many schedules there are.
    """
    return len(list(takewhile(lambda p: p <= 1 - confidence, p_values)))


# ---- what guides the search ----------------------------------------------------------------------

STEP = 0.1                              # of the unpruned model's cost
HOPELESS = 3                            # times the loss: what seems to change more is not tested


def more_careful(schedules: list[tuple], N: int, L: int) -> np.ndarray:
    """Return (S, S) bool: [a, b] where schedule a keeps at every layer at least as many tokens as
    b, by no method that b does not use. Keeping none takes no method."""
    tokens = np.array([visual_tokens(schedule, N, L) for schedule in schedules])
    methods = [{name for _, name, _ in schedule if not METHODS[name].keeps_none}
               for schedule in schedules]
    uses_no_other = np.array([[a <= b for b in methods] for a in methods])
    return uses_no_other & (tokens[:, None] >= tokens[None]).all(-1)


NEIGHBORS = 40                          # weight of the neighbors' mean share, in questions


def smooth(share: np.ndarray, asked: int, careful: np.ndarray) -> np.ndarray:
    """Return the risk (S,) of each schedule, a steadier guess than its share of changed answers.

    One that changed nothing on a few questions is no better than its more careful neighbors. So its
    own share, of so many asked, is averaged with the mean share of those at least as careful as it
    and that of those at most as careful; with many questions its own decides.
    """
    safer = (careful * share[:, None]).sum(0) / careful.sum(0)
    bolder = (careful * share[None]).sum(1) / careful.sum(1)
    return (asked * share + NEIGHBORS * (safer + bolder) / 2) / (asked + NEIGHBORS)


def steps(cost: np.ndarray, risk: np.ndarray, stages: np.ndarray, loss: float) -> list[int]:
    """Return the schedules to walk, from careful to cheap: of each step of the cost the one of
    least risk. Among equals the simpler, of fewer stages; then the costlier, for it keeps more.

    A step stays even where a cheaper one seems safer, which is often luck on a few questions,
    unless its own risk is over the loss, too.
    """
    step = np.floor(cost / STEP + 1e-9)
    order = np.lexsort((-cost, stages, risk))
    best = [int(order[step[order] == one][0]) for one in np.unique(step)]       # cheap first
    walked = []
    least = HOPELESS * loss                             # risk of the cheaper ones
    for i in best:
        if risk[i] <= max(loss, least):
            walked.append(i)
            least = min(least, risk[i])
    return walked[::-1]


# ---- schedules and questions ---------------------------------------------------------------------

RATIOS = (0.25, 0.5, 0.75)
SEARCHED = 0.2                          # of the images
TESTED = 0.75                           # of the other images


def coarse(L: int, horizon: int) -> list[tuple]:
    """Return the schedules to begin with: every method that needs nothing measured beforehand, at a
    few layers and ratios, then nothing from the horizon on (L: there is none)."""
    schedules = []
    for layer in sorted({0, 2, L // 3, L // 2}):
        for name, method in METHODS.items():
            cannot = method.measure or method.keeps_none or method.needs_layer and layer == 0
            if layer < horizon and not cannot:
                schedules += [with_none(layer, name, ratio, horizon, L) for ratio in RATIOS]
    return schedules


def narrow(schedules: list[tuple], L: int) -> list[tuple]:
    """Return their neighbors: a little less or more removed, two layers sooner or later, nothing
    from one layer or two later on."""
    found = []
    for (layer, name, ratio), *last in schedules:
        if METHODS[name].keeps_none:
            continue
        horizon = last[0][0] if last else L
        first = 1 if METHODS[name].needs_layer else 0
        found += [with_none(layer, name, ratio + change, horizon, L) for change in (-0.125, 0.125)]
        found += [with_none(other, name, ratio, horizon, L) for other in (layer - 2, layer + 2)
                  if first <= other < horizon]
        found += [with_none(layer, name, ratio, min(horizon + later, L), L) for later in (1, 2)]
    return list(dict.fromkeys(found))


def with_none(layer: int, name: str, ratio: float, horizon: int, L: int) -> tuple:
    """Return the schedule of a method, then of nothing from the horizon on if that is a layer."""
    last = ((horizon, "none", 0),) if horizon < L else ()
    return ((layer, name, ratio), *last)


def split(data: dict[str, list[Question]], seed: int) -> dict[str, dict[str, list[Question]]]:
    """Draw by image which questions of the benchmarks to search, test and report on: a part's
    questions by benchmark. Two questions about one image are not independent, whichever benchmarks
    they are of: one an image is tested."""
    pairs = [(name, question) for name, questions in data.items() for question in questions]
    of_image = grouped(pairs, lambda pair: str(pair[1].image))
    rng = random.Random(seed)
    images = sorted(of_image)
    rng.shuffle(images)
    a = math.ceil(SEARCHED * len(images))
    b = a + math.ceil(TESTED * (len(images) - a))
    parts = {part: {name: [] for name in data} for part in ("search", "test", "report")}
    for i, image in enumerate(images):
        about_it = of_image[image]
        part = "search" if i < a else "report"
        if a <= i < b:
            part = "test"
            about_it = [rng.choice(about_it)]
        for name, question in about_it:
            parts[part][name].append(question)
    return parts


def answer_questions(model, questions: list[Question], images: list, cells: list[Cell],
                     decoding: Decoding) -> list[dict]:
    """Return the records of questions of equal shape, by the name of each cell: answers; which of
    them are changed; scores where there is a gold answer."""
    stream = together([model.begin(image, question.prompt)
                       for question, image in zip(questions, images)])
    seeds = [question.seed for question in questions]
    found = answer_cells(model, {0: stream}, cells, {}, seeds, decoding)
    return [record_of(question, {cell.name: answers[cell.key] for cell in cells}, stream)
            for question, answers in zip(questions, found)]


def record_of(question: Question, answers: dict[str, str], stream: Stream) -> dict:
    """An answer is changed if the metric reads it in another way than the unpruned one; where there
    is no metric, or it reads nothing, if it is another text."""
    parse = METRICS.get(question.metric, str)
    read = {name: parse(answer) or answer for name, answer in answers.items()}
    scores = {"unpruned": 1.0}                          # its own target
    if question.gold:
        scores = {name: question.points(answer) for name, answer in answers.items()}
    return {"answers": answers, "scores": scores, "gold": bool(question.gold),
            "changed": [name for name in answers if read[name] != read["unpruned"]],
            "visual_tokens": stream.N, "text_rows": stream.x.shape[1] - stream.N}


def changed_in(records: list[dict], schedules: list[tuple]) -> np.ndarray:
    """Return (Q, S) bool."""
    texts = [format_schedule(schedule) for schedule in schedules]
    changed = [[text in record["changed"] for text in texts] for record in records]
    return np.array(changed, bool).reshape(len(records), len(texts))


def costs(model, schedules: list[tuple], records: list[dict], of: str) -> np.ndarray:
    """Return what each schedule costs as a share of the unpruned model, (S,); of: prefill "flops",
    text rows included, or visual "tokens" at the layers' inputs."""
    L = model.num_layers

    def total(schedule) -> float:
        alive = [visual_tokens(schedule, record["visual_tokens"], L) for record in records]
        if of == "tokens":
            return sum(map(sum, alive))
        return sum(flops(model.config.text, [record["text_rows"] + V for V in tokens])
                   for tokens, record in zip(alive, records))
    unpruned = total(())
    return np.array([total(schedule) / unpruned for schedule in schedules])


# ---- a plan --------------------------------------------------------------------------------------

def make_plan(model, ask, loss: float, confidence: float, cost_of: str = "flops") -> dict:
    """Search, test and report. Returns a row for every schedule searched, those of the walk, and
    the last one promised (None if there is none).

    ask(part, schedules, stage) -> the records of a part's questions: "search", "test", "report".
    """
    horizon, searched, walked = search(model, ask, loss, cost_of)
    schedules = [tuple(parse_schedule(row["schedule"])) for row in walked]
    records = []
    for part in ("test", "report"):
        of_part = ask(part, schedules, part)
        for row, changed in zip(walked, changed_in(of_part, schedules).sum(0)):
            row[part] = [int(changed), len(of_part)]
        records += of_part
    for row in walked:
        row["p_value"] = at_most(*row["test"], loss)
        row["score"] = mean_score(records, row["schedule"])
    passed = walk([row["p_value"] for row in walked], confidence)
    return {"loss": loss, "confidence": confidence, "cost": cost_of, "horizon": horizon,
            "layers": model.num_layers, "unpruned": mean_score(records, "unpruned"),
            "searched": searched, "walk": walked, "chosen": walked[passed - 1] if passed else None}


def search(model, ask, loss: float, cost_of: str) -> tuple[int, list[dict], list[dict]]:
    """Return the horizon, a row for every schedule searched, and the rows to walk: everything
    dropped at each layer, then a coarse grid, then the neighbors of what seems best."""
    L = model.num_layers
    dropped = [((layer, "none", 0),) for layer in range(L)]
    records = ask("search", dropped, "horizon")
    horizon = from_there_on(changed_in(records, dropped).mean(0) <= loss)
    schedules = dropped[horizon:]
    changed = changed_in(records, schedules)
    more = coarse(L, horizon)
    for stage in ("coarse", "narrow"):
        schedules = schedules + more
        changed = np.hstack([changed, changed_in(ask("search", more, stage), more)])
        cost = {of: costs(model, schedules, records, of) for of in ("flops", "tokens")}
        careful = more_careful(schedules, records[0]["visual_tokens"], L)
        risk = smooth(changed.mean(0), len(changed), careful)
        stages = np.array([len(schedule) for schedule in schedules])
        walked = steps(cost[cost_of], risk, stages, loss)
        more = [near for near in narrow([schedules[i] for i in walked], L)
                if near not in schedules]
    rows = []
    for i, schedule in enumerate(schedules):
        rows.append({"schedule": format_schedule(schedule), "flops": float(cost["flops"][i]),
                     "tokens": float(cost["tokens"][i]), "risk": float(risk[i]),
                     "search": [int(changed[:, i].sum()), len(changed)]})
    return horizon, rows, [rows[i] for i in walked]


def mean_score(records: list[dict], name: str) -> float | None:
    """Return the mean score of a schedule in percent; None if a question has no gold answer."""
    if not all(record["gold"] for record in records):
        return None
    return 100 * float(np.mean([record["scores"][name] for record in records]))


# ---- the program ---------------------------------------------------------------------------------

def parse_arguments(argv: list[str]):
    between = flags.number_that(lambda value: 0 < value < 1, "more than 0 and less than 1")
    p = flags.Parser("plan.py", "The cheapest schedule that keeps the model's own answers.")
    group = p.add_argument_group("what to promise")
    group.add_argument("--loss", type=between, default=0.1, metavar="SHARE",
                       help="share of the answers that a schedule may change (default: 0.1)")
    group.add_argument("--confidence", type=between, default=0.95, metavar="SHARE",
                       help="how sure the promise has to be (default: 0.95)")
    group.add_argument("--cost", choices=["flops", "tokens"], default="flops",
                       help="what is to be saved: prefill FLOPs or visual tokens (default: flops)")
    group.add_argument("--each", action="store_true",
                       help="choose for each benchmark on its own (default: for all together)")
    flags.add_memory_flag(group)
    flags.add_answer_flags(flags.add_model_flags(p))
    flags.add_data_flags(p)
    flags.add_output_flags(p, "picture of the search (default: plan.svg in the run folder)")
    args = p.parse_args(argv)
    flags.check_picture(args.plot)
    return args


def main(argv: list[str]):
    args = parse_arguments(argv)
    data = {name: flags.sample(questions, args.limit, args.seed)
            for name, questions in flags.load_data(args, gold=False).items()}
    bench = dict(zip(data, flags.benchmarks_of(args)))
    plain = parse_arguments([])
    model_flags = flags.repeated(args, plain, "model", "dtype", "min_pixels", "max_pixels")
    other_flags = flags.repeated(args, plain, "max_new_tokens", "repetition_penalty", "data",
                                 "prompt_style")
    groups = [{name: data[name]} for name in data] if args.each else [data]
    splits = [split(group, args.seed) for group in groups]
    for group, parts in zip(groups, splits):            # before any work
        tested = sum(map(len, parts["test"].values()))
        check_questions(tested, list(group), args.loss, args.confidence)
    model = flags.load_model(args)
    look_at(model, data)
    settings = settings_of(args, model, data)
    out = open_folder(args, settings)
    result = settings | provenance(args, model) | {"plans": []}
    for group, parts in zip(groups, splits):
        def ask(part: str, schedules: list[tuple], stage: str) -> list[dict]:
            return records_of(args, model, out / stage, parts[part], schedules)
        plan = {"benchmarks": list(group)}
        plan |= make_plan(model, ask, args.loss, args.confidence, args.cost)
        files = ["--bench", ",".join(bench[name] for name in group)]
        print_plan(plan, model_flags, other_flags + files)
        result["plans"].append(plan)
    if RANK == 0:
        picture = args.plot or out / "plan.svg"
        plot_plans(result["plans"], picture)
        print(f"{flags.where(model)}; {flags.penalty(args)}; answers in {out}, picture in "
              f"{picture}")
    write_result(out, result, args.json)


def records_of(args, model, folder: Path, data: dict, schedules: list[tuple]) -> list[dict]:
    """Return the records of each benchmark's questions, answered by the unpruned model and under
    each schedule; they are stored in the folder."""
    cells = [Cell("unpruned", ())]
    cells += [Cell(format_schedule(schedule), schedule, args.seed) for schedule in schedules]
    at_once = flags.at_once(args, most_variants(cells))

    def work(questions, images):
        return answer_questions(model, questions, images, cells, flags.decoding(args))
    folder.mkdir(exist_ok=True)
    records = []
    for name, questions in data.items():
        records += collect(folder, name, questions, model, work, at_once)
    return records


def check_questions(tested: int, names: list[str], loss: float, confidence: float):
    """Raise InputError if so few test questions cannot promise the loss, even if none changes."""
    # the fewest for which (1 - loss) ** needed is at most 1 - confidence
    needed = math.ceil(math.log(1 - confidence) / math.log1p(-loss))
    if tested < needed:
        images = math.ceil(needed / TESTED / (1 - SEARCHED))
        message = (f"--loss {loss:g}: wants {needed} images to test on at a confidence of "
                   f"{confidence:g}, about {images} in all; {', '.join(names)} leaves {tested}")
        if tested:
            message += f"; they could promise {1 - (1 - confidence) ** (1 / tested):.2f}"
        raise InputError(message)


if __name__ == "__main__":
    start(main)
