"""What the programs find, as SVG written as text: scores by layer; information by layer, and where
it lies in an image; the tokens that methods keep.

A picture stands alone: it has a white page of its own, its images are embedded, and it asks for no
script, link or font. Lengths are pixels; letters can be read at half the size.
"""
import base64
import html
import io
import itertools
import math
import re
import unicodedata
from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokprune import METHODS, InputError

INK = "#222222"
GREY = "#6e6e6e"
PALE = "#e4e4e4"
TITLE = 25                              # sizes of letters
TEXT = 21
BAND = 0.3                              # opacity


class Sheet:
    """A white page, and what is drawn on it so far."""

    def __init__(self, width: float, height: float):
        self.size = {"width": round(width), "height": round(height)}
        self.elements = []
        self.add("rect", **self.size, fill="white")

    def add(self, name: str, content: str = "", **attributes):
        self.elements.append(element(name, content, **attributes))

    def text(self, x: float, y: float, text: str, size: int = TEXT, anchor: str = "middle",
             ink: str = INK, room: float = math.inf):
        """Write one line, its middle at height y. Text that is wider than `room` is cut."""
        self.add("text", escaped(shortened(text, room, size)), x=x, y=y + 0.35 * size,
                 font_size=size, text_anchor=anchor, fill=ink)

    def line(self, points: list, ink: str, width: float, pattern: tuple = ()):
        """Draw a line. pattern: lengths drawn and left out in turn; solid if empty."""
        self.add("polyline", points=joined(points), fill="none", stroke=ink, stroke_width=width,
                 stroke_linejoin="round", stroke_dasharray=" ".join(map(str, pattern)) or None)

    def embed(self, name: str, image: Image.Image, width: float, height: float):
        """Store an image once, for elements `use` to show it at any place."""
        image = image.copy()
        image.thumbnail((math.ceil(2 * width), math.ceil(2 * height)))      # sharp on any screen
        data = io.BytesIO()
        image.save(data, "JPEG", quality=95, subsampling=0)
        code = base64.b64encode(data.getvalue()).decode()
        self.add("defs", element("image", id=name, width=width, height=height,
                                 preserveAspectRatio="none", href="data:image/jpeg;base64," + code))

    def save(self, path: Path):
        """Write the file. Raises InputError."""
        content = "\n".join(["", *self.elements, ""])
        text = element("svg", content, xmlns="http://www.w3.org/2000/svg", **self.size,
                       viewBox=f"0 0 {self.size['width']} {self.size['height']}",
                       font_family="Helvetica Neue, Helvetica, Arial, sans-serif")
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror})")


def element(name: str, content: str = "", **attributes) -> str:
    """Return an element as text. Numbers are rounded, and None is left out."""
    words = [name]
    for key, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.2f}".rstrip("0").rstrip(".")
        if value is not None:
            words.append(f'{key.replace("_", "-")}="{value}"')
    return f"<{' '.join(words)}>{content}</{name}>" if content else f"<{' '.join(words)}/>"


def joined(points: list) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def escaped(text: str) -> str:
    """Return text as XML can hold it: no character is markup, and none is forbidden."""
    return html.escape(re.sub("[^ -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def width_of(text: str, size: int) -> list[float]:
    """Return how wide text is up to each of its letters, in a font that runs wide."""
    widths = [0.0]
    for letter in text:
        wide = unicodedata.east_asian_width(letter) in "WF"
        narrow = letter in " .,:;!|'()[]fijlrtI"
        widths.append(widths[-1] + size * (1.0 if wide else 0.36 if narrow else 0.6))
    return widths


def shortened(text: str, room: float, size: int) -> str:
    """Return text on one line, cut where it is wider than `room`."""
    text = " ".join(text.split())
    widths = width_of(text, size)
    if widths[-1] <= room:
        return text
    fits = bisect(widths, room - width_of(" ...", size)[-1]) - 1
    return text[:max(0, fits)].rstrip() + " ..."


def corners(across: int, width: float, height: float):
    """Yield where panels lie, row by row."""
    for i in itertools.count():
        yield i % across * width, i // across * height


# ---- axes ----------------------------------------------------------------------------------------

class Axes:
    """A frame for values (low to high) by layer, at (x0, y0) to (x1, y1) of a sheet."""

    def __init__(self, sheet: Sheet, box: tuple, layers: list[int], low: float, high: float):
        self.sheet = sheet
        self.x0, self.y0, self.x1, self.y1 = box
        self.layers = layers
        self.first = layers[0] - 0.5
        self.last = layers[-1] + 0.5
        self.low = low
        self.high = high

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
        room = (self.x1 - self.x0) / (self.last - self.first)
        every = max(1, math.ceil(40 / room))
        for layer in self.layers:
            if layer % every == 0 or len(self.layers) < 8:
                self.sheet.text(self.x(layer), self.y1 + 18, str(layer))
        self.sheet.text(self.x0 - 62, self.y0 - 22, name, anchor="start")
        if layers_name:
            self.sheet.text((self.x0 + self.x1) / 2, self.y1 + 48, layers_name)

    def band(self, layers: list[int], low, high, ink: str):
        if (high > low).any():                          # one image has no interval
            points = self.points(layers, high) + self.points(layers, low)[::-1]
            self.sheet.add("polygon", points=joined(points), fill=ink, fill_opacity=BAND)

    def horizon(self, layer: int, low: float | None, high: float | None):
        """Draw a dashed line, and its interval as a band, as far as the layers go."""
        if low is not None:
            left = self.x(np.clip(low - 0.2, self.first, self.last))
            right = self.x(np.clip(high + 0.2, self.first, self.last))
            self.sheet.add("rect", x=left, y=self.y0, width=right - left,
                           height=self.y1 - self.y0, fill="#eef1f6")
        if layer < self.last:
            x = self.x(layer)
            self.sheet.line([(x, self.y0 - 6), (x, self.y1)], INK, 1.6, (9, 6))


def round_step(step: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... and of their tenths."""
    power = 10.0 ** math.floor(math.log10(step))
    return min(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


# disc, square, diamond, triangles
MARKERS = ["M-5.8 0a5.8 5.8 0 1 0 11.6 0a5.8 5.8 0 1 0 -11.6 0z", "M-5.2 -5.2h10.4v10.4h-10.4z",
           "M0 -7.2l7.2 7.2l-7.2 7.2l-7.2 -7.2z", "M0 -6.9l6.9 12.1h-13.8z",
           "M0 6.9l6.9 -12.1h-13.8z"]


@dataclass(frozen=True)
class Style:
    """How the curve of a method looks, whatever lies over or under it."""
    ink: str
    width: float = 2.4
    pattern: tuple = ()
    marker: str = ""                    # a path
    hollow: bool = False                # a white line in the middle
    banded: bool = False

    def line(self, sheet: Sheet, points: list):
        if len(points) == 1:                            # one layer only
            [(x, y)] = points
            points = [(x - 14, y), (x + 14, y)]
        sheet.line(points, self.ink, self.width, self.pattern)
        if self.hollow:
            sheet.line(points, "white", self.width / 3)

    def markers(self, sheet: Sheet, points: list):
        for x, y in points:                             # with a white rim: seen on other lines
            sheet.add("path", d=self.marker, transform=f"translate({x:.2f} {y:.2f})", fill=self.ink,
                      stroke="white", stroke_width=1.5)

    def legend(self, sheet: Sheet, x: float, y: float, name: str):
        if self.banded:
            sheet.add("rect", x=x, y=y - 10, width=46, height=20, fill=self.ink, fill_opacity=BAND)
        self.line(sheet, [(x, y), (x + 46, y)])
        if self.marker:
            self.markers(sheet, [(x + 23, y)])
        sheet.text(x + 56, y, name, anchor="start")


# the same at every layer
REFERENCES = {"unpruned": Style(INK, 2.2, (16, 7)), "no image": Style(GREY, 2.2, (3, 6))}
NOTHING_KEPT = Style("#000000", 6.6, hollow=True)
PATTERNS = [(), (17, 6), (13, 5, 3, 5)]


def style_of(name: str) -> Style:
    if name in REFERENCES:
        return REFERENCES[name]
    method = METHODS[name]
    if method.keeps_none:
        return NOTHING_KEPT
    number = list(METHODS).index(name)
    marker = MARKERS[number % len(MARKERS)]
    if method.draws:
        return Style(method.color, 4.4, (), marker, banded=True)
    return Style(method.color, 2.4, PATTERNS[number % len(PATTERNS)], marker)


# ---- scores --------------------------------------------------------------------------------------

WIDTH = 760                             # of the panel of a benchmark
HEIGHT = 560
MARGIN = 76                             # left of the axes and above them


def plot(report: dict, path: Path):
    """Draw score against the layer that tokens are pruned at, a panel a benchmark.

    report: {benchmark: rows of a sweep}. Methods that draw at random have a band, their 95 %
    interval. Raises InputError.
    """
    every_row = [row for rows in report.values() for row in rows]
    layers = sorted({row["layer"] for row in every_row if row["method"] not in REFERENCES})
    methods = {row["method"] for row in every_row}
    names = [name for name in (*REFERENCES, *METHODS) if name in methods]
    across = min(2, len(report))
    bottom = math.ceil(len(report) / across) * HEIGHT
    entries = 5 if across == 2 else 3                   # of the legend, in a line
    sheet = Sheet(across * WIDTH, bottom + 32 * math.ceil(len(names) / entries) + 12)
    for (benchmark, rows), (left, top) in zip(report.items(), corners(across, WIDTH, HEIGHT)):
        box = (left + MARGIN, top + MARGIN, left + WIDTH - 20, top + MARGIN + 400)
        axes = Axes(sheet, box, layers, -3, 103)
        axes.grid("score, %", "layer at whose input tokens are pruned")
        sheet.text(left + WIDTH / 2, top + 24, benchmark, TITLE, room=WIDTH)
        draw_curves(axes, rows, names)
    column = (across * WIDTH - 40) / entries
    for name, (x, y) in zip(names, corners(entries, column, 32)):
        label = f"{name}, 95 % band" if style_of(name).banded else name
        style_of(name).legend(sheet, 30 + x, bottom + y, label)
    sheet.save(path)


def draw_curves(axes: Axes, rows: list[dict], names: list[str]):
    curves = []
    for name in sorted(names, key=importance):
        chosen = [row for row in rows if row["method"] == name]
        if not chosen:
            continue
        if name in REFERENCES:                          # the same at every layer
            layers = [axes.first, axes.last]
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
            axes.band(layers, low, high, style.ink)
    for style, points in curves:
        style.line(axes.sheet, points)
    marked = [(style, points) for style, points in curves if style.marker]
    for i, (style, points) in enumerate(marked):        # in turns: seen where lines coincide
        every = max(1, min(len(marked), len(points) // 2))
        style.markers(axes.sheet, points[i % every::every])


def importance(name: str) -> tuple:
    """Return the drawing order: references, methods, those that draw at random, nothing kept."""
    method = METHODS.get(name)
    return (True, method.keeps_none, method.draws) if method else (False,)


# ---- information ---------------------------------------------------------------------------------

WITH_MAPS = 950                         # height of a panel: two pairs of axes, and the maps
TILE = 106
TILES = 6
HELPS = "#b2182b"                       # red and blue, which the color-blind tell apart
MISLEADS = "#2166ac"
MEAN = Style("#0072b2", 3.6, (), MARKERS[0])
SPREAD = Style("#e69f00", 2.6, (), MARKERS[2])


def plot_information(report: dict, examples: dict, path: Path):
    """Draw a panel a benchmark: information by layer, its mean over windows and their spread, with
    95 % bands; the score with every visual token dropped, in percent of the unpruned one; the
    horizon and its interval; the map of one image at six layers, red where a window helps.

    report[benchmark]: {"information": rows, "horizon": {layer, low, high, scores, unpruned}}.
    examples[benchmark]: (canvas, maps (layers, rows, cols), question, answer). Raises InputError.
    """
    across = min(2, len(report))
    sheet = Sheet(across * WIDTH, math.ceil(len(report) / across) * WITH_MAPS)
    places = corners(across, WIDTH, WITH_MAPS)
    for i, ((benchmark, measured), (left, top)) in enumerate(zip(report.items(), places)):
        rows = measured["information"]
        canvas, *example = examples[benchmark]
        sheet.embed(f"image-{i}", canvas.convert("L"), TILE, TILE)
        sheet.text(left + WIDTH / 2, top + 24, benchmark, TITLE, room=WIDTH)
        draw_information(sheet, left, top + 80, rows, measured["horizon"])
        draw_scores(sheet, left, top + 440, measured["horizon"])
        draw_maps(sheet, left + 22, top + 706, [row["layer"] for row in rows],
                  f"#image-{i}", *example)
    sheet.save(path)


def draw_information(sheet: Sheet, left: float, top: float, rows: list[dict], horizon: dict):
    layers = [row["layer"] for row in rows]
    names = ("spread", "mean")
    values = np.array([[row[name] for name in names] for row in rows])
    errors = np.array([[row["standard_errors"][name] for name in names] for row in rows], float)
    errors = np.nan_to_num(errors)                      # None, where there are too few images
    low = values - 1.96 * errors
    high = values + 1.96 * errors
    bottom = min(0, low.min())
    ceiling = max(1e-9, high.max())
    room = 0.05 * (ceiling - bottom)
    axes = Axes(sheet, (left + 88, top, left + WIDTH - 20, top + 270),
                range(len(horizon["scores"])), bottom - room, ceiling + room)
    axes.horizon(horizon["layer"], horizon["low"], horizon["high"])
    axes.grid("information, probability")
    for i, style in enumerate((SPREAD, MEAN)):
        axes.band(layers, low[:, i], high[:, i], style.ink)
    for i, style in enumerate((SPREAD, MEAN)):
        points = axes.points(layers, values[:, i])
        style.line(sheet, points)
        style.markers(sheet, points)
    MEAN.legend(sheet, axes.x1 - 390, top - 22, "mean")
    SPREAD.legend(sheet, axes.x1 - 256, top - 22, "spread over windows")


def draw_scores(sheet: Sheet, left: float, top: float, horizon: dict):
    """Draw the score with every visual token dropped at a layer."""
    layers = range(len(horizon["scores"]))
    shares = 100 * np.array(horizon["scores"]) / (horizon["unpruned"] or 1)
    axes = Axes(sheet, (left + 88, top, left + WIDTH - 20, top + 160), layers,
                min(0, shares.min()) - 4, max(100, shares.max()) + 4)
    axes.horizon(horizon["layer"], horizon["low"], horizon["high"])
    name = f"horizon: layer {horizon['layer']}"
    if horizon["low"] is not None:
        name += f" [{horizon['low']:g}, {horizon['high']:g}]"
    if horizon["layer"] == len(layers):
        name = "no horizon"
    sheet.text(axes.x1, top - 22, name, anchor="end")
    axes.grid("score with all dropped, % of unpruned", "layer at whose input they are dropped")
    NOTHING_KEPT.line(sheet, axes.points(layers, shares))


def draw_maps(sheet: Sheet, x: float, y: float, layers: list[int], image: str, maps: np.ndarray,
              question: str, answer: str):
    answer = shortened(f"answer: {answer}", 220, TEXT)
    room = WIDTH - 60 - width_of(answer, TEXT)[-1]
    sheet.text(x, y, question.split("\n")[0], anchor="start", room=room)
    sheet.text(x + WIDTH - 44, y, answer, anchor="end")
    largest = max(float(abs(maps).max()), 1e-12)
    places = np.linspace(0, len(layers) - 1, min(TILES, len(layers))).round().astype(int)
    for i, place in enumerate(places):
        across = x + i * (TILE + 16)
        sheet.text(across + TILE / 2, y + 36, f"layer {layers[place]}")
        sheet.add("use", href=image, x=across, y=y + 52)
        draw_signed(sheet, (across, y + 52, TILE, TILE), maps[place] / largest)
    y += TILE + 74
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
        if opacity:
            sheet.add("path", d=path, transform=place, fill=ink, fill_opacity=opacity,
                      shape_rendering="crispEdges")     # no seams between neighbors


# ---- the tokens kept of an image -----------------------------------------------------------------

SIDE = 236                              # of a panel
GAP = 18
CAPTION = 74
RIGHT = "#1a7f37"
WRONG = "#c1121f"
CHECK = "M0 0l7 8l12 -17"
CROSS = "M1 -8l16 16m-16 0l16 -16"


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
    sheet.embed("image", canvas.convert("RGB"), SIDE, height)
    sheet.text(GAP, 32, question.split("\n")[0], TITLE, "start", room=width - 2 * GAP)
    places = corners(across, SIDE + GAP, height + CAPTION + GAP)
    for i, ((name, answer, kept), (x, y)) in enumerate(zip(panels, places)):
        x += GAP
        y += 60
        is_pruned = len(kept) < math.prod(grid)
        sheet.add("use", href="#image", x=x, y=y, opacity=0.25 if is_pruned else None)
        sheet.add("rect", x=x, y=y, width=SIDE, height=height, fill="none", stroke="#a8a8a8")
        if is_pruned:
            color = METHODS[name].color if name in METHODS else INK
            draw_kept(sheet, (x, y, SIDE, height), grid, kept, f"kept-{i}", color)
        sheet.text(x, y + height + 20, name, 22, "start", room=SIDE - 80)
        sheet.text(x + SIDE, y + height + 20, f"{len(kept)} kept", 19, "end", GREY)
        draw_answer(sheet, x, y + height + 52, answer, right[i] if right else None)
    sheet.save(path)


def draw_kept(sheet: Sheet, box: tuple, grid: tuple, kept: list[int], name: str, color: str):
    """Show the tokens unfaded, and a line around them, strong where the neighbor is dropped. A white
    one outside of it sets it off from any image."""
    left, top, width, height = box
    rows, cols = grid
    w = width / cols
    h = height / rows
    cells = {divmod(token, cols) for token in kept}
    inside, between, around = "", "", ""
    for row, col in sorted(cells):
        inside += f"M{col * w:.2f} {row * h:.2f}h{w:.2f}v{h:.2f}h{-w:.2f}z"
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            start = f"M{(col + (right > 0)) * w:.2f} {(row + (down > 0)) * h:.2f}"
            side = f"{start}h{w:.2f}" if down else f"{start}v{h:.2f}"
            if (row + down, col + right) in cells:
                between += side
            else:
                around += side
    place = f"translate({left} {top})"
    strong = min(3.0, max(1.4, w / 9))
    line = {"transform": place, "fill": "none", "stroke_linecap": "square"}
    sheet.add("path", d=around, stroke="white", stroke_width=strong + 3, **line)
    sheet.add("clipPath", element("path", d=inside), id=name)
    sheet.add("use", href="#image", transform=place, clip_path=f"url(#{name})")
    sheet.add("path", d=between, stroke=color, stroke_width=strong / 3, **line)
    sheet.add("path", d=around, stroke=color, stroke_width=strong, **line)


def draw_answer(sheet: Sheet, x: float, y: float, answer: str, right: bool | None):
    ink = INK
    room = SIDE
    if right is not None:
        ink = RIGHT if right else WRONG
        sheet.add("path", d=CHECK if right else CROSS, transform=f"translate({x} {y})",
                  fill="none", stroke=ink, stroke_width=4)
        x += 28
        room -= 28
    sheet.text(x, y, answer.strip() or "(nothing)", 22, "start", ink, room)
