"""How well plan.py keeps its promise, and how timid it is, on a built-in model and its benchmarks.

    python tiny/promise.py                    LLaVA
    python tiny/promise.py --model tiny/qwen

Timid is what costs more than the cheapest schedule that keeps the loss. Every schedule is asked of
every question once, into --out; splitting them is arithmetic. One question an image, drawn at
random, in the search, too, where plan.py asks all. The schedules are plan.py's coarse grid for each
loss, with nothing from one of three layers on: more than a plan searches, so that it has more to be
lucky on.
"""
import math
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plan  # noqa: E402
from support import flags  # noqa: E402
from support.report import print_heads, print_row  # noqa: E402
from support.run import grouped, open_folder, settings_of, start  # noqa: E402
from support.statistics import at_most, from_there_on  # noqa: E402

SPLITS = 200
LOSSES = (0.05, 0.1)
CONFIDENCE = 0.95
DRAWN = [(40, 120), (100, 300), (300, 1000), (1000, 3000)]      # searched, tested


def main(argv: list[str]):
    p = flags.Parser("tiny/promise.py", "How well plan.py keeps its promise.")
    flags.add_answer_flags(flags.add_model_flags(p))
    flags.add_memory_flag(flags.add_data_flags(p))
    p.add_argument("--out", type=Path, metavar="FOLDER", help="run folder")
    args = p.parse_args(argv)
    data = flags.load_data(args)
    model = flags.load_model(args)
    out = open_folder(args, settings_of(args, model, data))
    L = model.num_layers
    print_heads(["benchmark", "loss", "questions", "promise broken", "cost", "nothing promised",
                 "without a test: broken", "cost", "cheapest that keeps it"])
    for name, known in data.items():
        asked = flags.sample(known, args.limit, args.seed)
        rng = random.Random(args.seed)
        of_image = grouped(asked, lambda question: question.image)
        questions = [rng.choice(about_it) for about_it in of_image.values()]
        schedules = [((layer, "none", 0),) for layer in range(L)]
        records = plan.records_of(args, model, out / "none", {name: questions}, schedules)
        changed = plan.changed_in(records, schedules)
        horizons = [from_there_on(changed.mean(0) <= loss) for loss in LOSSES]
        last = sorted({horizon + later for horizon in horizons for later in (0, 1, 3)})
        grid = [schedule for layer in last if layer < L for schedule in plan.coarse(L, layer)]
        of_grid = plan.records_of(args, model, out / "grid", {name: questions}, grid)
        changed = np.hstack([changed, plan.changed_in(of_grid, grid)])
        cost = plan.costs(model, schedules + grid, records, "flops")
        simulate(name, schedules + grid, changed, cost, records[0]["visual_tokens"], L)


def simulate(name: str, schedules: list[tuple], changed: np.ndarray, cost: np.ndarray, N: int,
             L: int):
    """Print a row for random splits of the questions, and for draws of more, with replacement.

    schedules: the first L drop everything at layer 0, 1, ... changed: (Q, S). cost: (S,), share of
    the unpruned model's.
    """
    careful = plan.more_careful(schedules, N, L)
    Q = len(changed)
    for loss in LOSSES:
        for sizes in [None, *DRAWN]:
            is_sample = sizes is None
            rng = np.random.default_rng(0)
            found = []
            for _ in range(SPLITS):
                if is_sample:                           # as plan.py splits; judged on the others
                    order = rng.permutation(Q)
                    a = math.ceil(plan.SEARCHED * Q)
                    b = a + math.ceil(plan.TESTED * (Q - a))
                    searched, tested, others = np.split(changed[order], [a, b])
                else:                                   # judged on all that they are drawn from
                    searched, tested = (changed[rng.integers(0, Q, n)] for n in sizes)
                    others = changed
                luck = cheapest(searched.mean(0), cost, loss)
                chosen = choose(searched, tested, schedules, careful, cost, loss, L)
                found.append([*judge(chosen, others, cost, loss, is_sample), chosen is None,
                              *judge(luck, others, cost, loss, is_sample)])
            broken, mean, nothing, broken_by_luck, mean_by_luck = np.mean(found, 0)
            asked = f"{Q} split" if is_sample else "{} + {} drawn".format(*sizes)
            print_row([name, f"{loss:.0%}", asked, f"{broken:.1%}", f"{mean:.2f}", f"{nothing:.0%}",
                       f"{broken_by_luck:.0%}", f"{mean_by_luck:.2f}",
                       f"{cost[cheapest(changed.mean(0), cost, loss)]:.2f}"])


def choose(searched, tested, schedules, careful, cost, loss: float, L: int) -> int | None:
    """Return what plan.py chooses, its search limited to these schedules; None if nothing.

    searched, tested: (questions, S) bool.
    """
    share = searched.mean(0)
    horizon = from_there_on(share[:L] <= loss)
    among = np.array([i for i, s in enumerate(schedules) if s[-1][0] >= horizon], int)
    risk = plan.smooth(share[among], len(searched), careful[np.ix_(among, among)])
    stages = np.array([len(schedules[i]) for i in among])
    walked = [among[i] for i in plan.steps(cost[among], risk, stages, loss)]
    p_values = [at_most(int(tested[:, i].sum()), len(tested), loss) for i in walked]
    passed = plan.walk(p_values, CONFIDENCE)
    return walked[passed - 1] if passed else None


def cheapest(share: np.ndarray, cost: np.ndarray, loss: float) -> int | None:
    """Return the cheapest schedule that changes at most the loss; None if there is none."""
    keeps = np.flatnonzero(share <= loss)
    return keeps[cost[keeps].argmin()] if len(keeps) else None


def judge(chosen: int | None, others: np.ndarray, cost: np.ndarray, loss: float,
          is_sample: bool) -> tuple:
    """Return whether the promise is broken, and what the choice costs; to choose nothing costs 1.

    It is broken if more than the loss of the others change; where they are a sample, if so many
    changes or more had a probability under 1 - CONFIDENCE at a share of the loss.
    """
    if chosen is None:
        return False, 1.0
    count = int(others[:, chosen].sum())
    if is_sample:
        p = 1 - at_most(count - 1, len(others), loss) if count else 1.0
        return p < 1 - CONFIDENCE, cost[chosen]
    return count > loss * len(others), cost[chosen]


if __name__ == "__main__":
    start(main)
