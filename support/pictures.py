"""What the programs find, drawn with Pillow: scores by layer; information by layer, and where it
lies in an image; the tokens that methods keep.

Lengths are pixels of the finished picture. It is drawn SCALE times as large and then reduced, so
that lines are smooth.
"""
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokprune import METHODS, InputError

SCALE = 3
INK = "#222222"
GREY = "#6e6e6e"
PALE = "#e4e4e4"
TITLE = 25                              # sizes of letters: to be read in a picture of half the size
TEXT = 21


class Sheet:
    """A white page to draw on."""

    def __init__(self, width: float, height: float):
        size = (round(width * SCALE), round(height * SCALE))
        self.image = Image.new("RGB", size, "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int = TEXT, anchor: str = "mm", ink=INK):
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, ink, font, anchor=anchor)

    def line(self, points: list, ink, width: float, pattern: tuple = ()):
        """pattern: lengths drawn and left out in turn; solid if empty."""
        for dash in dashes(points, pattern):
            enlarged = [(x * SCALE, y * SCALE) for x, y in dash]
            self.draw.line(enlarged, ink, round(width * SCALE), joint="curve")

    def area(self, points: list, ink):
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], ink)

    def paste(self, image: Image.Image, x: float, y: float):
        self.image.paste(image, (round(x * SCALE), round(y * SCALE)))

    def marker(self, x: float, y: float, shape: int, ink):
        """Disc, square, diamond, triangles: with a white rim, to be seen on other lines."""
        for radius, color in ((6.5, "white"), (5, ink)):
            if shape % 5 == 0:
                box = [(x - radius) * SCALE, (y - radius) * SCALE,
                       (x + radius) * SCALE, (y + radius) * SCALE]
                self.draw.ellipse(box, color)
            else:
                corners = CORNERS[shape % 5]
                self.area([(x + radius * dx, y + radius * dy) for dx, dy in corners], color)

    def save(self, path: Path):
        """With 256 colors: a third of the bytes. Raises InputError."""
        size = (self.image.width // SCALE, self.image.height // SCALE)
        picture = self.image.resize(size, Image.LANCZOS)
        picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
        try:
            picture.save(path, optimize=True)
        except (OSError, ValueError) as e:              # no such folder; no such format
            raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', '') or e})")


CORNERS = {1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
           2: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
           3: [(0, -1.2), (1.2, 0.9), (-1.2, 0.9)],
           4: [(0, 1.2), (1.2, -0.9), (-1.2, -0.9)]}


def dashes(points: list, pattern: tuple) -> list[list]:
    """A line cut into dashes, which run on around its corners."""
    if not pattern:
        return [points]
    lengths = itertools.cycle(pattern)
    rest = next(lengths)
    drawn = True
    dash = [points[0]]
    found = []
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        length = math.dist((x0, y0), (x1, y1))
        done = 0.0
        while length - done > rest:
            done += rest
            spot = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if drawn:
                found.append(dash + [spot])
            dash = [spot]
            drawn = not drawn
            rest = next(lengths)
        rest -= length - done
        dash.append((x1, y1))
    if drawn:
        found.append(dash)
    return found


def shortened(text: str, width: float, size: int) -> str:
    """On one line, cut where it is longer than width."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + " ...") > width:
        text = text[:-1]
    return text.rstrip() + " ..."


def lighter(color: str) -> tuple:
    """For a band behind a line of this color."""
    rgb = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    return tuple(round(255 - 0.3 * (255 - value)) for value in rgb)


# ---- axes ----------------------------------------------------------------------------------------

class Axes:
    """A frame for values (low to high) by layer, at (x0, y0) to (x1, y1) of a sheet."""

    def __init__(self, sheet: Sheet, box: tuple, layers: list[int], low: float, high: float):
        self.sheet = sheet
        self.x0, self.y0, self.x1, self.y1 = box
        self.layers = layers
        self.low = low
        self.high = high

    def x(self, layer: float) -> float:
        first = self.layers[0] - 0.5
        last = self.layers[-1] + 0.5
        return self.x0 + (layer - first) / (last - first) * (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return self.y1 - (value - self.low) / (self.high - self.low) * (self.y1 - self.y0)

    def points(self, layers: list[int], values) -> list[tuple]:
        return [(self.x(layer), self.y(value)) for layer, value in zip(layers, values)]

    def grid(self, name: str, layers_name: str = ""):
        """Lines at round values, the one at 0 strongest; the layers; the names of both."""
        step = round_step((self.high - self.low) / 6)
        digits = max(0, -math.floor(math.log10(step)))
        for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            y = self.y(i * step)
            self.sheet.line([(self.x0, y), (self.x1, y)], PALE if i else GREY, 1)
            self.sheet.text(self.x0 - 9, y, f"{i * step:.{digits}f}", anchor="rm")
        room = (self.x1 - self.x0) / (self.layers[-1] - self.layers[0] + 1)
        every = max(1, math.ceil(40 / room))
        for layer in self.layers:
            if layer % every == 0 or len(self.layers) < 8:
                self.sheet.text(self.x(layer), self.y1 + 18, str(layer))
        self.sheet.text(self.x0 - 62, self.y0 - 22, name, anchor="lm")
        self.sheet.text((self.x0 + self.x1) / 2, self.y1 + 48, layers_name)

    def band(self, layers: list[int], low, high, ink):
        if len(layers) > 1:
            self.sheet.area(self.points(layers, high) + self.points(layers, low)[::-1], ink)

    def horizon(self, layer: int, low: float | None = None, high: float | None = None):
        """Dashed, its interval as a band, as far as the layers go."""
        first = self.layers[0] - 0.5
        last = self.layers[-1] + 0.5
        if low is not None:
            left = self.x(min(max(low - 0.2, first), last))
            right = self.x(min(max(high + 0.2, first), last))
            corners = [(left, self.y0), (right, self.y0), (right, self.y1), (left, self.y1)]
            self.sheet.area(corners, "#eef1f6")
        if first < layer < last:
            x = self.x(layer)
            self.sheet.line([(x, self.y0 - 6), (x, self.y1)], INK, 1.6, (9, 6))


def round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... and of their tenths."""
    power = 10.0 ** math.floor(math.log10(step))
    for factor in (1, 2, 5):
        if factor * power >= step:
            return factor * power
    return 10 * power


@dataclass(frozen=True)
class Style:
    """How the curve of a method looks, whatever lies over or under it."""
    ink: str
    width: float = 2.4
    pattern: tuple = ()
    marker: int | None = None
    hollow: bool = False                # a white line in the middle
    banded: bool = False

    def line(self, sheet: Sheet, points: list):
        if len(points) == 1:                            # a layer alone
            x, y = points[0]
            points = [(x - 14, y), (x + 14, y)]
        sheet.line(points, self.ink, self.width, self.pattern)
        if self.hollow:
            sheet.line(points, "white", self.width / 3)

    def markers(self, sheet: Sheet, points: list):
        for x, y in points:
            if self.marker is not None:
                sheet.marker(x, y, self.marker, self.ink)

    def legend(self, sheet: Sheet, x: float, y: float, name: str):
        if self.banded:
            corners = [(x, y - 10), (x + 46, y - 10), (x + 46, y + 10), (x, y + 10)]
            sheet.area(corners, lighter(self.ink))
        self.line(sheet, [(x, y), (x + 46, y)])
        self.markers(sheet, [(x + 23, y)])
        sheet.text(x + 56, y, name, anchor="lm")


# the same at every layer
REFERENCES = {"unpruned": Style(INK, 2.2, (16, 7)), "no image": Style(GREY, 2.2, (3, 6))}
FIXED = REFERENCES | {"none": Style("#000000", 6.6, hollow=True)}
PATTERNS = [(), (17, 6), (13, 5, 3, 5)]


def style_of(name: str) -> Style:
    if name in FIXED:
        return FIXED[name]
    method = METHODS[name]
    number = list(METHODS).index(name)
    if method.draws:
        return Style(method.color, 4.4, (), number, banded=True)
    return Style(method.color, 2.4, PATTERNS[number % len(PATTERNS)], number)


# ---- scores --------------------------------------------------------------------------------------

WIDTH = 760                             # of the panel of a benchmark
HEIGHT = 560
MARGIN = 76                             # left of the axes and above them


def plot(report: dict, path: Path, horizons: dict | None = None):
    """Score against the layer that tokens are pruned at, a panel a benchmark.

    report: {benchmark: rows of a sweep}. Methods that draw at random have a band, their 95 %
    interval. horizons: {benchmark: layer}, to be marked. Raises InputError.
    """
    every_row = [row for rows in report.values() for row in rows]
    layers = sorted({row["layer"] for row in every_row if row["method"] not in REFERENCES})
    methods = {row["method"] for row in every_row}
    names = [name for name in ("unpruned", "none", "no image", *METHODS) if name in methods]
    across = min(2, len(report))
    bottom = math.ceil(len(report) / across) * HEIGHT
    entries = 3 * across                                # of the legend, in a line
    sheet = Sheet(across * WIDTH, bottom + 32 * math.ceil(len(names) / entries) + 12)
    for i, (benchmark, rows) in enumerate(report.items()):
        left = i % across * WIDTH
        top = i // across * HEIGHT
        box = (left + MARGIN, top + MARGIN, left + WIDTH - 20, top + MARGIN + 400)
        axes = Axes(sheet, box, layers, -3, 103)
        if horizons and benchmark in horizons:
            axes.horizon(horizons[benchmark])
            name = f"horizon: layer {horizons[benchmark]}"
            sheet.text(axes.x1, axes.y0 - 22, name, anchor="rm")
        axes.grid("score, %", "layer at whose input tokens are pruned")
        sheet.text(left + WIDTH / 2, top + 24, benchmark, TITLE)
        draw_curves(axes, rows, names)
    for i, name in enumerate(names):
        label = f"{name}, 95 % band" if style_of(name).banded else name
        column = (across * WIDTH - 40) / entries
        style_of(name).legend(sheet, 30 + i % entries * column, bottom + 32 * (i // entries), label)
    sheet.save(path)


def draw_curves(axes: Axes, rows: list[dict], names: list[str]):
    """What matters lies on top: the methods, those that draw at random, nothing kept."""
    curves = []
    for name in sorted(names, key=importance):
        chosen = [row for row in rows if row["method"] == name]
        if not chosen:
            continue
        if name in REFERENCES:                          # the same at every layer
            layers = [axes.layers[0] - 0.5, axes.layers[-1] + 0.5]
            chosen = chosen * 2
        else:
            chosen = sorted(chosen, key=lambda row: row["layer"])
            layers = [row["layer"] for row in chosen]
        scores = np.array([row["score"] for row in chosen])
        style = style_of(name)
        curves.append((style, axes.points(layers, scores)))
        if style.banded:
            half = np.array([1.96 * (row["standard_error"] or 0) for row in chosen])
            low = (scores - half).clip(0, 100)
            high = (scores + half).clip(0, 100)
            axes.band(layers, low, high, lighter(style.ink))
    for style, points in curves:
        style.line(axes.sheet, points)
    marked = [(style, points) for style, points in curves if style.marker is not None]
    for i, (style, points) in enumerate(marked):        # in turns: seen where lines coincide
        every = max(1, min(len(marked), len(points) // 2))
        style.markers(axes.sheet, points[i % every::every])


def importance(name: str) -> int:
    if name in REFERENCES:
        return 0
    if name not in METHODS:
        return 3
    return 2 if METHODS[name].draws else 1


# ---- information ---------------------------------------------------------------------------------

WITH_MAPS = 950                         # height of a panel: two pairs of axes, and the maps
TILE = 106
TILES = 6
HELPS = np.array([178, 24, 43])         # red and blue, which the colour-blind tell apart
MISLEADS = np.array([33, 102, 172])
MEAN = Style("#0072b2", 3.6, (), 0)
SPREAD = Style("#e69f00", 2.6, (), 2)


def plot_information(report: dict, examples: dict, path: Path):
    """A panel a benchmark: information by layer, its mean over windows and their spread, with 95 %
    bands; the score with every visual token dropped, in percent of the unpruned one; the horizon
    and its interval; the map of one image at six layers, red where a window helps.

    report[benchmark]: {"information": rows, "horizon": {layer, low, high, scores, unpruned}}.
    examples[benchmark]: (canvas, maps (layers, rows, cols), question, answer). Raises InputError.
    """
    across = min(2, len(report))
    sheet = Sheet(across * WIDTH, math.ceil(len(report) / across) * WITH_MAPS)
    for i, (benchmark, measured) in enumerate(report.items()):
        left = i % across * WIDTH
        top = i // across * WITH_MAPS
        rows = measured["information"]
        sheet.text(left + WIDTH / 2, top + 24, benchmark, TITLE)
        draw_information(sheet, left, top + 80, rows, measured["horizon"])
        draw_scores(sheet, left, top + 440, measured["horizon"])
        draw_maps(sheet, left + 22, top + 706, [row["layer"] for row in rows], *examples[benchmark])
    sheet.save(path)


def draw_information(sheet: Sheet, left: float, top: float, rows: list[dict], horizon: dict):
    layers = [row["layer"] for row in rows]
    names = ("spread", "mean")
    values = np.array([[row[name] for name in names] for row in rows])
    errors = np.array([[row["standard_errors"][name] for name in names] for row in rows], float)
    errors = np.nan_to_num(errors)                      # one image has none, and no band
    low = values - 1.96 * errors
    high = values + 1.96 * errors
    bottom = min(0, low.min())
    ceiling = max(1e-9, high.max())
    room = 0.05 * (ceiling - bottom)
    axes = Axes(sheet, (left + 88, top, left + WIDTH - 20, top + 270),
                range(len(horizon["scores"])), bottom - room, ceiling + room)
    axes.horizon(horizon["layer"], horizon["low"], horizon["high"])
    axes.grid("information, probability")
    styles = (SPREAD, MEAN)
    for i, style in enumerate(styles):
        axes.band(layers, low[:, i], high[:, i], lighter(style.ink))
    for i, style in enumerate(styles):
        points = axes.points(layers, values[:, i])
        style.line(sheet, points)
        style.markers(sheet, points)
    MEAN.legend(sheet, axes.x1 - 390, top - 22, "mean")
    SPREAD.legend(sheet, axes.x1 - 256, top - 22, "spread over windows")


def draw_scores(sheet: Sheet, left: float, top: float, horizon: dict):
    """With every visual token dropped at a layer."""
    layers = range(len(horizon["scores"]))
    shares = 100 * np.array(horizon["scores"]) / (horizon["unpruned"] or 1)
    axes = Axes(sheet, (left + 88, top, left + WIDTH - 20, top + 160), layers,
                min(0, shares.min()) - 4, max(100, shares.max()) + 4)
    axes.horizon(horizon["layer"], horizon["low"], horizon["high"])
    name = f"horizon: layer {horizon['layer']} [{horizon['low']:g}, {horizon['high']:g}]"
    if horizon["layer"] == len(layers):
        name = "no horizon"
    sheet.text(axes.x1, top - 22, name, anchor="rm")
    axes.grid("score with all dropped, % of unpruned", "layer at whose input they are dropped")
    FIXED["none"].line(sheet, axes.points(layers, shares))


def draw_maps(sheet: Sheet, x: float, y: float, layers: list[int], canvas: Image.Image,
              maps: np.ndarray, question: str, answer: str):
    asked = shortened(question.split("\n")[0], 480, TEXT)
    sheet.text(x, y, asked, anchor="lm")
    sheet.text(x + WIDTH - 44, y, shortened(f"answer: {answer}", 220, TEXT), anchor="rm")
    canvas = canvas.convert("RGB").resize((TILE * SCALE, TILE * SCALE), Image.BICUBIC)
    largest = max(float(abs(maps).max()), 1e-12)
    places = np.linspace(0, len(layers) - 1, min(TILES, len(layers))).round().astype(int)
    for i, place in enumerate(places):
        across = x + i * (TILE + 16)
        sheet.paste(signed(canvas, maps[place] / largest), across, y + 52)
        sheet.text(across + TILE / 2, y + 36, f"layer {layers[place]}")
    ramp = np.linspace(-1, 1, 400)[None]                # the same colours, on white
    scale = signed(Image.new("RGB", (400 * SCALE, 16 * SCALE), "white"), ramp)
    sheet.paste(scale, x + 158, y + TILE + 74)
    sheet.text(x + 146, y + TILE + 82, "misleads", anchor="rm", ink=tuple(MISLEADS))
    sheet.text(x + 570, y + TILE + 82, "helps", anchor="lm", ink=tuple(HELPS))
    for part in (-1, -0.5, 0, 0.5, 1):
        sheet.text(x + 358 + 200 * part, y + TILE + 108, f"{part * largest:+.2f}" if part else "0")


def signed(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image in grey under the colours of values (rows, cols) from -1 to 1, stronger by their
    square root: a tenth can be seen."""
    grey = np.asarray(image.convert("L").convert("RGB")).astype(float)
    enlarged = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.NEAREST)
    value = np.asarray(enlarged)[..., None]
    color = np.where(value > 0, HELPS, MISLEADS)
    weight = 0.85 * np.sqrt(abs(value))
    return Image.fromarray((grey * (1 - weight) + color * weight).round().astype(np.uint8))


# ---- the tokens kept of an image -----------------------------------------------------------------

SIDE = 236                              # of a panel
GAP = 18
CAPTION = 74
RIGHT = "#1a7f37"
WRONG = "#c1121f"
CHECK = [[(0, 0), (7, 8), (19, -9)]]
CROSS = [[(1, -8), (17, 8)], [(1, 8), (17, -8)]]


def overlay(canvas: Image.Image, panels: list[tuple], grid: tuple[int, int], path: Path,
            question: str, gold: str | None = None):
    """The image once for each of panels, (name, answer, indices of kept tokens): what is dropped is
    faded, what is kept outlined; below it the name, how many are kept, and the answer, right or
    wrong where gold is given. grid: rows and columns of tokens. Raises InputError.
    """
    height = round(SIDE * canvas.height / canvas.width)
    down = math.ceil(len(panels) / 5)
    across = math.ceil(len(panels) / down)
    width = across * (SIDE + GAP) + GAP
    sheet = Sheet(width, 60 + down * (height + CAPTION + GAP))
    asked = question.split("\n")[0]
    sheet.text(GAP, 32, shortened(asked, width - 2 * GAP, TITLE), TITLE, "lm")
    canvas = canvas.convert("RGB").resize((SIDE * SCALE, height * SCALE), Image.BICUBIC)
    for i, (name, answer, kept) in enumerate(panels):
        x = GAP + i % across * (SIDE + GAP)
        y = 60 + i // across * (height + CAPTION + GAP)
        sheet.paste(faded(canvas, kept, grid), x, y)
        frame = [(x, y), (x + SIDE, y), (x + SIDE, y + height), (x, y + height), (x, y)]
        sheet.line(frame, "#a8a8a8", 1)
        if len(kept) < math.prod(grid):
            color = METHODS[name].color if name in METHODS else INK
            outline(sheet, (x, y, SIDE / grid[1], height / grid[0]), kept, grid[1], color)
        sheet.text(x, y + height + 20, name, 22, "lm")
        sheet.text(x + SIDE, y + height + 20, f"{len(kept)} kept", 19, "rm", GREY)
        draw_answer(sheet, x, y + height + 52, answer, gold)
    sheet.save(path)


def faded(canvas: Image.Image, kept: list[int], grid: tuple[int, int]) -> Image.Image:
    rows, cols = grid
    panel = Image.blend(canvas, Image.new("RGB", canvas.size, "white"), 0.75)
    for token in kept:
        row, col = divmod(token, cols)
        box = (round(col * canvas.width / cols), round(row * canvas.height / rows),
               round((col + 1) * canvas.width / cols), round((row + 1) * canvas.height / rows))
        panel.paste(canvas.crop(box), box)
    return panel


def outline(sheet: Sheet, place: tuple, kept: list[int], cols: int, color: str):
    """A line around the tokens, strong where the neighbour is dropped, on a white one: they are
    seen on any image. place: of the image's corner, and the width and height of a token."""
    left, top, width, height = place
    strong = min(3.0, max(1.4, width / 9))
    cells = {divmod(token, cols) for token in kept}
    for ink, extra in (("white", 3), (color, 0)):
        for row, col in sorted(cells):
            x0 = left + col * width
            y0 = top + row * height
            x1 = x0 + width
            y1 = y0 + height
            sides = [((row - 1, col), [(x0, y0), (x1, y0)]), ((row + 1, col), [(x0, y1), (x1, y1)]),
                     ((row, col - 1), [(x0, y0), (x0, y1)]), ((row, col + 1), [(x1, y0), (x1, y1)])]
            for neighbour, side in sides:
                if neighbour not in cells:
                    sheet.line(side, ink, strong + extra)
                elif ink == color:
                    sheet.line(side, ink, strong / 3)


def draw_answer(sheet: Sheet, x: float, y: float, answer: str, gold: str | None):
    ink = INK
    width = SIDE
    if gold is not None:
        right = is_right(answer, gold)
        ink = RIGHT if right else WRONG
        strokes = CHECK if right else CROSS
        for stroke in strokes:
            sheet.line([(x + dx, y + dy) for dx, dy in stroke], ink, 4)
        x += 28
        width -= 28
    sheet.text(x, y, shortened(answer, width, 22) or "(nothing)", 22, "lm", ink)


def is_right(answer: str, gold: str) -> bool:
    return answer.strip().lower() == gold.strip().lower()
