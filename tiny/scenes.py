"""Draw a scene: one or two words and one to four shapes, at free places and of free sizes.

Only the random numbers passed in decide what is drawn: the same seed gives the same pixels.
"""
import math
import random
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tiny.vocabulary import COLORS, SHAPES, VOCABULARY

SIDE = 112                              # of a square image, in pixels
SQUARE = [(SIDE, SIDE)]                 # width, height
OBLONG = [(140, 84), (84, 140), (126, 98), (98, 126), (154, 84), (84, 154)]
LONGEST = [(168, 84), (84, 168)]        # in no training image

GLYPHS = "abcdefghkmnprstuvwxy3467"     # no two of them look alike at 20 pixels
RGB = {"red": (214, 39, 40), "green": (30, 140, 50), "blue": (31, 90, 200),
       "orange": (245, 140, 10), "purple": (140, 60, 170), "black": (20, 20, 20)}
FONTS = {height: ImageFont.load_default(round(height * 0.95)) for height in range(19, 24)}


class Word(NamedTuple):
    text: str
    color: str
    cells: list                         # (glyph, box); a box is left, top, right, bottom in pixels


class Shape(NamedTuple):
    name: str
    color: str
    box: tuple


@dataclass
class Scene:
    image: Image.Image
    words: list[Word]                   # of different colors
    shapes: list[Shape]                 # of different names; no two things overlap


def draw_scene(rng: random.Random, test: bool, size: tuple[int, int] = SQUARE[0]) -> Scene:
    """Draw a scene on an image of that width and height; test: with words of no training image."""
    while True:
        word_colors = rng.sample(COLORS, rng.choice([1, 2]))
        texts = [new_word(rng, test) for _ in word_colors]
        names = rng.sample(SHAPES, rng.randint(1, 4))
        shape_colors = rng.choices(COLORS, k=4)         # always 4: fewer change every later draw
        sides = [(rng.randint(14, 16) * len(text), rng.randint(19, 23)) for text in texts]
        for _ in names:
            side = rng.randint(16, 28)
            sides.append((side, side))
        boxes = find_room(rng, sides, size)
        if len(boxes) == len(sides):                # else there was no room: choose others
            break
    image = draw_background(rng, size)
    draw = ImageDraw.Draw(image)
    words = []
    for text, color, box in zip(texts, word_colors, boxes):
        words.append(Word(text, color, draw_word(draw, text, RGB[color], box)))
    shapes = [Shape(*shape) for shape in zip(names, shape_colors, boxes[len(texts):])]
    for name, color, box in shapes:
        draw_shape(draw, name, RGB[color], box)
    return Scene(image, words, shapes)


def new_word(rng: random.Random, test: bool) -> str:
    """Draw three to six glyphs. One word in eight is only for test images, so that no training
    image is ever a test image."""
    while True:
        word = "".join(rng.choices(GLYPHS, k=rng.choice([3, 4, 4, 5, 5, 6])))
        for_test = zlib.crc32(word.encode()) % 8 == 0
        if word not in VOCABULARY and for_test == test:
            return word


def find_room(rng: random.Random, sides: list, size: tuple[int, int]) -> list[tuple]:
    """Place a box for each width and height, no two touching; fewer where there is no room."""
    boxes = []
    for w, h in sides:
        if w + 2 > size[0]:                             # every image is high enough
            break
        for _ in range(60):
            x = rng.randint(1, size[0] - w - 1)
            y = rng.randint(1, size[1] - h - 1)
            box = (x, y, x + w, y + h)
            if not any(touch(box, other) for other in boxes):
                boxes.append(box)
                break
    return boxes


def touch(p: tuple, q: tuple) -> bool:
    """Return whether two boxes overlap or have no row or column of pixels between them."""
    beside = p[2] + 1 < q[0] or q[2] + 1 < p[0]
    above = p[3] + 1 < q[1] or q[3] + 1 < p[1]
    return not beside and not above


def draw_background(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Draw light paper with a slow gradient and a few pale strokes."""
    one_end = tuple(rng.randint(205, 255) for _ in range(3))
    other_end = tuple(rng.randint(205, 255) for _ in range(3))
    ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize(size)
    image = Image.new("RGB", size, other_end)
    image.paste(one_end, mask=ramp)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        ends = [rng.randint(0, size[i % 2]) for i in range(4)]
        color = tuple(rng.randint(185, 235) for _ in range(3))
        draw.line(ends, color, rng.randint(1, 3))
    return image


def draw_word(draw, text: str, rgb: tuple, box: tuple) -> list:
    """Draw each glyph in the middle of its own cell -> (glyph, cell) of each."""
    left, top, right, bottom = box
    step = (right - left) / len(text)
    cells = []
    for i, glyph in enumerate(text):
        a = left + i * step
        c = left + (i + 1) * step
        baseline = top + 0.76 * (bottom - top)
        draw.text(((a + c) / 2, baseline), glyph, rgb, FONTS[bottom - top], anchor="ms")
        cells.append((glyph, (a, top, c, bottom)))
    return cells


def draw_shape(draw, name: str, rgb: tuple, box: tuple):
    a, b, c, d = box
    r = (c - a) / 2
    x = a + r
    y = b + r
    if name == "circle":
        draw.ellipse(box, rgb)
    elif name == "ring":
        draw.ellipse(box, None, rgb, width=max(3, round(r / 3)))
    elif name == "square":
        draw.rectangle((a + 1, b + 1, c - 1, d - 1), rgb)
    elif name == "triangle":
        draw.polygon([(x, b), (c, d), (a, d)], rgb)
    elif name == "cross":
        draw.line((a, b, c, d), rgb, round(r / 2))
        draw.line((a, d, c, b), rgb, round(r / 2))
    elif name == "star":
        corners = []
        for i in range(10):
            turn = math.pi * (i / 5 - 0.5)
            reach = r if i % 2 == 0 else 0.42 * r
            corners.append((x + reach * math.cos(turn), y + reach * math.sin(turn)))
        draw.polygon(corners, rgb)
