"""Ask about a scene: what each stage of the training asks, and the files of the two benchmarks.

A function ask_* takes random numbers and a scene, and returns pairs of question and answer: a Yes
and a No about the same image where it can, and nothing where the scene has nothing to ask about.
"""
import json
import random
from pathlib import Path

from tiny.scenes import GLYPHS, LONGEST, OBLONG, SQUARE, Scene, Word, draw_scene
from tiny.vocabulary import COLORS, NUMBERS, SHAPES

CLEAR = 8           # pixels between the middle of the image and what lies "on the left side" of it
APART = 20          # pixels between two shapes of which one lies "above" the other


# ---- words ---------------------------------------------------------------------------------------

def ask_text(rng, scene: Scene) -> list:
    """Ask for every word of the image, as TextVQA does."""
    return [(f"What does the {word.color} word say?", word.text) for word in scene.words]


def ask_word(rng, scene: Scene) -> list:
    """Ask whether a word is this one. A wrong one is as long and differs in two places or more."""
    text, color, _ = rng.choice(scene.words)
    wrong = text
    while sum(a != b for a, b in zip(text, wrong)) < 2:
        wrong = "".join(rng.choices(GLYPHS, k=len(text)))
    return yes_and_no(f'Is the {color} word "{text}"?', f'Is the {color} word "{wrong}"?')


def ask_letter(rng, scene: Scene) -> list:
    """Ask whether a word holds a glyph: the step before reading it whole."""
    text, color, _ = rng.choice(scene.words)
    wrong = rng.choice([glyph for glyph in GLYPHS if glyph not in text])
    right = rng.choice(text)
    return yes_and_no(f'Is there a "{right}" in the {color} word?',
                      f'Is there a "{wrong}" in the {color} word?')


def ask_length(rng, scene: Scene) -> list:
    text, color, _ = rng.choice(scene.words)
    right = len(text)
    wrong = rng.choice([n for n in (right - 1, right + 1) if 3 <= n <= 6])
    return yes_and_no(f"Are there {NUMBERS[right]} characters in the {color} word?",
                      f"Are there {NUMBERS[wrong]} characters in the {color} word?")


def ask_digit(rng, scene: Scene) -> list:
    """Ask which of two words starts with a digit, as MME's OCR does."""
    asked = [starts_with_digit(word) for word in scene.words]
    asked.sort(key=lambda pair: pair[1] == "No")
    return asked if {answer for _, answer in asked} == {"Yes", "No"} else []


def ask_any_digit(rng, scene: Scene) -> list:
    """Ask the same of any word; most of those that start with a letter are left out."""
    return [starts_with_digit(word) for word in scene.words
            if word.text[0].isdigit() or rng.random() < 0.3]


def starts_with_digit(word: Word) -> tuple[str, str]:
    question = f"Is the first character of the {word.color} word a digit?"
    return question, "Yes" if word.text[0].isdigit() else "No"


# ---- shapes --------------------------------------------------------------------------------------

def ask_existence(rng, scene: Scene) -> list:
    names = [shape.name for shape in scene.shapes]
    present = rng.choice(names)
    absent = rng.choice([name for name in SHAPES if name not in names])
    return yes_and_no(f"Is there a {present} in this image?", f"Is there a {absent} in this image?")


def ask_count(rng, scene: Scene) -> list:
    right = len(scene.shapes)
    wrong = rng.choice([n for n in (right - 1, right + 1) if n > 0])
    return yes_and_no(f"Are there {NUMBERS[right]} shapes in this image?",
                      f"Are there {NUMBERS[wrong]} shapes in this image?")


def ask_color(rng, scene: Scene) -> list:
    name, color, _ = rng.choice(scene.shapes)
    wrong = rng.choice([other for other in COLORS if other != color])
    return yes_and_no(f"Is the {name} {color}?", f"Is the {name} {wrong}?")


def ask_relation(rng, scene: Scene) -> list:
    """Choose two shapes that lie well apart, in the direction they lie apart in."""
    pairs = []
    for a in scene.shapes:
        for b in scene.shapes:
            ax, ay = center(a.box)
            bx, by = center(b.box)
            if bx - ax > APART:
                pairs.append((a.name, b.name, "on the left side of", "on the right side of"))
            if by - ay > APART:
                pairs.append((a.name, b.name, "above", "below"))
    if not pairs:
        return []
    a, b, right, wrong = rng.choice(pairs)
    if rng.random() < 0.5:
        a, b, right, wrong = b, a, wrong, right
    return yes_and_no(f"Is the {a} {right} the {b}?", f"Is the {a} {wrong} the {b}?")


def ask_side(rng, scene: Scene) -> list:
    """Ask in which half of the image a shape lies, if it is clear of the middle."""
    name, _, box = rng.choice(scene.shapes)
    pairs = []
    for axis, low, high in ((0, "on the left side", "on the right side"),
                            (1, "at the top", "at the bottom")):
        half = half_of(box, scene, axis)
        if half == "low":
            pairs.append((low, high))
        if half == "high":
            pairs.append((high, low))
    if not pairs:
        return []
    right, wrong = rng.choice(pairs)
    return yes_and_no(f"Is the {name} {right} of this image?",
                      f"Is the {name} {wrong} of this image?")


def ask_half(rng, scene: Scene) -> list:
    """Ask which of two shapes lies in a half of the image, as MME's position does."""
    axis, where = rng.choice([(0, "on the left side"), (1, "at the top")])
    low = [shape.name for shape in scene.shapes if half_of(shape.box, scene, axis) == "low"]
    high = [shape.name for shape in scene.shapes if half_of(shape.box, scene, axis) == "high"]
    if not low or not high:
        return []
    right = rng.choice(low)
    wrong = rng.choice(high)
    return yes_and_no(f"Is the {right} {where} of this image?",
                      f"Is the {wrong} {where} of this image?")


def ask_open(rng, scene: Scene) -> list:
    """Ask what is answered with a word instead of yes or no."""
    name, color, _ = rng.choice(scene.shapes)
    return [(f"What color is the {name}?", color),
            ("How many shapes are in this image?", NUMBERS[len(scene.shapes)])]


def ask_more(rng, scene: Scene) -> list:
    """Ask where a shape lies, and back: from a word to its color, from a color to its shape."""
    name, color, box = rng.choice(scene.shapes)
    text, word_color, _ = rng.choice(scene.words)
    x, y = center(box)
    row = "top" if y < scene.image.height / 2 else "bottom"
    column = "left" if x < scene.image.width / 2 else "right"
    asked = [(f"Where is the {name}?", f"{row} {column}"),
             (f'What color is the word "{text}"?', word_color)]
    if [shape.color for shape in scene.shapes].count(color) == 1:
        asked.append((f"What shape is {color}?", name))
    return asked


def yes_and_no(right: str, wrong: str) -> list[tuple[str, str]]:
    return [(right, "Yes"), (wrong, "No")]


def center(box: tuple) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def half_of(box: tuple, scene: Scene, axis: int) -> str:
    """Return "low" for left or top, "high" for right or bottom, "" for too near to the middle."""
    middle = scene.image.size[axis] / 2
    place = center(box)[axis]
    if place < middle - CLEAR:
        return "low"
    return "high" if place > middle + CLEAR else ""


# ---- what a stage of the training asks, besides what every word says -----------------------------

def one(ask):
    """Ask one of its questions, at random."""
    def pick(rng, scene):
        asked = ask(rng, scene)
        return [rng.choice(asked)] if asked else []
    return pick


SIMPLE = [one(ask_existence), one(ask_count), one(ask_relation), one(ask_color), one(ask_word)]
EASY = [ask_open, *SIMPLE]
SIDES = [ask_open, ask_more, *SIMPLE, one(ask_side)]
HARD = [*SIDES, ask_relation, ask_word, ask_side, ask_letter]
LENGTHS = [ask_more, *SIMPLE, one(ask_side), ask_side, ask_length]
AS_MME = [ask_more, one(ask_existence), one(ask_count), one(ask_color), ask_half, ask_half,
          ask_any_digit]
AS_MME_AND_OPEN = [*AS_MME, ask_open]
PAIRS = [ask_existence, ask_count, ask_color, ask_half, ask_half, ask_any_digit]
PAIRS_AND_OPEN = [one(ask_open), one(ask_more), *PAIRS]
MORE_COLOR = [*PAIRS_AND_OPEN, ask_color, ask_color]


def training_questions(rng, scene: Scene, asked: list, words_first: bool) -> list:
    """Ask what every word says, and what each function asks, in random order."""
    words = ask_text(rng, scene)
    mixed = [] if words_first else list(words)
    for ask in asked:
        mixed += ask(rng, scene)
    rng.shuffle(mixed)
    return words + mixed if words_first else mixed


# ---- benchmarks ----------------------------------------------------------------------------------

MME = {"existence": ask_existence, "count": ask_count, "position": ask_half, "color": ask_color,
       "OCR": ask_digit}
MME_SIZES = 2 * (SQUARE + OBLONG) + LONGEST     # one in eight is longer than any in training


def make_mme(folder: Path):
    """Write the official MME layout: 40 images of each subtask, each with a Yes and a No."""
    for subtask, ask in MME.items():
        (folder / subtask).mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"mme {subtask}")
        number = 0
        while number < 40:
            scene = draw_scene(rng, True, rng.choice(MME_SIZES))
            pair = ask(rng, scene)
            if not pair:
                continue
            number += 1
            save(scene, folder / subtask / f"{number:04}.jpg")
            lines = [f"{question} Please answer yes or no.\t{answer}\n"
                     for question, answer in pair]
            (folder / subtask / f"{number:04}.txt").write_text("".join(lines))


def make_textvqa(folder: Path):
    """Write the official TextVQA layout: 160 images, a question about each word, ten annotators who
    agree."""
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    rng = random.Random("textvqa")
    data = []
    for number in range(160):
        scene = draw_scene(rng, test=True)
        save(scene, folder / "train_images" / f"{number:04}.jpg")
        for question, text in ask_text(rng, scene):
            data.append({"question": question, "image_id": f"{number:04}",
                         "question_id": len(data), "answers": [text] * 10})
    labels = json.dumps({"dataset_version": "0.5.1", "data": data}, indent=0)
    (folder / "TextVQA_0.5.1_val.json").write_text(labels + "\n")


def save(scene: Scene, file: Path):
    scene.image.save(file, quality=95, subsampling=0)
