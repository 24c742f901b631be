"""What eval.py finds, drawn: scores and information by layer, and the tokens kept of an image. Pillow alone."""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokprune import METHODS, InputError

INK = dict(zip(METHODS, ["#7f7f7f", "#d62728", "#ff7f0e", "#2ca02c", "#1f77b4", "#9467bd", "#111111", "#17becf"]))
PANEL = (620, 380)
FONT, SMALL = ImageFont.load_default(15), ImageFont.load_default(12)


def save_picture(picture: Image.Image, path: Path):
    try:
        picture.save(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e})")


def axes(draw, panel: int, title: str, layers: list[int], caption: str):
    """A frame for percents against layers, -> where a point (layer, percent) lies, and where the legend starts."""
    width, height, (x0, y0) = *PANEL, (panel * PANEL[0] + 60, 46)
    x1, y1, low, high = (panel + 1) * width - 130, height - 40, layers[0] - 0.5, layers[-1] + 0.5

    def place(layer, percent):
        return x0 + (layer - low) / (high - low) * (x1 - x0), y1 - percent / 100 * (y1 - y0)
    draw.text(((x0 + x1) / 2, 18), title, "black", FONT, anchor="mm")
    draw.text(((x0 + x1) / 2, height - 4), caption, "black", SMALL, anchor="mm")
    for percent in range(0, 101, 20):
        x, y = place(low, percent)
        draw.line((x0, y, x1, y), "#e4e4e4")
        draw.text((x - 8, y), f"{percent}", "black", SMALL, anchor="rm")
    for layer in layers[::-(-len(layers) // 12)]:
        draw.text((place(layer, 0)[0], y1 + 12), f"{layer}", "black", SMALL, anchor="mm")
    return place, (x1 + 6, (y0 + y1) / 2 - 60)


def draw_curve(draw, place, legend, number: int, name: str, points: list[tuple[int, float]], ink: str):
    dots = [place(*point) for point in points]
    draw.line(dots, ink, 2, joint="curve")
    for x, y in dots:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), ink)
    x, y = legend[0], legend[1] + 17 * number
    draw.line((x, y, x + 18, y), ink, 3)
    draw.text((x + 24, y), name, "black", SMALL, anchor="lm")


def draw_dashes(draw, start, end, caption: str):
    (x0, y0), (x1, y1) = start, end
    length = math.hypot(x1 - x0, y1 - y0)
    for at in range(0, int(length), 8):
        points = [(x0 + (x1 - x0) * t / length, y0 + (y1 - y0) * t / length) for t in (at, min(at + 4, length))]
        draw.line(points, "black")
    draw.text((x1 - 4, y1 - 2), caption, "black", SMALL, anchor="rs")


def plot(report: dict, layers: list[int], path: Path):
    """Score against layer, a panel a benchmark, a method a line; dashed: the unpruned model, and the one without image."""
    picture = Image.new("RGB", (PANEL[0] * len(report), PANEL[1] + 30), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (benchmark, rows) in enumerate(report.items()):
        place, legend = axes(draw, panel, benchmark, layers, "pruned at the input of layer")
        for row in rows:
            if row["method"] in ("unpruned", "no image"):
                draw_dashes(draw, place(layers[0] - 0.5, row["score"]), place(layers[-1] + 0.5, row["score"]), row["method"])
        lines = {m: sorted((row["layer"], row["score"]) for row in rows if row["method"] == m) for m in METHODS}
        for i, (method, points) in enumerate((m, p) for m, p in lines.items() if p):
            draw_curve(draw, place, legend, i, method, points, INK.get(method, "#8c564b"))
    save_picture(picture, path)


def plot_information(report: dict, shown: dict, path: Path):
    """For each benchmark: information by layer, its mean and spread in percent of their largest value, and the score with
    everything dropped in percent of the unpruned one, the horizon dashed; below, one image's map at six layers."""
    picture = Image.new("RGB", (PANEL[0] * len(report), PANEL[1] + 30 + 130), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (benchmark, found) in enumerate(report.items()):
        rows, end = found["information"], found["horizon"]
        layers = [row["layer"] for row in rows]
        place, legend = axes(draw, panel, benchmark, layers, "at the input of layer")
        for i, (name, key, ink) in enumerate([("mean", "mean", "#1f77b4"), ("spread", "std", "#ff7f0e")]):
            top = max(max(row[key] for row in rows), 1e-12)
            draw_curve(draw, place, legend, i, name, [(row["layer"], max(0, 100 * row[key] / top)) for row in rows], ink)
        share = [min(100, 100 * end["scores"][layer] / max(end["unpruned"], 1e-12)) for layer in layers]
        draw_curve(draw, place, legend, 2, "all dropped", list(zip(layers, share)), "#7f7f7f")
        if layers[0] <= end["layer"] <= layers[-1]:
            draw_dashes(draw, place(end["layer"], 0), place(end["layer"], 100), "horizon")
        canvas, maps = shown[benchmark]
        canvas = canvas.resize((84, round(84 * canvas.height / canvas.width)), Image.BICUBIC)
        some = [layers[round(i * (len(layers) - 1) / 5)] for i in range(6)]
        top = max(float(maps.max()), 1e-12)
        for i, layer in enumerate(some):
            told = (200 * np.clip(maps[layers.index(layer)] / top, 0, 1)).astype(np.uint8)
            heat, ink = Image.fromarray(told).resize(canvas.size, Image.NEAREST), Image.new("RGB", canvas.size, "#d62728")
            tile = Image.composite(ink, canvas.convert("L").convert("RGB"), heat)
            x, y = panel * PANEL[0] + 30 + 94 * i, PANEL[1] + 40
            picture.paste(tile, (x, y))
            draw.text((x + 42, y - 9), f"layer {layer}", "black", SMALL, anchor="mm")
    save_picture(picture, path)


def overlay(canvas: Image.Image, panels: list[tuple[str, list[int]]], grid: tuple[int, int], path: Path):
    """The image once per panel (caption, kept tokens); what was dropped is dimmed."""
    rows, cols = grid
    side = 224
    canvas = canvas.resize((side, round(side * canvas.height / canvas.width)), Image.BICUBIC)
    across = min(4, len(panels))
    picture = Image.new("RGB", (across * (side + 8), -(-len(panels) // across) * (canvas.height + 28)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    dim = Image.blend(canvas, Image.new("RGB", canvas.size, "white"), 0.8)
    for i, (caption, kept) in enumerate(panels):
        panel = dim.copy()
        for token in kept:
            r, c = divmod(token, cols)
            box = tuple(round(v) for v in (c * side / cols, r * canvas.height / rows,
                                           (c + 1) * side / cols, (r + 1) * canvas.height / rows))
            panel.paste(canvas.crop(box), box)
        x, y = i % across * (side + 8), i // across * (canvas.height + 28)
        picture.paste(panel, (x + 4, y + 24))
        draw.text((x + 6, y + 12), caption, "black", font, anchor="lm")
    save_picture(picture, path)
