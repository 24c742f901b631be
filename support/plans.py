"""What plan.py found: a table, the sentences that say what it means, and a picture."""
import math
from pathlib import Path

from support.pictures import HEIGHT, INK, MARGIN, TITLE, WIDTH, Axes, Sheet, corners
from support.report import listed, number, print_heads, print_row
from support.statistics import at_most, share_interval
from tokprune import METHODS, parse_schedule


COST = {"flops": "prefill FLOPs", "tokens": "visual tokens"}


# ---- the table and the sentences -----------------------------------------------------------------

def print_plan(plan: dict, model: Path, bench: str):
    """Print the walk from careful to cheap, what is promised, and how to check and time it."""
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
    print(f"{name}: `{row['schedule']}` saves {1 - row[plan['cost']]:.0%} of the "
          f"{COST[plan['cost']]}. With a confidence of {plan['confidence']:.0%} it changes at most "
          f"{plan['loss']:.0%} of the model's answers (tested: {changed(row['test'])}). Untouched "
          f"questions: {changed(row['report'])}.")
    if METHODS[method_of(row)].keeps_none:
        print(f"{name}: no method is shown to be worth it: all that is saved is past the horizon.")
    if model.is_relative_to(Path.cwd()):
        model = model.relative_to(Path.cwd())
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


# ---- the picture ---------------------------------------------------------------------------------

MOST = 50                               # percent: schedules that change more lie at the top


def plot(plans: list[dict], path: Path):
    """Draw answers changed against cost, a panel for each plan: what was searched as dots in the
    color of its method, the walk as a line where it was tested, what is chosen with a ring, the
    promise dashed. Raises InputError."""
    names = {method_of(row) for plan in plans for row in plan["searched"]}
    names = [name for name in METHODS if name in names]
    across = min(2, len(plans))
    bottom = math.ceil(len(plans) / across) * HEIGHT
    entries = 4 * across                                # of the legend, in a line
    sheet = Sheet(across * WIDTH, bottom + 32 * math.ceil(len(names) / entries) + 12)
    for plan, (left, top) in zip(plans, corners(across, WIDTH, HEIGHT)):
        box = (left + MARGIN, top + MARGIN, left + WIDTH - 20, top + MARGIN + 400)
        axes = Axes(sheet, box, [0, 20, 40, 60, 80, 100], -2, MOST + 1)
        axes.grid("answers changed, %", f"{COST[plan['cost']]}, % of the unpruned model's")
        sheet.text(left + WIDTH / 2, top + 24, listed(plan["benchmarks"]), TITLE, room=WIDTH)
        draw_plan(axes, plan)
    for name, (x, y) in zip(names, corners(entries, (across * WIDTH - 40) / entries, 32)):
        dot(sheet, 30 + x, bottom + y, 6, METHODS[name].color)
        sheet.text(46 + x, bottom + y, name, anchor="start")
    sheet.save(path)


def draw_plan(axes: Axes, plan: dict):
    def spots(rows: list[dict], part: str) -> list[tuple]:
        costs = [100 * row[plan["cost"]] for row in rows]
        shares = [100 * row[part][0] / row[part][1] for row in rows]
        return axes.points(costs, [min(share, MOST) for share in shares])
    y = axes.y(100 * plan["loss"])
    axes.sheet.line([(axes.x0, y), (axes.x1, y)], INK, 1.6, (9, 6))
    for row, (x, y) in zip(plan["searched"], spots(plan["searched"], "search")):
        dot(axes.sheet, x, y, 4, METHODS[method_of(row)].color, fill_opacity=0.5)
    walked = spots(plan["walk"], "test")
    axes.sheet.line(walked, INK, 2.4)
    for row, (x, y) in zip(plan["walk"], walked):
        dot(axes.sheet, x, y, 7, METHODS[method_of(row)].color, stroke="white", stroke_width=1.5)
        if row == plan["chosen"]:
            axes.sheet.add("circle", cx=x, cy=y, r=13, fill="none", stroke=INK, stroke_width=2.4)


def dot(sheet: Sheet, x: float, y: float, radius: float, color: str, **attributes):
    sheet.add("circle", cx=x, cy=y, r=radius, fill=color, **attributes)


def method_of(row: dict) -> str:
    return parse_schedule(row["schedule"])[0][1]
