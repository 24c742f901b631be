"""What plan.py found: a table, the sentences that say what it means, and a picture."""
import math
from html import escape
from pathlib import Path

from support.files import write_text
from support.report import number, print_heads, print_row
from support.statistics import share_interval
from tokprune import METHODS, parse_schedule


# ---- the table and the sentences -----------------------------------------------------------------

def print_plan(plan: dict, model: Path, bench: str):
    """Print the walk from careful to cheap, what is promised, and how to check and time it."""
    name = " and ".join(plan["benchmarks"])
    print_heads([name, "tokens", "FLOPs", "changed: searched", "tested", "p", "untouched", "score"])
    print_row(["unpruned", "100%", "100%", "-", "-", "-", "-", number(plan["unpruned"])])
    for row in plan["walk"]:
        schedule = f"**{row['schedule']}**" if row is plan["chosen"] else row["schedule"]
        print_row([schedule, f"{row['tokens']:.0%}", f"{row['flops']:.0%}", changed(row["search"]),
                   changed(row["test"]), f"{row['p_value']:.1g}", changed(row["report"]),
                   number(row["score"])])
    print()
    if plan["chosen"]:
        print_promise(plan, name, model, bench)
    else:
        print_nothing(plan, name)


def changed(counts: list[int]) -> str:
    """Format counts as "2 of 120, 2% [0, 6]", with the exact 95 % interval."""
    count, of = counts
    if of == 0:
        return "-"
    low, high = share_interval(count, of)
    return f"{count} of {of}, {count / of:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def print_promise(plan: dict, name: str, model: Path, bench: str):
    row = plan["chosen"]
    saved = 1 - row[plan["cost"]]
    what = {"flops": "prefill FLOPs", "tokens": "visual tokens"}[plan["cost"]]
    print(f"{name}: `{row['schedule']}` saves {saved:.0%} of the {what}. With a confidence of "
          f"{plan['confidence']:.0%} it changes at most {plan['loss']:.0%} of the model's answers "
          f"(tested: {changed(row['test'])}). Untouched questions: {changed(row['report'])}.")
    if len(parse_schedule(row["schedule"])) == 1 and row["schedule"].startswith("none"):
        print(f"{name}: no method is worth more than dropping everything at the horizon.")
    print(f"""
    python eval.py --model {model} --bench {bench} --schedule "{row['schedule']}"
    python bench.py --model {model} --schedule "{row['schedule']}"
""")


def print_nothing(plan: dict, name: str):
    """Say that nothing is promised, and what would help."""
    if not plan["walk"]:
        print(f"{name}: nothing is promised: on the questions searched, every schedule seems to "
              "change far more; want a larger --loss.\n")
        return
    row = plan["walk"][0]
    count, of = row["test"]
    share = max(count, 1) / of
    help = "a larger --loss"
    if share < plan["loss"]:                            # normal approximation
        z = 1.645 * math.sqrt(plan["loss"] * (1 - plan["loss"])) / (plan["loss"] - share)
        help = f"about {math.ceil(z ** 2)} questions to test on, where there are {of}, or " + help
    print(f"{name}: nothing is promised: `{row['schedule']}`, the most careful, changed "
          f"{changed(row['test'])}, too many for at most {plan['loss']:.0%} with a confidence of "
          f"{plan['confidence']:.0%}. What would help: {help}.\n")


# ---- the picture ---------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP = 460, 340, 60, 40             # of a panel's plot
MOST = 0.5                                              # more changed answers are drawn at the top


def plot(plans: list[dict], file: Path):
    """Draw answers changed against cost, a panel for each plan: searched schedules as points in
    their method's color, the walk as a line where it was tested, the promise as a dashed line."""
    parts = []
    for number, plan in enumerate(plans):
        parts += panel(plan, LEFT + number * (WIDTH + LEFT + 20))
    names = sorted({method_of(row) for plan in plans for row in plan["searched"]},
                   key=list(METHODS).index)
    for i, name in enumerate(names):
        x = LEFT + 15 + i % 9 * 72
        parts.append(f'<circle cx="{x}" cy="14" r="4" fill="{METHODS[name].color}"/>'
                     + text(x + 8, 18, name, "start"))
    width = max(len(plans) * (WIDTH + LEFT + 20) + 10, LEFT + 80 + 72 * len(names))
    write_text(file, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} '
               f'{TOP + HEIGHT + 50}" font-family="sans-serif" font-size="13" fill="#222">'
               '<rect width="100%" height="100%" fill="white"/>' + "\n".join(parts) + "</svg>\n")


def panel(plan: dict, left: float) -> list[str]:
    def spot(row: dict, counts: list[int]) -> tuple[float, float]:
        share = min(counts[0] / counts[1], MOST)
        return left + WIDTH * row[plan["cost"]], TOP + HEIGHT * (1 - share / MOST)

    parts = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
             'stroke="#e4e4e4"/>']
    for percent in range(0, 101, 20):
        parts.append(text(left + WIDTH * percent / 100, TOP + HEIGHT + 17, percent))
    for percent in range(0, round(100 * MOST) + 1, 10):
        y = TOP + HEIGHT * (1 - percent / 100 / MOST)
        parts.append(text(left - 8, y + 4, percent, "end"))
    what = {"flops": "prefill FLOPs", "tokens": "visual tokens"}[plan["cost"]]
    parts.append(text(left + WIDTH / 2, TOP + HEIGHT + 38,
                      f"{' and '.join(plan['benchmarks'])}: {what}, % of the unpruned model"))
    parts.append(text(left + 4, TOP + 14, "answers changed, %", "start"))
    y = TOP + HEIGHT * (1 - plan["loss"] / MOST)
    parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#222" stroke-dasharray="6 4"/>')
    for row in plan["searched"]:
        x, y = spot(row, row["search"])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" opacity="0.5" '
                     f'fill="{METHODS[method_of(row)].color}"/>')
    spots = [spot(row, row["test"]) for row in plan["walk"]]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#222" stroke-width="2"/>')
    for row, (x, y) in zip(plan["walk"], spots):
        radius = 8 if row is plan["chosen"] else 5
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" stroke="#222" '
                     f'fill="{METHODS[method_of(row)].color}"><title>{escape(row["schedule"])}'
                     '</title></circle>')
    return parts


def method_of(row: dict) -> str:
    return parse_schedule(row["schedule"])[0][1]


def text(x: float, y: float, words, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(words))}</text>'
