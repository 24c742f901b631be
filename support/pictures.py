"""What the programs find, as SVG written as text: scores by layer; what schedules cost and change;
information by layer, and where it lies in an image; the tokens that methods keep.

A picture stands alone: it has a white page of its own, its images are embedded, and it asks for no
script, link or font. Lengths are pixels; letters can be read at half the size.
"""
import html
import math
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from support.files import write_text
from support.page import data_url
from support.report import COST, interval_of, layers_of, listed
from tokprune import METHODS, parse_schedule

INK = "#222222"
GREY = "#6e6e6e"
PALE = "#e4e4e4"
TITLE = 25                              # sizes of letters
TEXT = 21
BAND = 0.3                              # opacity


class Sheet:
    """A white page, and what is drawn on it so far."""

    def __init__(self, width: int, height: int):
        self.size = {"width": width, "height": height}
        self.elements = []
        self.add("rect", **self.size, fill="white")

    def add(self, name: str, content: str = "", **attributes):
        self.elements.append(element(name, content, **attributes))

    def text(self, x: float, y: float, text: str, size: int = TEXT, anchor: str = "middle",
             ink: str = INK, room: float = math.inf):
        """Write one line, its middle at height y. Text that is wider than `room` is cut."""
        self.add("text", escaped(shortened(text, room, size)), x=x, y=y + 0.35 * size,
                 font_size=size, text_anchor=anchor, fill=ink)

    def line(self, points: list, ink: str, width: float, pattern: str = "none"):
        """Draw a line. pattern: lengths drawn and left out in turn."""
        self.add("polyline", points=joined(points), fill="none", stroke=ink, stroke_width=width,
                 stroke_linejoin="round", stroke_dasharray=pattern)

    def embed(self, name: str, image: Image.Image, width: float, height: float):
        """Store an image once, for elements `use` to show it at any place."""
        self.add("defs", element("image", id=name, width=width, height=height,
                                 preserveAspectRatio="none", href=data_url(image)))

    def save(self, path: Path):
        """Write the file. Raises InputError."""
        content = "\n".join(["", *self.elements, ""])
        svg = element("svg", content, xmlns="http://www.w3.org/2000/svg", **self.size,
                      viewBox=f"0 0 {self.size['width']} {self.size['height']}",
                      font_family="Helvetica Neue, Helvetica, Arial, sans-serif")
        write_text(path, svg + "\n")


def element(name: str, content: str = "", **attributes) -> str:
    words = [name]
    for key, value in attributes.items():
        value = round(value, 2) if isinstance(value, float) else value
        words.append(f'{key.replace("_", "-")}="{value}"')
    return f"<{' '.join(words)}>{content}</{name}>"


def joined(points: list) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def escaped(text: str) -> str:
    """Return text as XML can hold it: no character is markup, and none is forbidden."""
    return html.escape(re.sub("[^ -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def shortened(text: str, room: float, size: int) -> str:
    """Return text on one line, cut where it is wider than `room` in a font that runs wide."""
    text = " ".join(text.split())
    ends = size * np.cumsum([width_of(letter) for letter in text])
    if not text or ends[-1] <= room:
        return text
    fits = np.searchsorted(ends, room - 1.5 * size)     # beside " ..."
    return text[:fits].rstrip() + " ..."


def width_of(letter: str) -> float:
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    return 0.36 if letter in " .,:;!|'()[]fijlrtI" else 0.6


# ---- panels, axes, curves ------------------------------------------------------------------------

WIDTH = 760                             # of a panel
HEIGHT = 560                            # of a panel with one pair of axes


def panelled(titles: list[str], height: int, names: list = ()) -> tuple[Sheet, list[tuple]]:
    """Return a sheet with a panel for each title, two in a line, and where each panel lies. Below
    them is a legend of names."""
    across = min(2, len(titles))
    entries = 2 * across + 1                            # of the legend, in a line
    bottom = math.ceil(len(titles) / across) * height
    sheet = Sheet(across * WIDTH, bottom + 32 * math.ceil(len(names) / entries) + 12)
    panels = corners(len(titles), across, WIDTH, height)
    for title, (left, top) in zip(titles, panels):
        sheet.text(left + WIDTH / 2, top + 24, title, TITLE, room=WIDTH)
    keys = corners(len(names), entries, (across * WIDTH - 40) / entries, 32)
    for name, (x, y) in zip(names, keys):
        style_of(name).legend(sheet, 30 + x, bottom + y, name)
    return sheet, panels


def corners(number: int, across: int, width: float, height: float) -> list[tuple]:
    """Return where the cells of a table lie, row by row."""
    return [(i % across * width, i // across * height) for i in range(number)]


class Axes:
    """A frame for values from low to high by layer (or by percent), in the panel at `left`."""

    def __init__(self, sheet: Sheet, left: float, top: float, height: float, layers: list[int],
                 low: float, high: float):
        self.sheet = sheet
        self.x0, self.x1 = left + 88, left + WIDTH - 20
        self.y0, self.y1 = top, top + height
        self.layers = layers
        self.first, self.last = layers[0] - 0.5, layers[-1] + 0.5
        self.low, self.high = low, high

    def x(self, layer: float) -> float:
        return self.x0 + (layer - self.first) / (self.last - self.first) * (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return self.y1 - (value - self.low) / (self.high - self.low) * (self.y1 - self.y0)

    def points(self, layers: list[int], values) -> list[tuple]:
        return [(self.x(layer), self.y(value)) for layer, value in zip(layers, values)]

    def grid(self, name: str, layers_name: str = ""):
        """Draw lines at round values, the one at 0 strongest; the layers; both names."""
        step = round_step((self.high - self.low) / 6)
        digits = max(0, -math.floor(math.log10(step)))
        for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            y = self.y(i * step)
            self.sheet.line([(self.x0, y), (self.x1, y)], PALE if i else GREY, 1)
            self.sheet.text(self.x0 - 9, y, f"{i * step:.{digits}f}", anchor="end")
        free = -math.inf                                # of numbers, from here on
        for layer in self.layers:
            if self.x(layer) >= free:
                self.sheet.text(self.x(layer), self.y1 + 18, str(layer))
                free = self.x(layer) + 36
        self.sheet.text(self.x0 - 62, self.y0 - 22, name, anchor="start")
        self.sheet.text((self.x0 + self.x1) / 2, self.y1 + 48, layers_name)

    def band(self, layers: list[int], low, high, ink: str):
        points = self.points(layers, high) + self.points(layers, low)[::-1]
        self.sheet.add("polygon", points=joined(points), fill=ink, fill_opacity=BAND)

    def dashed(self, start: tuple, end: tuple):
        self.sheet.line([start, end], INK, 1.6, "9 6")

    def horizon(self, layer: int, low: float | None, high: float | None):
        """Draw a dashed line, and its interval as a band, as far as the layers go."""
        if low is not None:
            left, right = self.x(np.clip([low - 0.2, high + 0.2], self.first, self.last))
            self.sheet.add("rect", x=left, y=self.y0, width=right - left,
                           height=self.y1 - self.y0, fill="#eef1f6")
        if layer < self.last:
            self.dashed((self.x(layer), self.y0 - 6), (self.x(layer), self.y1))


def round_step(step: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... and of their tenths."""
    power = 10.0 ** math.floor(math.log10(step))
    return min(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


# disc, square, diamond, triangles
MARKERS = ["M-5.8 0a5.8 5.8 0 1 0 11.6 0a5.8 5.8 0 1 0 -11.6 0z", "M-5.2 -5.2h10.4v10.4h-10.4z",
           "M0 -7.2l7.2 7.2l-7.2 7.2l-7.2 -7.2z", "M0 -6.9l6.9 12.1h-13.8z",
           "M0 6.9l6.9 -12.1h-13.8z"]
PATTERNS = ["none", "17 6", "13 5 3 5"]


@dataclass(frozen=True)
class Style:
    """How a curve looks, whatever lies over or under it."""
    ink: str
    width: float
    pattern: str = "none"
    marker: str = ""                    # of an SVG path; none if empty

    def line(self, sheet: Sheet, points: list):
        sheet.line(points, self.ink, self.width, self.pattern)

    def markers(self, sheet: Sheet, points: list, size: float = 1, opacity: float = 1):
        for x, y in points:                             # with a white rim: seen on other lines
            sheet.add("path", d=self.marker, fill=self.ink, stroke="white", stroke_width=1.5,
                      transform=f"translate({x:.2f} {y:.2f}) scale({size})", opacity=opacity)

    def legend(self, sheet: Sheet, x: float, y: float, name: str):
        self.line(sheet, [(x, y), (x + 46, y)])
        self.markers(sheet, [(x + 23, y)])
        sheet.text(x + 56, y, name, anchor="start")


REFERENCES = {"unpruned": Style(INK, 2.2, "16 7"), "no image": Style(GREY, 2.2, "3 6")}


def style_of(name: str) -> Style:
    if name in REFERENCES:
        return REFERENCES[name]
    method = METHODS[name]
    number = list(METHODS).index(name)
    marker = MARKERS[number % len(MARKERS)]
    if method.keeps_none or method.draws:
        return Style(method.color, 6 if method.keeps_none else 4.4, marker=marker)
    return Style(method.color, 2.4, PATTERNS[number % len(PATTERNS)], marker)


# ---- scores --------------------------------------------------------------------------------------

def plot(report: dict, path: Path):
    """Draw score against the layer that tokens are pruned at, a panel a benchmark.

    report: {benchmark: rows of a sweep}. Methods that draw at random have a band, their 95 %
    interval. Raises InputError.
    """
    every_row = [row for rows in report.values() for row in rows]
    layers = layers_of(every_row)
    methods = {row["method"] for row in every_row}
    names = [name for name in (*REFERENCES, *METHODS) if name in methods]
    sheet, panels = panelled(list(report), HEIGHT, names)
    for rows, (left, top) in zip(report.values(), panels):
        axes = Axes(sheet, left, top + 76, 400, layers, -3, 103)
        axes.grid("score, %, with 95 % bands", "layer at whose input tokens are pruned")
        draw_curves(axes, rows, names)
    sheet.save(path)


def draw_curves(axes: Axes, rows: list[dict], names: list[str]):
    """Draw bands under lines under markers, and wide lines over narrow ones."""
    rows = sorted(rows, key=lambda row: row["layer"] or 0)
    curves = []
    for name in sorted(names, key=lambda name: style_of(name).width):
        chosen = [row for row in rows if row["method"] == name]
        layers = [row["layer"] for row in chosen]
        if name in REFERENCES:                          # the same at every layer
            layers = [axes.first, axes.last]
            chosen = chosen * 2
        scores = np.array([row["score"] for row in chosen])
        style = style_of(name)
        curves.append((style, axes.points(layers, scores)))
        if name in METHODS and METHODS[name].draws:
            half = np.array([1.96 * (row["standard_error"] or 0) for row in chosen])
            axes.band(layers, (scores - half).clip(0), (scores + half).clip(None, 100), style.ink)
    for style, points in curves:
        style.line(axes.sheet, points)
    marked = [(style, points) for style, points in curves if style.marker]
    for i, (style, points) in enumerate(marked):        # in turns: seen where lines coincide
        every = max(1, min(len(marked), len(points) // 2))
        style.markers(axes.sheet, points[i % every::every])


# ---- what schedules cost and change --------------------------------------------------------------

MOST = 50                               # percent: schedules that change more lie at the top


def plot_plans(plans: list[dict], path: Path):
    """Draw answers changed against cost, a panel for each plan: what was searched small and pale,
    the walk as a line where it was tested, what is chosen with a ring, the promise dashed. Raises
    InputError."""
    names = {method_of(row) for plan in plans for row in plan["searched"]}
    titles = [listed(plan["benchmarks"]) for plan in plans]
    sheet, panels = panelled(titles, HEIGHT, [name for name in METHODS if name in names])
    for plan, (left, top) in zip(plans, panels):
        axes = Axes(sheet, left, top + 76, 400, range(0, 101, 20), -2, MOST + 1)
        axes.grid("answers changed, %", f"{COST[plan['cost']]}, % of the unpruned model's")
        draw_plan(axes, plan)
    sheet.save(path)


def draw_plan(axes: Axes, plan: dict):
    def spot(row: dict, part: str) -> tuple:
        changed, asked = row[part]
        return axes.x(100 * row[plan["cost"]]), axes.y(min(100 * changed / asked, MOST))
    promise = axes.y(100 * plan["loss"])
    axes.dashed((axes.x0, promise), (axes.x1, promise))
    for row in plan["searched"]:
        style_of(method_of(row)).markers(axes.sheet, [spot(row, "search")], 0.8, 0.5)
    axes.sheet.line([spot(row, "test") for row in plan["walk"]], INK, 2.4)
    for row in plan["walk"]:
        x, y = spot(row, "test")
        style_of(method_of(row)).markers(axes.sheet, [(x, y)], 1.2)
        if row == plan["chosen"]:
            axes.sheet.add("circle", cx=x, cy=y, r=14, fill="none", stroke=INK, stroke_width=2.4)


def method_of(row: dict) -> str:
    return parse_schedule(row["schedule"])[0][1]


# ---- information ---------------------------------------------------------------------------------

WITH_MAPS = 970                         # height of a panel: two pairs of axes, and the maps
TILE = 106
TILES = 6
HELPS = "#b2182b"                       # red and blue, which the color-blind tell apart
MISLEADS = "#2166ac"
STYLES = {"spread": Style("#e69f00", 2.6, marker=MARKERS[2]),
          "mean": Style("#0072b2", 3.6, marker=MARKERS[0])}


def plot_information(report: dict, examples: dict, path: Path):
    """Draw a panel a benchmark: information by layer, its mean over windows and their spread, with
    95 % bands; the score with every visual token dropped, in percent of the unpruned one; the
    horizon and its interval; the map of one image at six layers, red where a window helps.

    report[benchmark]: {"information": rows, "horizon": {layer, low, high, scores, unpruned}}.
    examples[benchmark]: (canvas, maps (layers, rows, cols), question, answer). Raises InputError.
    """
    sheet, panels = panelled(list(report), WITH_MAPS)
    for i, (benchmark, (left, top)) in enumerate(zip(report, panels)):
        rows, horizon = report[benchmark]["information"], report[benchmark]["horizon"]
        canvas, maps, question, answer = examples[benchmark]
        draw_information(sheet, left, top + 80, rows, horizon)
        draw_dropped(sheet, left, top + 440, horizon)
        sheet.text(left + 22, top + 700, question.split("\n")[0], anchor="start", room=WIDTH - 44)
        sheet.text(left + 22, top + 730, f"answer: {answer}", anchor="start", room=WIDTH - 44)
        sheet.embed(f"image-{i}", canvas.convert("L"), TILE, TILE)
        draw_maps(sheet, left + 22, top + 766, f"#image-{i}", [row["layer"] for row in rows], maps)
    sheet.save(path)


def draw_information(sheet: Sheet, left: float, top: float, rows: list[dict], horizon: dict):
    layers = [row["layer"] for row in rows]
    values = np.array([[row[name] for row in rows] for name in STYLES])
    errors = np.array([[row["standard_errors"][name] for row in rows] for name in STYLES], float)
    half = 1.96 * np.nan_to_num(errors)                 # None, where there are too few images
    low = min(0, (values - half).min())
    high = max(1e-9, (values + half).max())
    room = 0.05 * (high - low)
    axes = Axes(sheet, left, top, 270, range(len(horizon["scores"])), low - room, high + room)
    axes.horizon(horizon["layer"], horizon["low"], horizon["high"])
    axes.grid("information, probability")
    for style, low, high in zip(STYLES.values(), values - half, values + half):
        axes.band(layers, low, high, style.ink)
    for style, row in zip(STYLES.values(), values):
        style.line(sheet, axes.points(layers, row))
        style.markers(sheet, axes.points(layers, row))
    STYLES["mean"].legend(sheet, axes.x1 - 390, top - 22, "mean")
    STYLES["spread"].legend(sheet, axes.x1 - 256, top - 22, "spread over windows")


def draw_dropped(sheet: Sheet, left: float, top: float, horizon: dict):
    layers = range(len(horizon["scores"]))
    shares = 100 * np.array(horizon["scores"]) / (horizon["unpruned"] or 1)
    axes = Axes(sheet, left, top, 160, layers, min(0, shares.min()) - 4, max(100, shares.max()) + 4)
    axes.horizon(horizon["layer"], horizon["low"], horizon["high"])
    axes.grid("score with all dropped, % of unpruned", "layer at whose input they are dropped")
    style_of("none").line(sheet, axes.points(layers, shares))
    name = f"horizon: layer {horizon['layer']}{interval_of(horizon)}"
    if horizon["layer"] == len(layers):
        name = "no horizon"
    sheet.text(axes.x1, top - 22, name, anchor="end")


def draw_maps(sheet: Sheet, x: float, y: float, image: str, layers: list[int], maps: np.ndarray):
    largest = max(float(abs(maps).max()), 1e-12)
    places = np.linspace(0, len(layers) - 1, min(TILES, len(layers))).round().astype(int)
    for i, place in enumerate(places):
        left = x + i * (TILE + 16)
        sheet.text(left + TILE / 2, y, f"layer {layers[place]}")
        sheet.add("use", href=image, x=left, y=y + 16)
        draw_signed(sheet, (left, y + 16, TILE, TILE), maps[place] / largest)
    y += TILE + 38
    draw_signed(sheet, (x + 158, y, 400, 16), np.linspace(-1, 1, 41)[None])
    sheet.text(x + 146, y + 8, "misleads", anchor="end", ink=MISLEADS)
    sheet.text(x + 570, y + 8, "helps", anchor="start", ink=HELPS)
    for part in (-1, -0.5, 0, 0.5, 1):
        sheet.text(x + 358 + 200 * part, y + 34, f"{part * largest:+.2f}" if part else "0")


def draw_signed(sheet: Sheet, box: tuple, values: np.ndarray):
    """Draw values (rows, cols) from -1 to 1 as transparent colors over a box, stronger by their
    square root: a tenth can be seen."""
    left, top, width, height = box
    rows, cols = values.shape
    cells = defaultdict(str)                            # of one color, in one path
    for (row, col), value in np.ndenumerate(values):
        opacity = round(0.85 * math.sqrt(abs(value)), 2)
        cells[HELPS if value > 0 else MISLEADS, opacity] += f"M{col} {row}h1v1h-1z"
    place = f"translate({left} {top}) scale({width / cols} {height / rows})"
    for (ink, opacity), path in cells.items():
        sheet.add("path", d=path, transform=place, fill=ink, fill_opacity=opacity,
                  shape_rendering="crispEdges")         # no seams between neighbors


# ---- the tokens kept of an image -----------------------------------------------------------------

SIDE = 236                              # of a panel
GAP = 18
CAPTION = 74
RIGHT = "#1a7f37"
WRONG = "#c1121f"
MARKS = {True: (RIGHT, "M0 0l7 8l12 -17"), False: (WRONG, "M1 -8l16 16m-16 0l16 -16"),
         None: (INK, "")}               # right, wrong, unknown


def overlay(canvas: Image.Image, panels: list[tuple], grid: tuple[int, int], path: Path,
            question: str, right: list[bool] | None = None):
    """Show the image once for each of panels, (name, answer, indices of kept tokens): what is
    dropped is faded, what is kept outlined; below it the name, how many are kept, and the answer.
    grid: rows and columns of tokens. right: which answers are right, if known. Raises InputError.
    """
    height = round(SIDE * canvas.height / canvas.width)
    down = math.ceil(len(panels) / 5)
    across = math.ceil(len(panels) / down)
    width = across * (SIDE + GAP) + GAP
    sheet = Sheet(width, 60 + down * (height + CAPTION + GAP))
    sheet.embed("image", canvas, SIDE, height)
    sheet.text(GAP, 32, question.split("\n")[0], TITLE, "start", room=width - 2 * GAP)
    places = corners(len(panels), across, SIDE + GAP, height + CAPTION + GAP)
    for i, ((name, answer, kept), (x, y)) in enumerate(zip(panels, places)):
        x += GAP
        y += 60
        is_pruned = len(kept) < math.prod(grid)
        sheet.add("use", href="#image", x=x, y=y, opacity=0.25 if is_pruned else 1)
        sheet.add("rect", x=x, y=y, width=SIDE, height=height, fill="none", stroke="#a8a8a8")
        if is_pruned:
            draw_kept(sheet, (x, y, SIDE, height), grid, kept, i, METHODS[name].color)
        sheet.text(x, y + height + 20, name, TEXT, "start", room=SIDE - 80)
        sheet.text(x + SIDE, y + height + 20, f"{len(kept)} kept", 19, "end", GREY)
        y += height + 52
        ink, mark = MARKS[right[i] if right else None]
        sheet.add("path", d=mark, transform=f"translate({x} {y})", fill="none", stroke=ink,
                  stroke_width=4)
        indent = 28 if mark else 0
        sheet.text(x + indent, y, answer.strip() or "(nothing)", TEXT, "start", ink, SIDE - indent)
    sheet.save(path)


def draw_kept(sheet: Sheet, box: tuple, grid: tuple, kept: list[int], number: int, color: str):
    """Show the tokens unfaded. Around them lies a line with a white rim, which sets it off from any
    image; between them a thin one."""
    left, top, width, height = box
    rows, cols = grid
    side = width / cols
    thick = min(3.0, max(1.4, side / 9)) / side         # in tokens
    cells = "".join(f"M{token % cols} {token // cols}h1v1h-1z" for token in kept)
    scale = f"scale({side} {height / rows})"
    path = element("path", id=f"cells-{number}", d=cells, transform=scale)
    place = f"translate({left} {top})"
    line = {"href": f"#cells-{number}", "transform": place, "fill": "none"}
    sheet.add("clipPath", path, id=f"kept-{number}")
    sheet.add("use", stroke="white", stroke_width=2 * thick + 3 / side, **line)
    sheet.add("use", stroke=color, stroke_width=2 * thick, **line)      # its inner half is hidden
    sheet.add("use", href="#image", transform=place, clip_path=f"url(#kept-{number})")
    sheet.add("use", stroke=color, stroke_width=thick / 3, **line)
