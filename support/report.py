"""Tables in markdown, and the sentences that say what they mean. Every verdict is read off paired
95 % intervals; no method but random is known by name."""
import json

import numpy as np

from support.benchmarks import COLUMNS, remarks
from support.statistics import NOISE, mean_of_layer_1
from tokprune import METHODS


def print_heads(heads: list[str], first: str = "---"):
    """The head of a table; first: "---:" where its first column holds numbers."""
    print("| " + " | ".join(heads) + " |")
    print(f"|{first}|" + "---:|" * (len(heads) - 1))


def print_row(cells: list[str]):
    print("| " + " | ".join(cells) + " |")


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def total(value: float | None) -> str:
    """A benchmark's own total; POPE has none where one of its three files has no answer."""
    return "-" if value is None else f"{value:.5g}"


def difference(values) -> str:
    """Mean and interval, as +1.0 [-0.5, +2.5]."""
    if values is None:
        return "-"
    mean, low, high = (round(value, 1) + 0.0 for value in values)       # -0.0 is 0
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def listed(names: list) -> str:
    """"a, b and c"."""
    names = [str(name) for name in names]
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def at_layers(layers: list[int]) -> str:
    """"at layer 17", "at layers 17 and 18", or "at no layer"."""
    if not layers:
        return "at no layer"
    return f"at layer{'s' if len(layers) > 1 else ''} {listed(layers)}"


def part_of(asked: int, known: int) -> str:
    if asked < known:
        return f"partial, {asked} of its {known} questions"
    return f"all {known} questions"


def print_asked(benchmark: str, questions: list, known: list, template: str) -> str:
    """How much of the benchmark is asked, and the first prompt, which is returned."""
    images = len({question.image for question in questions})
    prompt = template.format(question=questions[0].prompt)
    asked = [part_of(len(questions), len(known)), f"{images} images", *remarks(questions)]
    print(f"\n{benchmark}: {', '.join(asked)}; the first prompt: {json.dumps(prompt)}\n")
    return prompt


# ---- scores --------------------------------------------------------------------------------------

def print_table(benchmark: str, rows: list[dict]):
    """A row for each schedule."""
    totals = [name for name in COLUMNS if name in rows[0]["totals"]]
    compared = any(row["minus_first"] for row in rows)
    heads = [benchmark, "score", "±", *totals, "- unpruned", "- random", "- none"]
    if compared:
        heads.append("- first")
    print_heads([*heads, "kept", "mean tokens", "GFLOPs"])
    for row in rows:
        cells = [row["method"], number(row["score"]), number(row["standard_error"])]
        cells += [total(row["totals"][name]) for name in totals]
        cells += [difference(row[key]) for key in ("minus_unpruned", "minus_random", "minus_none")]
        if compared:
            cells.append(difference(row["minus_first"]))
        cells += [f"{row['kept']:.3g}", number(row["mean_visual_tokens"]), f"{row['gflops']:.3g}"]
        print_row(cells)
    print()


ODD = {"failed": "failed answers", "empty": "empty answers", "unparsed": "unparsed answers",
       "overlong": "answers that begin with a right one and go on"}


def print_odd(benchmark: str, rows: list[dict]):
    """How many answers of each row are odd, where any are."""
    for kind, name in ODD.items():
        counts = [f"{row['schedule'] or 'unpruned'} {row[kind]}" for row in rows if row[kind]]
        if counts:
            print(f"{benchmark}, {name}: {', '.join(counts)}\n")


def print_blank(benchmark: str, blank: int, asked: int):
    """Of how many gold answers the first token is a blank, where it is of any."""
    if blank:
        print(f"{benchmark}: target first sees no content in {blank} of {asked} answers: their "
              "first token is a blank.")


def compared_rows(rows: list[dict], key: str) -> list[dict]:
    """Rows of methods that need nothing measured beforehand and are compared by that key."""
    chosen = []
    for row in rows:
        method = METHODS.get(row["method"])
        if method and not method.measure and row.get(key):
            chosen.append(row)
    return chosen


def against(rows: list[dict], key: str) -> tuple[list[dict], list[dict]]:
    """The rows whose whole interval lies above 0, and those whose whole interval lies below."""
    above = [row for row in compared_rows(rows, key) if row[key][1] > 0]
    below = [row for row in compared_rows(rows, key) if row[key][2] < 0]
    return above, below


EQUAL = 5                       # points: a smaller cost of dropping everything counts as none


def print_verdict(benchmark: str, rows: list[dict], images: int):
    """What a table at one layer, of questions about so many images, means: is the layer before the
    horizon, and are a few tokens worth it?"""
    layers = layers_of(rows)
    compared = compared_rows(rows, "minus_random")
    if len(layers) != 1 or not compared:
        return
    methods = [row for row in compared if not METHODS[row["method"]].draws]
    better, worse = against(methods, "minus_random")
    more, less = against(methods, "minus_none")
    of_random = said_of(better, worse, "minus_random", "random", len(methods))
    of_none = said_of(more, less, "minus_none", "dropping every visual token", len(methods))
    advice = " Prune later, or drop everything." if less and not more else ""
    print(f"{benchmark}: {side_of_horizon(rows, layers[0], images)}: {of_random}; {of_none}."
          f"{advice}\n")


def side_of_horizon(rows: list[dict], layer: int, images: int) -> str:
    """Before the horizon: the interval of what dropping everything costs lies wholly above 0. Past
    it: wholly under EQUAL, and there are enough images to see a cost of EQUAL.

    Where nothing is lost on n images, up to 3 / n of the score may still be (95 %).
    """
    dropped = [row["minus_unpruned"] for row in rows
               if row["method"] in ("none", "no image") and row["layer"] == layer]
    _, low, high = dropped[0]
    if high < 0:
        return f"layer {layer} is before the horizon"
    if low > -EQUAL and 300 / images <= EQUAL:
        return f"layer {layer} is past the horizon"
    return f"too few questions to tell whether layer {layer} is past the horizon"


def said_of(above: list[dict], below: list[dict], key: str, what: str, of: int) -> str:
    """"5 of 6 methods beat random, by 9.6 to 15.6 points"."""
    parts = []
    for rows, one, several in ((above, "beats", "beat"), (below, "loses to", "lose to")):
        if rows:
            leads = sorted(abs(row[key][0]) for row in rows)
            span = f"{leads[0]:.1f}"
            if len(leads) > 1:
                span = f"{leads[0]:.1f} to {leads[-1]:.1f}"
            verb = one if len(rows) == 1 else several
            parts.append(f"{len(rows)} of {of} methods {verb} {what}, by {span} points")
    if not parts:
        return f"no method differs from {what}"
    return " and ".join(parts)


# ---- a sweep over layers -------------------------------------------------------------------------

def print_sweep(benchmark: str, rows: list[dict]):
    """A row for each layer, a column for each method, and what the paper asks of a sweep."""
    names = ["none"] + [name for name in METHODS if any(row["method"] == name for row in rows)]
    layers = layers_of(rows)
    scores = {(row["method"], row["layer"]): row["score"] for row in rows}
    scores.setdefault(("none", 0), scores.get(("no image", 0)))
    print_heads([f"{benchmark}, layer", *names], "---:")
    for name, layer in (("unpruned", None), ("no image", 0)):
        print_row([name] + [number(scores[name, layer])] * len(names))
    for layer in layers:
        print_row([str(layer)] + [number(scores.get((name, layer))) for name in names])
    print()
    if compared_rows(rows, "minus_random"):
        print_lead_over_random(benchmark, rows)
        print_lead_over_none(benchmark, rows)
        for oracle in oracles_of(rows):
            print_lead_of_oracle(benchmark, rows, oracle)
    print()


def layers_of(rows: list[dict]) -> list[int]:
    """Where methods prune; several in a sweep."""
    return sorted({row["layer"] for row in rows if row["method"] in METHODS})


def oracles_of(rows: list[dict]) -> list[str]:
    names = {row["method"] for row in rows}
    return [name for name, method in METHODS.items() if method.needs_gold and name in names]


def layer_no_method_beats_random(rows: list[dict]) -> int:
    """The first layer from which on no method has a paired 95 % interval wholly above random's; the
    layer after the last where there is none. Oracles do not count."""
    above, _ = against(rows, "minus_random")
    last = max((row["layer"] for row in above), default=-1)
    later = [layer for layer in layers_of(rows) if layer > last]
    return later[0] if later else layers_of(rows)[-1] + 1


def print_lead_over_random(benchmark: str, rows: list[dict]):
    compared = compared_rows(rows, "minus_random")
    _, below = against(rows, "minus_random")
    layer = layer_no_method_beats_random(rows)
    most = max(compared, key=lambda row: row["minus_random"][0])
    print(f"{benchmark}: no method beats random from layer {layer} on (our rule; oracles apart). "
          f"The largest lead over random is {difference(most['minus_random'])}, {most['method']} "
          f"at layer {most['layer']}. {len(below)} of {len(compared)} cells are below random, "
          f"their whole interval under 0; by chance one expects {0.025 * len(compared):.0f}.")
    past = [row["minus_random"] for row in compared if row["layer"] >= layer]
    if past:
        low = min(values[1] for values in past)
        high = max(values[2] for values in past)
        print(f"{benchmark}: from layer {layer} on every method is within [{low:+.1f}, {high:+.1f}]"
              " of random.")


def print_lead_over_none(benchmark: str, rows: list[dict]):
    """Where the kept tokens are worth more than none, and where less."""
    above, below = against(rows, "minus_none")
    for chosen, verb in ((above, "beat"), (below, "lose to")):
        by_layer = {}
        for row in chosen:
            by_layer.setdefault(row["layer"], []).append(row["method"])
        if by_layer:
            parts = [f"{layer} ({', '.join(by_layer[layer])})" for layer in sorted(by_layer)]
            print(f"{benchmark}: methods {verb} dropping everything at layer {', '.join(parts)}.")
        else:
            print(f"{benchmark}: no method is shown to {verb} dropping everything at any layer.")


def layers_of_oracle(rows: list[dict], oracle: str) -> tuple[list[int], list[int]]:
    """Layers at which the oracle beats every method, and those at which some method beats it."""
    differences = {}
    for row in rows:
        method = METHODS.get(row["method"])
        if method and not method.measure and oracle in row["minus_oracles"]:
            differences.setdefault(row["layer"], []).append(row["minus_oracles"][oracle])
    wins = []
    losses = []
    for layer, values in differences.items():
        if all(high < 0 for _, _, high in values):
            wins.append(layer)
        if any(low > 0 for _, low, _ in values):
            losses.append(layer)
    return wins, losses


def print_lead_of_oracle(benchmark: str, rows: list[dict], oracle: str):
    wins, losses = layers_of_oracle(rows, oracle)
    leads = []
    for layer in layers_of(rows):
        rivals = [row for row in compared_rows(rows, "minus_random")
                  if row["layer"] == layer and oracle in row["minus_oracles"]]
        if rivals:
            best = max(rivals, key=lambda row: row["score"])
            mean, low, high = best["minus_oracles"][oracle]
            leads.append(((-mean, -high, -low), best["method"], layer))
    if not leads:
        return
    lead, method, layer = max(leads)
    print(f"{benchmark}: {oracle} beats every method {at_layers(wins)}; some method beats it "
          f"{at_layers(losses)}; its largest lead over the best method is {difference(lead)}, over "
          f"{method} at layer {layer}.")


# ---- information ---------------------------------------------------------------------------------

def print_information_table(benchmark: str, found: dict):
    """A row for each layer: the score with everything dropped there, and what its windows tell."""
    heads = [f"{benchmark}, layer", "all dropped", "KL, nats", "information", "±", "spread",
             "Gini", f"windows over {NOISE:g}", f"under -{NOISE:g}"]
    print_heads(heads, "---:")
    by_score = found["horizons"]["score"]
    by_divergence = found["horizons"]["divergence"]
    for row in found["information"]:
        layer = row["layer"]
        print_row([str(layer), number(by_score["scores"][layer]),
                   number(by_divergence["nats"][layer], 4), f"{row['mean']:+.4f}",
                   number(row["standard_errors"]["mean"], 4), f"{row['spread']:.4f}",
                   f"{row['gini']:.2f}", f"{row['share'] - row['negative']:.0%}",
                   f"{row['negative']:.0%}"])
    print()


def print_information(benchmark: str, found: dict, args):
    """What is found of a benchmark: a table, horizons, verdicts, and the price."""
    print_information_table(benchmark, found)
    by_score = found["horizons"]["score"]
    by_divergence = found["horizons"]["divergence"]
    L = len(by_score["scores"])
    costs = "costs" if found["with_gold"] else "changes"
    of_what = "score" if found["with_gold"] else "answers"
    rule = f"dropping every visual token {costs} {{}} {args.tolerance:.1%} of the {of_what}"
    print(f"{benchmark}: unpruned {by_score['unpruned']:.1f}; {place_of(by_score, L, rule)}"
          f"{cost_of(by_score, args)}")
    rule = f"the divergence is {{}} {args.threshold:.2%} of layer 0's"
    print(f"{benchmark}: without gold answers, {place_of(by_divergence, L, rule)}"
          f"{cost_of(by_divergence, args)}")
    print_information_verdict(benchmark, found["information"], found["vanishes"])
    if args.target == "first":
        print_blank(benchmark, found["blank"], found["asked"])
    if found["with_gold"]:
        print(f"{benchmark}: the unpruned model gives the gold answer to {found['right']} of "
              f"{found['with_gold']} questions.")
    print(f"{benchmark}: the same windows, measured one by one, differ by at most "
          f"{found['noise']:.1e}.")
    if found["own_and_gold"]:
        print_own_and_gold(benchmark, found)
    if "agreement" in found:
        print_agreement(benchmark, found)
    ours, official = found["gflops"]
    print(f"{benchmark}: {ours:.3g} GFLOPs for one question; the official procedure would "
          f"take {official:.3g}, {official / ours:.1f} times as many.\n")


def print_own_and_gold(benchmark: str, found: dict):
    """How often the model's own answer is not the gold one, and how alike their maps are there."""
    known = [value for of_layers in found["own_and_gold"] for value in of_layers
             if value is not None]
    mean = np.mean(known) if known else None
    print(f"{benchmark}: the model's own answer differs from the gold one in "
          f"{len(found['own_and_gold'])} of {found['with_gold']} questions; there, the rank "
          f"correlation of their maps is {number(mean, 2)}, mean over questions and layers.")


def print_agreement(benchmark: str, found: dict):
    """A row for each cheap score, a column for each layer."""
    layers = [str(row["layer"]) for row in found["information"]]
    print("\nSpearman's rank correlation with the information of single tokens, mean ± standard "
          "error:\n")
    print_heads([f"{benchmark}, at layer", *layers])
    for name, of_layers in found["agreement"].items():
        cells = [f"{number(mean, 2)} ± {number(error, 2)}" for mean, error in of_layers]
        print_row([name, *cells])
    print()


def cost_of(horizon: dict, args) -> str:
    if horizon["cost"] is None:
        return ""
    return (f" Measured on {args.calibrate} questions, it costs {horizon['cost']:.1f} % of the "
            "score of the others.")


def place_of(horizon: dict, L: int, rule: str) -> str:
    """A horizon's layer and interval, and what holds from there on. rule has a place for "at most",
    or for "more than" where layer L, past the last, says that there is none."""
    interval = f"[{horizon['low']:g}, {horizon['high']:g}]"
    if horizon["layer"] < L:
        return (f"horizon at layer {horizon['layer']} {interval}: from there on, "
                f"{rule.format('at most')} (our rule).")
    return f"no horizon {interval}: even at layer {L - 1}, {rule.format('more than')} (our rule)."


def print_information_verdict(benchmark: str, rows: list[dict], vanishes: int | None):
    """Where information is gone, and where it misleads."""
    base = mean_of_layer_1(rows)
    if base is not None and base > 0:
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
    """How much deeper the second benchmark's horizon lies, where there are two."""
    if len(benchmarks) != 2:
        return
    (one, first), (other, second) = benchmarks.items()
    a = first["horizons"]["score"]
    b = second["horizons"]["score"]
    low, high = np.percentile(np.subtract(b["draws"], a["draws"]), [2.5, 97.5])
    print(f"{other}'s horizon lies {b['layer'] - a['layer']:+d} [{low:+g}, {high:+g}] layers from "
          f"{one}'s\n")
