"""Tables in markdown, and the sentences that say what they mean. Every verdict is read off paired
95 % intervals; no method but none and random is known by name."""
import json
import math
import shlex

import numpy as np

from support.benchmarks import COLUMNS, remarks
from support.statistics import FEW, NOISE, at_most, mean_of_layer_1, share_interval
from tokprune import METHODS


def print_heads(heads: list[str], first: str = "---"):
    """Print the head of a table; first: "---:" where its first column holds numbers."""
    print_row(heads)
    print(f"|{first}|" + "---:|" * (len(heads) - 1))


def print_row(cells: list[str]):
    print("| " + " | ".join(cells) + " |")


def number(value: float | None, spec: str = ".1f") -> str:
    return "-" if value is None else format(value, spec)


def significant(value: float) -> str:
    """Format with three digits, or with all that stand before the point: never as 8.1e+03."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def difference(values) -> str:
    """Format mean and interval, as +1.0 [-0.5, +2.5]; the mean only where there is no interval."""
    if values is None:
        return "-"
    mean, low, high = values
    if low is None:
        return f"{mean:+z.1f}"                          # z: -0.0 becomes +0.0
    return f"{mean:+z.1f} [{low:+z.1f}, {high:+z.1f}]"


def listed(names: list) -> str:
    """Join names as "a, b and c"."""
    names = [str(name) for name in names]
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def at_layers(layers: list[int]) -> str:
    """Say "at layer 17", or "at layers 17 and 18"."""
    return f"at layer{'s' if len(layers) > 1 else ''} {listed(layers)}"


def count_images(images: int) -> str:
    return f"{images} image" if images == 1 else f"{images} images"


def print_asked(benchmark: str, questions: list, known: list, template: str) -> str:
    """Print how much of the benchmark is asked, and the first prompt, which is returned."""
    images = count_images(len({question.image for question in questions}))
    part = f"all {len(known)} questions"
    if len(questions) < len(known):
        part = f"partial, {len(questions)} of its {len(known)} questions"
    asked = ", ".join([part, images, *remarks(questions)])
    prompt = template.format(question=questions[0].prompt)
    print(f"\n{benchmark}: {asked}; the first prompt: {json.dumps(prompt)}\n")
    return prompt


# ---- scores --------------------------------------------------------------------------------------

def print_scores(benchmark: str, rows: list[dict], images: int):
    """Print a benchmark's table and what it means; images: how many are asked about."""
    if len(layers_of(rows)) > 1:
        print_sweep(benchmark, rows)
    else:
        print_table(benchmark, rows)
    if images < FEW:
        print_few(benchmark, images)
    elif len(layers_of(rows)) > 1:
        print_sweep_verdict(benchmark, rows)
    else:
        print_verdict(benchmark, rows, images)
    print_odd(benchmark, rows)


def print_few(benchmark: str, images: int):
    count = count_images(images)
    print(f"{benchmark}: {count}: no intervals (a bootstrap wants {FEW} at least), and no verdict."
          "\n")


def print_table(benchmark: str, rows: list[dict]):
    """Print a row for each schedule."""
    totals = [name for name in COLUMNS if name in rows[0]["totals"]]
    others = ["unpruned", "random", "none"]
    if any(row["minus_first"] for row in rows):
        others.append("first")
    print_heads([benchmark, "score", "±", *totals, *[f"- {other}" for other in others],
                 "kept", "mean tokens", "GFLOPs"])
    for row in rows:
        cells = [row["method"], number(row["score"]), number(row["standard_error"])]
        # POPE has no total where one of its files has no answer
        cells += [number(row["totals"][name], ".5g") for name in totals]
        cells += [difference(row[f"minus_{other}"]) for other in others]
        cells += [significant(row["kept"]), number(row["mean_visual_tokens"]),
                  significant(row["gflops"])]
        print_row(cells)
    print()


ODD = {"empty": "empty answers", "unparsed": "unparsed answers",
       "overlong": "answers that begin with a right one and go on"}


def print_odd(benchmark: str, rows: list[dict]):
    """Print how many answers of each row are odd, where any are."""
    for kind, name in ODD.items():
        counts = [f"{row['schedule'] or 'unpruned'} {row[kind]}" for row in rows if row[kind]]
        if counts:
            print(f"{benchmark}, {name}: {', '.join(counts)}\n")


def print_space(benchmark: str, space: int, asked: int):
    """Warn if the first token of some answers is only a space."""
    if space:
        print(f"{benchmark}: the first token of {space} of {asked} answers is only a space, whose "
              "information says nothing.")


def compared_rows(rows: list[dict], key: str) -> list[dict]:
    """Return rows of methods that need nothing measured beforehand and are compared by that key."""
    return [row for row in rows
            if row["method"] in METHODS and not METHODS[row["method"]].measure and row[key]]


def against(rows: list[dict], key: str) -> tuple[list[dict], list[dict]]:
    """Return the rows whose whole interval lies above 0, and those whose lies below."""
    rows = compared_rows(rows, key)
    above = [row for row in rows if row[key][1] > 0]
    below = [row for row in rows if row[key][2] < 0]
    return above, below


EQUAL = 5                       # points: a smaller cost of dropping everything counts as none


def print_verdict(benchmark: str, rows: list[dict], images: int):
    """Print what a table at one layer, of questions about so many images, means: is the layer
    before the horizon, and are a few tokens worth it?"""
    layers = layers_of(rows)
    compared = compared_rows(rows, "minus_random")
    if len(layers) != 1 or not compared:
        return
    methods = [row for row in compared if not METHODS[row["method"]].draws]
    of_random = said_of(methods, "minus_random", "random")
    of_none = said_of(methods, "minus_none", "dropping every visual token")
    more, less = against(methods, "minus_none")
    advice = " Prune later, or drop everything." if less and not more else ""
    print(f"{benchmark}: {side_of_horizon(rows, layers[0], images)}: {of_random}; {of_none}."
          f"{advice}\n")


def side_of_horizon(rows: list[dict], layer: int, images: int) -> str:
    """Say on which side of the horizon a layer lies. Before it: the interval of what dropping
    everything costs lies wholly above 0. Past it: wholly under EQUAL, and there are enough images
    to see a cost of EQUAL.

    Where nothing is lost on n images, up to 3 / n of the score may still be (95 %).
    """
    _, low, high = next(row["minus_unpruned"] for row in rows
                        if row["method"] in ("none", "no image") and row["layer"] == layer)
    if high < 0:
        return f"layer {layer} is before the horizon"
    if low > -EQUAL and 300 / images <= EQUAL:
        return f"layer {layer} is past the horizon"
    return f"too few questions to tell whether layer {layer} is past the horizon"


def said_of(methods: list[dict], key: str, what: str) -> str:
    """Say "5 of 6 methods beat random, by 9.6 to 15.6 points"."""
    parts = []
    verbs = [("beats", "beat"), ("loses to", "lose to")]
    for rows, (one, several) in zip(against(methods, key), verbs):
        leads = sorted(abs(row[key][0]) for row in rows)
        if len(leads) == 1:
            parts.append(f"1 of {len(methods)} methods {one} {what}, by {leads[0]:.1f} points")
        elif leads:
            parts.append(f"{len(leads)} of {len(methods)} methods {several} {what}, by "
                         f"{leads[0]:.1f} to {leads[-1]:.1f} points")
    return " and ".join(parts) or f"no method differs from {what}"


# ---- a sweep over layers -------------------------------------------------------------------------

def print_sweep(benchmark: str, rows: list[dict]):
    """Print a row for each layer, a column for each method."""
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    scores = {(row["method"], row["layer"]): row["score"] for row in rows}
    scores.setdefault(("none", 0), scores.get(("no image", 0)))
    print_heads([f"{benchmark}, layer", *names], "---:")
    for name, layer in (("unpruned", None), ("no image", 0)):
        print_row([name] + [number(scores[name, layer])] * len(names))
    for layer in layers_of(rows):
        print_row([str(layer)] + [number(scores.get((name, layer))) for name in names])
    print()


def layers_of(rows: list[dict]) -> list[int]:
    """Return where methods prune; several in a sweep."""
    return sorted({row["layer"] for row in rows if row["method"] in METHODS})


def layer_no_method_beats_random(rows: list[dict]) -> int:
    """Return the first layer from which on no method has a paired 95 % interval wholly above
    random's; the layer after the last where there is none. Oracles do not count."""
    above, _ = against(rows, "minus_random")
    last = max((row["layer"] for row in above), default=-1)
    later = [layer for layer in layers_of(rows) if layer > last]
    return later[0] if later else layers_of(rows)[-1] + 1


def print_sweep_verdict(benchmark: str, rows: list[dict]):
    """Print from which layer no method beats random, and where a few tokens are worse than none."""
    compared = compared_rows(rows, "minus_random")
    if not compared:
        return
    most = max(compared, key=lambda row: row["minus_random"][0])
    print(f"{benchmark}: no method beats random from layer {layer_no_method_beats_random(rows)} on "
          f"(our rule; oracles do not count). The largest lead over random is "
          f"{difference(most['minus_random'])}, {most['method']} at layer {most['layer']}.")
    _, below = against(rows, "minus_none")
    layers = sorted({row["layer"] for row in below})
    if layers:
        print(f"{benchmark}: some method's tokens are worse than none {at_layers(layers)}.\n")
    else:
        print(f"{benchmark}: no method's tokens are shown to be worse than none at any layer.\n")


# ---- information ---------------------------------------------------------------------------------

def print_information_table(benchmark: str, found: dict):
    """Print a row for each layer: the score with everything dropped there, and what its windows
    tell."""
    heads = [f"{benchmark}, layer", "all dropped", "KL, nats", "information", "±", "spread",
             "Gini", f"windows over {NOISE:g}", f"under -{NOISE:g}"]
    print_heads(heads, "---:")
    by_score = found["horizons"]["score"]
    by_divergence = found["horizons"]["divergence"]
    for row in found["information"]:
        layer = row["layer"]
        print_row([str(layer), number(by_score["scores"][layer]),
                   f"{by_divergence['nats'][layer]:.4f}", f"{row['mean']:+.4f}",
                   number(row["standard_errors"]["mean"], ".4f"), f"{row['spread']:.4f}",
                   f"{row['gini']:.2f}", f"{row['share'] - row['negative']:.0%}",
                   f"{row['negative']:.0%}"])
    print()


def print_information(benchmark: str, found: dict, tolerance: float, threshold: float, target: str):
    """Print what is found of a benchmark: a table, horizons by both rules, verdicts."""
    print_information_table(benchmark, found)
    print_parts(benchmark, found)
    by_score = found["horizons"]["score"]
    by_divergence = found["horizons"]["divergence"]
    L = len(by_score["scores"])
    costs = "costs" if found["with_gold"] else "changes"
    of_what = "score" if found["with_gold"] else "answers"
    rule = f"dropping every visual token {costs} {{}} {tolerance:.1%} of the {of_what}"
    place = "unpruned score is 0: no horizon."
    if by_score["unpruned"]:
        place = f"unpruned {by_score['unpruned']:.1f}; {place_of(by_score, L, rule)}"
    print(f"{benchmark}: {place}")
    rule = f"the divergence is {{}} {threshold:.2%} of layer 0's"
    print(f"{benchmark}: without gold answers, {place_of(by_divergence, L, rule)}")
    if found["images"] < FEW:
        print_few(benchmark, found["images"])
    print_information_verdict(benchmark, found["information"], found["vanishes"])
    if target == "first":
        print_space(benchmark, found["space"], found["asked"])
    if found["with_gold"]:
        print(f"{benchmark}: the unpruned model gives the gold answer to {found['right']} of "
              f"{found['with_gold']} questions.")
    print()


def print_parts(benchmark: str, found: dict):
    """Print the horizons of each group of questions, and of each token of the answers."""
    print_heads([f"{benchmark}, part", "questions", "horizon by score", "half of the gain from",
                 "horizon by divergence", "at most half of it from"])
    L = len(found["horizons"]["divergence"]["nats"])
    for name, horizons in ({"all": found["horizons"]} | found["parts"]).items():
        cells = [name, str(horizons["questions"])]
        for rule in ("score", "divergence"):
            of_rule = horizons[rule]
            place = f"{of_rule['layer']}" if of_rule["layer"] < L else "none"
            half = f"{of_rule['half']}" if of_rule["half"] < L else "none"
            cells += [place + interval_of(of_rule), half]
        print_row(cells)
    print()


def interval_of(horizon: dict) -> str:
    """Format a horizon's interval, as " [17, 20]"; nothing where there is none."""
    return "" if horizon["low"] is None else f" [{horizon['low']:g}, {horizon['high']:g}]"


def place_of(horizon: dict, L: int, rule: str) -> str:
    """Say a horizon's layer and interval, and what holds from there on. rule has a place for "at
    most", or for "more than" where layer L, past the last, says that there is none."""
    interval = interval_of(horizon)
    if horizon["layer"] < L:
        return (f"horizon at layer {horizon['layer']}{interval}: from there on, "
                f"{rule.format('at most')} (our rule).")
    return f"no horizon{interval}: even at layer {L - 1}, {rule.format('more than')} (our rule)."


def print_information_verdict(benchmark: str, rows: list[dict], vanishes: int | None):
    """Print where information is gone, and where it misleads."""
    if mean_of_layer_1(rows) > 0:
        gone = "never stays" if vanishes is None else f"from layer {vanishes} on stays"
        print(f"{benchmark}: mean information {gone} under 1 % of layer 1's (our rule).")
    misleading = []
    for row in rows:
        error = row["standard_errors"]["mean"]
        if error is not None and row["mean"] + 1.96 * error < 0:
            misleading.append(row["layer"])
    if misleading:
        print(f"{benchmark}: {at_layers(misleading)} it is negative, its whole interval under 0: a "
              "window alone makes the answer less likely than no image at all.")


def print_distance_of_horizons(benchmarks: dict):
    """Print how much deeper the second benchmark's horizon lies, where there are two."""
    if len(benchmarks) != 2 or any(found["images"] < FEW for found in benchmarks.values()):
        return
    (one, first), (other, second) = benchmarks.items()
    a = first["horizons"]["score"]
    b = second["horizons"]["score"]
    if not (a["unpruned"] and b["unpruned"]):
        return
    low, high = np.percentile(np.subtract(b["draws"], a["draws"]), [2.5, 97.5])
    print(f"{other}'s horizon lies {b['layer'] - a['layer']:+d} [{low:+g}, {high:+g}] layers from "
          f"{one}'s\n")


# ---- plans ---------------------------------------------------------------------------------------

COST = {"flops": "prefill FLOPs", "tokens": "visual tokens"}


def print_plan(plan: dict, model_flags: list[str], other_flags: list[str]):
    """Print the walk from careful to cheap, what is promised, and how to check and time it: with
    these flags, which bench.py needs, and those, which eval.py needs as well."""
    name = listed(plan["benchmarks"])
    print_heads([name, "tokens", "FLOPs", "changed: searched", "tested", "p", "untouched", "score"])
    print_row(["unpruned", "100%", "100%", "-", "-", "-", "-", number(plan["unpruned"])])
    for row in plan["walk"]:
        schedule = f"**{row['schedule']}**" if row is plan["chosen"] else row["schedule"]
        print_row([schedule, f"{row['tokens']:.0%}", f"{row['flops']:.0%}", changed(row["search"]),
                   changed(row["test"]), f"{row['p_value']:.1g}", changed(row["report"]),
                   number(row["score"])])
    print()
    if plan["chosen"]:
        print_promise(plan, name, model_flags, other_flags)
    else:
        print_nothing(plan, name)


def changed(counts: list[int]) -> str:
    """Format counts as "2 of 120, 2% [0, 6]", with the 95 % interval of independent questions."""
    count, of = counts
    if of == 0:
        return "-"
    low, high = share_interval(count, of)
    return f"{count} of {of}, {count / of:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def print_promise(plan: dict, name: str, model_flags: list[str], other_flags: list[str]):
    row = plan["chosen"]
    print(f"{name}: `{row['schedule']}` saves {1 - row[plan['cost']]:.0%} of the "
          f"{COST[plan['cost']]}. With a confidence of {plan['confidence']:.0%} it changes at most "
          f"{plan['loss']:.0%} of the model's answers (tested: {changed(row['test'])}). Untouched "
          f"questions: {changed(row['report'])}.")
    if row["schedule"].startswith("none@"):
        print(f"{name}: no method is shown to be worth it: all that is saved is past the horizon.")
    flags = [*model_flags, "--schedule", row["schedule"]]
    print()
    if plan["unpruned"] is not None:                    # eval.py wants gold answers
        print("   ", shlex.join(["python", "eval.py", *flags, *other_flags]))
    print("   ", shlex.join(["python", "bench.py", *flags]), end="\n\n")


def print_nothing(plan: dict, name: str):
    """Say that nothing is promised, and what would help."""
    if not plan["walk"]:
        print(f"{name}: nothing is promised: on the questions searched, every schedule seems to "
              "change far more; want a larger --loss.\n")
        return
    row = plan["walk"][0]
    print(f"{name}: nothing is promised: `{row['schedule']}`, the most careful, changed "
          f"{changed(row['test'])}, too many for at most {plan['loss']:.0%} with a confidence of "
          f"{plan['confidence']:.0%}. What would help: {what_helps(plan, *row['test'])}.\n")


def what_helps(plan: dict, count: int, of: int) -> str:
    """Say how many test questions would pass, if the share that changes stayed."""
    share = count / of
    if share >= 0.9 * plan["loss"]:                     # it may well change more than the loss
        return "a larger --loss"
    asked = of
    while at_most(math.ceil(share * asked), asked, plan["loss"]) > 1 - plan["confidence"]:
        asked += math.ceil(asked / 20)
    return f"about {asked} questions to test on, where there are {of}, or a larger --loss"
