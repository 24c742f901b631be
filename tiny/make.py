"""Makes everything in tiny/ from seeds: two benchmarks, and a LLaVA-1.5 and a Qwen2.5-VL trained to answer them.

    python tiny/make.py                 all of it; an interrupted run goes on where it stood
    python tiny/make.py --data          only the benchmarks (seconds)
    python tiny/make.py --only qwen     the benchmarks and one model

Every image shows one or two words and one to four shapes at free places and sizes. The training is the ordinary one:
next-token cross entropy on the answers, every visual token in every layer. Nothing in it knows about pruning.
On two CPU cores, with other work beside it, LLaVA logged 138 minutes and Qwen 87; a CUDA device is used if there is one.
"""
import argparse
import json
import math
import random
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import model_llava  # noqa: E402
import model_qwen  # noqa: E402
from benchmarks import SHORT  # noqa: E402
from model_llava import CLIP_MEAN, CLIP_STD, Llava, normalize, pad_to_square, resize_shortest_edge  # noqa: E402
from model_qwen import Qwen  # noqa: E402

SIDE, PATCH = 112, 14
SIZES = [(SIDE, SIDE), (140, 84), (84, 140), (126, 98), (98, 126), (154, 84), (84, 154)]      # width, height
MOST = max(w * h for w, h in SIZES) // PATCH ** 2       # visual tokens of the largest
MIXED = 6 * SIZES[:1] + SIZES[1:]                       # half of them square
TESTED = 2 * SIZES + [(168, 84), (84, 168)]             # of MME; one in eight is longer than any seen in training
SHAPES = ["circle", "square", "triangle", "cross", "star", "ring"]
COLORS = {"red": (214, 39, 40), "green": (30, 140, 50), "blue": (31, 90, 200), "orange": (245, 140, 10),
          "purple": (140, 60, 170), "black": (20, 20, 20)}
GLYPHS = "abcdefghkmnprstuvwxy3467"       # no two of them look alike at 20 pixels
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
FONTS = {height: ImageFont.load_default(round(height * 0.95)) for height in range(19, 24)}
# Words that are one token each. Later stages ask with more words; their ids come last, so earlier checkpoints stay valid.
VOCABULARY = set("""USER ASSISTANT Yes No What does the word say Is there a in this image Are there shapes How many are color is
    on left right side of above below""".split()) | set(SHAPES) | set(COLORS) | set(NUMBERS) | {"ten", "an", "none"}
MORE_WORDS = {"Where", "shape", "at", "top", "bottom"}
LAST_WORDS = ["▁characters", "▁first", "▁character", "▁digit"]


# ---- pictures ---------------------------------------------------------------------------------------------------

@dataclass
class Scene:
    image: Image.Image
    words: list         # (text, color, [(glyph, box)])
    shapes: list        # (shape, color, box); boxes are in pixels, no two overlap


def draw_scene(rng: random.Random, test: bool, size=(SIDE, SIDE)) -> Scene:
    while True:                                                # a crowded start may leave no room: start again
        boxes = []
        words = [(new_word(rng, test), color) for color in rng.sample(list(COLORS), rng.choice([1, 2]))]
        shapes = list(zip(rng.sample(SHAPES, rng.randint(1, 4)), rng.choices(list(COLORS), k=4)))
        sides = [(rng.randint(14, 16) * len(text), rng.randint(19, 23)) for text, _ in words]
        sides += [(side, side) for side in (rng.randint(16, 28) for _ in shapes)]
        for w, h in sides:
            if w + 2 > size[0]:
                break
            for _ in range(60):
                x, y = rng.randint(1, size[0] - w - 1), rng.randint(1, size[1] - h - 1)
                if all(x + w + 1 < a or c + 1 < x or y + h + 1 < b or d + 1 < y for a, b, c, d in boxes):
                    boxes.append((x, y, x + w, y + h))
                    break
        if len(boxes) == len(sides):
            break
    image = background(rng, size)
    draw = ImageDraw.Draw(image)
    placed = []
    for (text, color), box in zip(words, boxes):
        placed.append((text, color, draw_word(draw, text, COLORS[color], box)))
    shapes = [(shape, color, box) for (shape, color), box in zip(shapes, boxes[len(words):])]
    for shape, color, box in shapes:
        draw_shape(draw, shape, COLORS[color], box)
    return Scene(image, placed, shapes)


def new_word(rng: random.Random, test: bool) -> str:
    """Three to six glyphs. One word in eight is for test images alone, so no training image is ever a test image."""
    while True:
        word = "".join(rng.choices(GLYPHS, k=rng.choice([3, 4, 4, 5, 5, 6])))
        if word not in VOCABULARY and (zlib.crc32(word.encode()) % 8 == 0) == test:
            return word


def background(rng: random.Random, size) -> Image.Image:
    """Light paper with a slow gradient and a few pale strokes."""
    a, b = ([rng.randint(205, 255) for _ in range(3)] for _ in range(2))
    ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize(size)
    image = Image.composite(Image.new("RGB", size, tuple(a)), Image.new("RGB", size, tuple(b)), ramp)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        ends = [rng.randint(0, size[i % 2]) for i in range(4)]
        draw.line(ends, tuple(rng.randint(185, 235) for _ in range(3)), rng.randint(1, 3))
    return image


def draw_word(draw, text, color, box):
    """Draws each glyph in the middle of its own cell; -> [(glyph, cell)]."""
    x0, y0, x1, y1 = box
    step, font = (x1 - x0) / len(text), FONTS[y1 - y0]
    cells = [(x0 + i * step, y0, x0 + (i + 1) * step, y1) for i in range(len(text))]
    for glyph, (a, b, c, d) in zip(text, cells):
        draw.text(((a + c) / 2, b + 0.76 * (d - b)), glyph, color, font, anchor="ms")
    return list(zip(text, cells))


def draw_shape(draw, shape, color, box):
    a, b, c, d = box
    w = (c - a) / 2
    x, y = a + w, b + w
    if shape == "circle":
        draw.ellipse(box, color)
    elif shape == "ring":
        draw.ellipse(box, None, color, width=max(3, round(w / 3)))
    elif shape == "square":
        draw.rectangle((a + 1, b + 1, c - 1, d - 1), color)
    elif shape == "triangle":
        draw.polygon([(x, b), (c, d), (a, d)], color)
    elif shape == "cross":
        draw.line((a, b, c, d), color, round(w / 2)), draw.line((a, d, c, b), color, round(w / 2))
    elif shape == "star":
        turns, radii = [math.pi * (i / 5 - 0.5) for i in range(10)], [w, 0.42 * w] * 5
        draw.polygon([(x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(radii, turns)], color)


# ---- questions --------------------------------------------------------------------------------------------------
# Each takes a scene and returns [(question, answer)], a Yes and a No about the same image where it can. MME, below, says
# which of them the benchmark asks; the others are for training alone.

def ask_text(rng, scene):
    return [(f"What does the {color} word say?", text) for text, color, _ in scene.words]


def ask_existence(rng, scene):
    present, absent = rng.choice(scene.shapes)[0], rng.choice([s for s in SHAPES if s not in [x[0] for x in scene.shapes]])
    return [(f"Is there a {present} in this image?", "Yes"), (f"Is there a {absent} in this image?", "No")]


def ask_count(rng, scene):
    n = len(scene.shapes)
    wrong = rng.choice([m for m in (n - 1, n + 1) if m > 0])
    return [(f"Are there {NUMBERS[m]} shapes in this image?", a) for m, a in ((n, "Yes"), (wrong, "No"))]


def ask_relation(rng, scene):
    """About two shapes that stand well apart along the direction asked for; none such, no question."""
    pairs = []
    for i, (a, _, p) in enumerate(scene.shapes):
        for b, _, q in scene.shapes[:i] + scene.shapes[i + 1:]:
            dx, dy = (q[0] + q[2] - p[0] - p[2]) / 2, (q[1] + q[3] - p[1] - p[3]) / 2
            pairs += [(a, b, "on the left side of", "on the right side of")] * (dx > 20)
            pairs += [(a, b, "above", "below")] * (dy > 20)
    if not pairs:
        return []
    a, b, right, wrong = rng.choice(pairs)
    if rng.random() < 0.5:
        a, b, right, wrong = b, a, wrong, right
    return [(f"Is the {a} {right} the {b}?", "Yes"), (f"Is the {a} {wrong} the {b}?", "No")]


def ask_color(rng, scene):
    shape, color, _ = rng.choice(scene.shapes)
    wrong = rng.choice([c for c in COLORS if c != color])
    return [(f"Is the {shape} {color}?", "Yes"), (f"Is the {shape} {wrong}?", "No")]


def ask_word(rng, scene):
    """The wrong word has the right length and differs in at least two places."""
    text, color, _ = rng.choice(scene.words)
    wrong = text
    while sum(a != b for a, b in zip(text, wrong)) < 2:
        wrong = "".join(rng.choices(GLYPHS, k=len(text)))
    return [(f'Is the {color} word "{text}"?', "Yes"), (f'Is the {color} word "{wrong}"?', "No")]


def ask_side(rng, scene):
    """About the half of the image a shape lies in, if it is clear of the middle."""
    shape, _, (a, b, c, d) = rng.choice(scene.shapes)
    pairs, (width, height) = [], scene.image.size
    for at, middle, first, second in ((a + c, width, "on the left side", "on the right side"),
                                      (b + d, height, "at the top", "at the bottom")):
        pairs += [(first, second)] * (at < middle - 16) + [(second, first)] * (at > middle + 16)
    if not pairs:
        return []
    right, wrong = rng.choice(pairs)
    return [(f"Is the {shape} {right} of this image?", "Yes"), (f"Is the {shape} {wrong} of this image?", "No")]


def ask_half(rng, scene):
    """About two shapes, one clear of the middle to the left or the top, one to the right or the bottom."""
    axis, where = rng.choice([(0, "on the left side"), (1, "at the top")])
    first = [shape for shape, _, box in scene.shapes if box[axis] + box[axis + 2] < scene.image.size[axis] - 16]
    second = [shape for shape, _, box in scene.shapes if box[axis] + box[axis + 2] > scene.image.size[axis] + 16]
    if not first or not second:
        return []
    return [(f"Is the {rng.choice(half)} {where} of this image?", answer) for half, answer in ((first, "Yes"), (second, "No"))]


def ask_digit(rng, scene):
    """About two words of which one starts with a digit; nothing about others."""
    asked = sorted((first_character(*word) for word in scene.words), key=lambda pair: pair[1] == "No")
    return asked if len({answer for _, answer in asked}) == 2 else []


def ask_any_digit(rng, scene):
    """The same about any word, most of those that start with a letter left out."""
    return [first_character(*word) for word in scene.words if word[0][0].isdigit() or rng.random() < 0.3]


def first_character(text, color, _):
    return f"Is the first character of the {color} word a digit?", "Yes" if text[0].isdigit() else "No"


def ask_length(rng, scene):
    """How many glyphs a word has, or one more or fewer."""
    text, color, _ = rng.choice(scene.words)
    wrong = rng.choice([m for m in (len(text) - 1, len(text) + 1) if 3 <= m <= 6])
    return [(f"Are there {NUMBERS[m]} characters in the {color} word?", a) for m, a in ((len(text), "Yes"), (wrong, "No"))]


def ask_letter(rng, scene):
    """The step before a whole word: one of its glyphs."""
    text, color, _ = rng.choice(scene.words)
    wrong = rng.choice([g for g in GLYPHS if g not in text])
    return [(f'Is there a "{g}" in the {color} word?', answer) for g, answer in ((rng.choice(text), "Yes"), (wrong, "No"))]


def ask_open(rng, scene):
    """Answered with a word instead of yes or no."""
    shape, color, _ = rng.choice(scene.shapes)
    return [(f"What color is the {shape}?", color), ("How many shapes are in this image?", NUMBERS[len(scene.shapes)])]


def ask_more(rng, scene):
    """Where things lie, and the ways back: from a color to its shape, from a word to its color."""
    shape, color, (a, b, c, d) = rng.choice(scene.shapes)
    text, hue, _ = rng.choice(scene.words)
    width, height = scene.image.size
    place = ("top" if b + d < height else "bottom") + (" left" if a + c < width else " right")
    asked = [(f"Where is the {shape}?", place), (f'What color is the word "{text}"?', hue)]
    return asked + [(f"What shape is {color}?", shape)] * (sum(x[1] == color for x in scene.shapes) == 1)


MME = {"existence": ask_existence, "count": ask_count, "position": ask_half, "color": ask_color, "OCR": ask_digit}


def one(ask):
    """One of its questions, at random."""
    def pick(rng, scene):
        asked = ask(rng, scene)
        return [rng.choice(asked)] if asked else []
    return pick


# What each stage of the training asks about an image besides every word; see STAGES.
SIMPLE = [one(ask) for ask in (ask_existence, ask_count, ask_relation, ask_color, ask_word)]
LAST = [ask_more, one(ask_existence), one(ask_count), one(ask_color), ask_half, ask_half, ask_any_digit]
PAIRS = [ask_existence, ask_count, ask_color, ask_half, ask_half, ask_any_digit]
ASKED = {"answers": [ask_open, *SIMPLE],
         "more": [ask_open, ask_more, *SIMPLE, one(ask_side)],
         "hard": [ask_open, ask_more, *SIMPLE, one(ask_side), ask_relation, ask_word, ask_side, ask_letter],
         "deep": [ask_more, *SIMPLE, one(ask_side), ask_side, ask_length],
         "last": LAST, "shapes": LAST, "mixed": LAST,
         "qwen-answers": [*LAST, ask_open], "qwen-pairs": PAIRS, "qwen-deep": [one(ask_open), one(ask_more), *PAIRS],
         "qwen-last": [one(ask_open), one(ask_more), *PAIRS, ask_color, ask_color]}


def training_questions(rng, scene, stage):
    """All in random order; from the third stage on the words come first."""
    words = ask_text(rng, scene)
    asked = [] if stage not in ("answers", "more") else list(words)
    for ask in ASKED[stage]:
        asked += ask(rng, scene)
    rng.shuffle(asked)
    return asked if stage in ("answers", "more") else words + asked


# ---- benchmarks -------------------------------------------------------------------------------------------------

def make_mme(folder: Path):
    """The official MME layout: 40 images a subtask, each with a question for Yes and one for No."""
    for subtask, ask in MME.items():
        (folder / subtask).mkdir(parents=True, exist_ok=True)
        rng, number = random.Random(f"mme {subtask}"), 0
        while number < 40:
            scene = draw_scene(rng, True, rng.choice(TESTED))
            pair = ask(rng, scene)
            if pair:
                number += 1
                scene.image.save(folder / subtask / f"{number:04}.jpg", quality=95, subsampling=0)
                (folder / subtask / f"{number:04}.txt").write_text(
                    "".join(f"{question} Please answer yes or no.\t{answer}\n" for question, answer in pair))


def make_textvqa(folder: Path):
    """The official TextVQA layout: 160 images, a question about each of their words, ten annotators of one mind."""
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    rng, data = random.Random("textvqa"), []
    for number in range(160):
        scene = draw_scene(rng, test=True)
        scene.image.save(folder / "train_images" / f"{number:04}.jpg", quality=95, subsampling=0)
        for question, text in ask_text(rng, scene):
            data.append({"question": question, "image_id": f"{number:04}", "question_id": len(data),
                         "answers": [text] * 10})
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_version": "0.5.1", "data": data}, indent=0) + "\n")


# ---- tokenizer --------------------------------------------------------------------------------------------------

def make_tokenizer() -> Tokenizer:
    """LLaMA's tokenizer.json in small: same normaliser, BOS and special tokens; a token per template word, else per character.

    The two sentences that stand in every prompt are a token each, so that the small decoder spends its time elsewhere.
    """
    characters = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    sentences = [model_llava.PROMPT.split(" USER")[0], SHORT.strip()]
    tokens = ["<unk>", "<s>", "</s>"] + characters + ["▁" + c for c in characters if c != "▁"]
    for new in (sorted(VOCABULARY), sorted("▁" + w for w in VOCABULARY), ["<image>", "<pad>", *sentences],
                sorted(MORE_WORDS), sorted("▁" + w for w in MORE_WORDS), LAST_WORDS):
        tokens += [t for t in new if t not in tokens]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, unk_token="<unk>", ignore_merges=True,
                                     merges=[("▁", c) for c in characters if c != "▁"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]|▁"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<image>", "<pad>")])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in sentences])
    return tokenizer


def make_qwen_tokenizer() -> Tokenizer:
    """Qwen's tokenizer.json in small: NFC, byte level, ChatML's special tokens last; a token per template word, else per byte."""
    words = sorted(VOCABULARY | MORE_WORDS | {word.removeprefix("▁") for word in LAST_WORDS})
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [t for t in words + ["Ġ" + word for word in words] if t not in tokens]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in (
        "endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (
        "system\nYou are a helpful assistant.", "user\n", "assistant\n", SHORT.strip())])
    return tokenizer


# ---- training ---------------------------------------------------------------------------------------------------

TOWER = model_llava.VisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
                                 image_size=SIDE, patch_size=PATCH)
VISUAL = (SIDE // PATCH) ** 2
ROWS = 148                                  # rows of a training sequence after the image: as many questions as fit


def make_llava(layers: int, tokenizer: Tokenizer) -> Llava:
    """The last CLIP block is used (feature layer -1), so no weight in the file is idle."""
    text = model_llava.TextConfig(vocab_size=-(-tokenizer.get_vocab_size() // 32) * 32, hidden_size=128, intermediate_size=344,
                                  num_hidden_layers=layers, num_attention_heads=4, rms_norm_eps=1e-5)
    model = Llava(model_llava.Config(text, TOWER, tokenizer.token_to_id("<image>"), vision_feature_layer=-1), tokenizer, {2})
    return start(model, layers, "embed", 0.02)


def make_qwen(layers: int, tokenizer: Tokenizer) -> Qwen:
    """Patches of 7 pixels, so that a visual token is 14 wide, as LLaVA's. The rotary base is small because sequences are."""
    text = model_qwen.TextConfig(vocab_size=-(-tokenizer.get_vocab_size() // 32) * 32, hidden_size=128, intermediate_size=352,
                                 num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
                                 rope_theta=10.0, mrope_section=(4, 6, 6))
    vision = model_qwen.VisionConfig(depth=6, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128,
                                     patch_size=PATCH // 2, window_size=4 * PATCH, fullatt_block_indexes=[2, 5])
    config = model_qwen.Config(text, vision, tokenizer.token_to_id("<|image_pad|>"), tie_word_embeddings=True,
                               min_pixels=48 * PATCH ** 2, max_pixels=80 * PATCH ** 2)
    model = Qwen(config, tokenizer, {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")})
    start(model, layers, "embed_tokens", text.hidden_size ** -0.5)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def start(model, layers: int, embeddings: str, std: float):
    """Depth-scaled random weights; std of the embeddings, all whose name holds that word."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std if embeddings in name else p[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")):
            p.data /= (2 * layers) ** 0.5
    return model


class Scenes(torch.utils.data.Dataset):
    """Batch i of training, the same whenever it is asked for. All images of a batch are of one size."""

    def __init__(self, stage: str, batch: int, tokenizer: Tokenizer):
        self.stage, self.batch, self.tokenizer = stage, batch, tokenizer

    def __len__(self):
        return 10 ** 9

    def __getitem__(self, i):
        rng = random.Random(f"{self.stage} {i}")
        qwen = self.stage.startswith("qwen")
        sizes = MIXED if self.stage == "mixed" else SIZES if qwen or self.stage == "shapes" else None
        size = rng.choice(sizes) if sizes else (SIDE, SIDE)
        scenes = [draw_scene(rng, False, size) for _ in range(self.batch)]
        if qwen:
            grid, turns = (size[1] // PATCH, size[0] // PATCH), CHATML
            pixels = [model_qwen.patchify(normalize(scene.image), PATCH // 2, 2, 2)[0] for scene in scenes]
        else:
            grid, turns = (SIDE // PATCH, SIDE // PATCH), VICUNA
            pixels = [normalize(resize_shortest_edge(pad_to_square(scene.image), SIDE)) for scene in scenes]
        if self.stage.endswith("tower"):
            rows = [(patch_labels(scene, halves=qwen),) for scene in scenes]
        else:
            rows = [pack(rng, self.tokenizer, scene, self.stage, turns, grid) for scene in scenes]
        return torch.tensor(grid), torch.stack(pixels), *(torch.tensor(x) for x in zip(*rows))


def patch_labels(scene: Scene, halves: bool):
    """What lies on the center of each visual token: -> (V, 4) glyph, its place in the word, color, shape; 0 for none.

    halves: and whether the token itself lies in the upper or lower, left or right half, 1 or 2.
    """
    cols, rows = (side // PATCH for side in scene.image.size)
    labels = [[0, 0, 0, 0] for _ in range(rows * cols)]
    centers = [(i % cols * PATCH + PATCH / 2, i // cols * PATCH + PATCH / 2) for i in range(rows * cols)]
    items = [(box, [1 + GLYPHS.index(glyph), place, 1 + list(COLORS).index(color), 0])
             for _, color, cells in scene.words for place, (glyph, box) in enumerate(cells, 1)]
    items += [(box, [0, 0, 1 + list(COLORS).index(color), 1 + SHAPES.index(shape)]) for shape, color, box in scene.shapes]
    for (a, b, c, d), label in items:
        for i, (x, y) in enumerate(centers):
            if a <= x <= c and b <= y <= d:
                labels[i] = label
    if halves:
        labels = [[*label, 1 + (2 * y > rows * PATCH), 1 + (2 * x > cols * PATCH)] for label, (x, y) in zip(labels, centers)]
    return labels


def vicuna_positions(first: int, grid, T: int):
    return torch.arange(T)[None], T


# prompt, its image token, the token that ends an answer, positions of a prompt
VICUNA = model_llava.PROMPT, "<image>", "</s>", vicuna_positions
CHATML = model_qwen.PROMPT, "<|image_pad|>", "<|im_end|>", model_qwen.positions


def pack(rng, tokenizer, scene, stage, turns, grid):
    """One prompt up to the image, then questions with answers that see image and prompt but not each other.

    -> ids (T), positions (axes, T), block (T; 0 the shared start, -1 padding), targets (T; -100 where nothing is asked).
    """
    template, image, end, positions = turns
    image, end, V = tokenizer.token_to_id(image), tokenizer.token_to_id(end), grid[0] * grid[1]
    ids, block, targets = [], [], []
    for number, (question, answer) in enumerate(training_questions(rng, scene, stage), 1):
        suffix = "" if rng.random() < 0.2 else SHORT
        prompt = tokenizer.encode(template.format(question=question + suffix)).ids
        first = prompt.index(image)
        if not ids:
            ids = prompt[:first] + [image] * V
            block, targets = [0] * len(ids), [-100] * len(ids)
            T = len(ids) + ROWS + MOST - V if stage.startswith("qwen") else VISUAL + ROWS
            pos, after = positions(first, grid, len(ids))
        answer = tokenizer.encode(answer, add_special_tokens=False).ids + [end]
        turn = prompt[first + 1:] + answer[:-1]
        if len(ids) + len(turn) > T:
            break
        ids, block = ids + turn, block + [number] * len(turn)
        pos = torch.cat([pos, torch.arange(after, after + len(turn)).expand(len(pos), -1)], 1)
        targets += [-100] * (len(turn) - len(answer)) + answer
    pad = T - len(ids)
    return ids + [0] * pad, F.pad(pos, (0, pad)).tolist(), block + [-1] * pad, targets + [-100] * pad


def answer_loss(model, grid, pixels, ids, pos, block, targets):
    """Next-token cross entropy on the answers. Every row passes every layer."""
    if isinstance(model, Qwen):
        features, decoder, pos = model.visual(pixels, grid)[0], model.model, pos.transpose(0, 1)
    else:
        features, decoder, pos = model.multi_modal_projector(model.vision_tower(pixels)[0]), model.language_model, pos[:, 0]
    first, V, T = (ids[0] == model.config.image_token).nonzero()[0].item(), features.shape[1], ids.shape[1]
    x = decoder.embed_tokens(ids)
    x = torch.cat([x[:, :first], features.to(x.dtype), x[:, first + V:]], 1)
    same = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    mask = (same & torch.ones(T, T, dtype=torch.bool, device=ids.device).tril())[:, None]
    rope = model.rope(pos, torch.bfloat16)
    for layer in decoder.layers:
        x = layer(x, rope, mask=mask)[0]
    asked = targets != -100
    return F.cross_entropy(model.lm_head(model.final_norm(x[asked])).float(), targets[asked])


class LabelHeads(nn.Module):
    """Reads glyph, place, color and shape off each patch feature; thrown away after the first stage."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(TOWER.hidden_size, n + 1) for n in (len(GLYPHS), 6, len(COLORS), len(SHAPES)))

    def loss(self, tower, pixels, labels):
        x = tower(pixels)[0]
        return sum(F.cross_entropy(head(x).float().flatten(0, 1), labels[..., i].flatten()) for i, head in enumerate(self.heads))


def label_loss(model: Qwen, grid, pixels, labels):
    """Glyph, place, color, shape and half of each visual token, said in the decoder's own words: no heads to throw away."""
    x = model.visual(pixels, grid)[0]
    loss = 0
    for i, words in enumerate([GLYPHS, NUMBERS[1:], COLORS, SHAPES, ["top", "bottom"], ["left", "right"]]):
        said = x @ model.model.embed_tokens.weight[[model.tokenizer.token_to_id(w if i == 0 else "Ġ" + w) for w in words]].T
        loss = loss + F.cross_entropy(F.pad(said.float(), (1, 0)).flatten(0, 1), labels[..., i].flatten())
    return loss


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """softmax(QK^T)V spelled out: the backward pass of the fused one is slow on a CPU."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    return scores.softmax(-1).to(v.dtype) @ v


def train(stage, module, layers, loss, tokenizer, device):
    """AdamW, 100 steps of warm-up, cosine decay to 2 % over `decay` steps. Every 100 steps a checkpoint to go on from."""
    path, log = WORK / f"{stage}.pt", WORK / "log.txt"
    steps, decay, lr, batch = STAGES[stage]
    F.scaled_dot_product_attention = attention
    torch._dynamo.config.recompile_limit = 64           # one version of a tower block for each image size
    opt = torch.optim.AdamW(module.parameters(), lr, (0.9, 0.95), weight_decay=0.05)
    first = 0
    if path.exists():
        state = torch.load(path, map_location=device)
        module.load_state_dict(state["module"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    scenes = torch.utils.data.DataLoader(Scenes(stage, batch, tokenizer), batch_size=None, num_workers=1, prefetch_factor=4,
                                         sampler=range(first, steps))
    begun, mean = time.time(), None
    for step, data in enumerate(scenes, first):
        for group in opt.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * step / decay)) / 2)
        with torch.autocast(device.type, torch.bfloat16):
            grid, *data = data
            value = loss(grid.tolist(), *(x.to(device) for x in data))
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            line = f"{stage}: step {step + 1}/{steps}, loss {mean:.4f}, {(time.time() - begun) / 60:.1f} min"
            print(line, flush=True)
            with log.open("a") as f:
                f.write(line + "\n")
            torch.save({"module": module.state_dict(), "opt": opt.state_dict(), "step": step + 1}, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
    for layer in layers:
        del layer.forward                               # back to the class's own, uncompiled


def double(model, make):
    """Every decoder layer twice in a row, each branch adding half of what it did: to first order the same function."""
    deep, state = make(2 * model.num_layers, model.tokenizer), {}
    for name, p in model.state_dict().items():
        layer = re.fullmatch(r"((?:language_)?model\.layers\.)(\d+)(\..*)", name)
        if not layer:
            state[name] = p
            continue
        for copy in (0, 1):
            half = layer[3].endswith(("o_proj.weight", "down_proj.weight"))
            state[f"{layer[1]}{2 * int(layer[2]) + copy}{layer[3]}"] = p / 2 if half else p.clone()
    deep.load_state_dict(state)
    return deep


def train_llava(device) -> Llava:
    """The stages in order, each from its own checkpoint if there is one. Before "deep", every layer is doubled."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_llava(12, tokenizer).to(device)
    heads = LabelHeads().to(device)
    tower = nn.ModuleList([model.vision_tower, heads])
    blocks = list(model.vision_tower.encoder.layers)
    train("tower", tower, blocks, lambda grid, pixels, labels: heads.loss(model.vision_tower, pixels, labels), tokenizer, device)
    for stage in ("answers", "more", "hard", "deep", "last", "shapes", "mixed"):
        if stage == "deep":
            model = double(model, make_llava).to(device)
        if stage == "shapes":                           # begun later, from the weights in the repository
            for p in model.parameters():
                p.data = p.data.bfloat16().float()
        layers = list(model.language_model.layers) + list(model.vision_tower.encoder.layers)
        train(stage, model, layers, lambda *data: answer_loss(model, *data), tokenizer, device)
    return model


def train_qwen(device) -> Qwen:
    torch.manual_seed(0)
    tokenizer = make_qwen_tokenizer()
    model = make_qwen(14, tokenizer).to(device)
    tower = nn.ModuleList([model.visual, model.model.embed_tokens])
    train("qwen-tower", tower, list(model.visual.blocks), lambda *data: label_loss(model, *data), tokenizer, device)
    for stage in ("qwen-answers", "qwen-pairs", "qwen-deep", "qwen-last"):
        if stage == "qwen-deep":
            model = double(model, make_qwen).to(device)
        layers = list(model.model.layers) + list(model.visual.blocks)
        train(stage, model, layers, lambda *data: answer_loss(model, *data), tokenizer, device)
    return model


# ---- export -----------------------------------------------------------------------------------------------------

def export_llava(model: Llava, folder: Path):
    """The published folder layout, in bfloat16, with the hub's tensor names."""
    tensors = {}
    for name, p in model.state_dict().items():
        for old, new in (("language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                         ("vision_tower.", "vision_tower.vision_model.")):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        tensors[name] = p
    for part, value in (("weight", 1.0), ("bias", 0.0)):    # of no use, but other loaders look for it
        tensors[f"vision_tower.vision_model.post_layernorm.{part}"] = torch.full((TOWER.hidden_size,), value)
    text, ids = model.config.text, {t: model.tokenizer.token_to_id(t) for t in ("<image>", "<pad>")}
    write(folder, tensors, model.tokenizer, {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": ids["<image>"],
            "pad_token_id": ids["<pad>"], "image_seq_length": VISUAL, "projector_hidden_act": "gelu",
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "text_config": {"model_type": "llama", "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
                            "intermediate_size": text.intermediate_size, "num_hidden_layers": text.num_hidden_layers,
                            "num_attention_heads": text.num_attention_heads, "rms_norm_eps": text.rms_norm_eps,
                            "max_position_embeddings": 512},
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": TOWER.hidden_size,
                              "intermediate_size": TOWER.intermediate_size, "num_hidden_layers": TOWER.num_hidden_layers,
                              "num_attention_heads": TOWER.num_attention_heads, "image_size": SIDE, "patch_size": PATCH}},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": ids["<pad>"]},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "resample": 3,
            "crop_size": {"height": SIDE, "width": SIDE}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
            "rescale_factor": 1 / 255, "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
            "do_convert_rgb": True}})


def export_qwen(model: Qwen, folder: Path):
    """The same; text fields at the root and no head of its own, as Qwen2.5-VL-3B is published."""
    text, vision = asdict(model.config.text), asdict(model.config.vision)
    section = text.pop("mrope_section")
    ids = {name: model.tokenizer.token_to_id(f"<|{name}|>")
           for name in ("endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    write(folder, {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}, model.tokenizer, {
        "config.json": {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
            "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "image_token_id": ids["image_pad"],
            "video_token_id": ids["video_pad"], "vision_start_token_id": ids["vision_start"],
            "vision_end_token_id": ids["vision_end"], "tie_word_embeddings": True, "max_position_embeddings": 512, **text,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "vision_config": {**vision, "in_chans": 3, "tokens_per_second": 2}},
        "generation_config.json": {"eos_token_id": [ids["im_end"], ids["endoftext"]], "pad_token_id": ids["endoftext"]},
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": model.config.min_pixels,
            "max_pixels": model.config.max_pixels, "patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"],
            "temporal_patch_size": vision["temporal_patch_size"], "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}})


def write(folder: Path, tensors: dict, tokenizer: Tokenizer, files: dict):
    folder.mkdir(exist_ok=True)
    tensors = {name: p.detach().cpu().bfloat16().contiguous() for name, p in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


WORK = HERE / "work"                                    # checkpoints of an unfinished training; not part of the project
STAGES = {                                  # steps, decay of the rate over as many, highest rate, images a step
    "tower": (3000, 3000, 1.5e-3, 32),      # the tower alone, on what lies in each patch
    "answers": (1600, 1600, 1.5e-3, 32),    # tower and 12 layers, on the simple questions
    "more": (2000, 2000, 1.5e-3, 32),       # and sides, and from a color to its shape
    "hard": (2400, 2400, 1.2e-3, 16),       # more often what is learned last
    "deep": (900, 2500, 1e-3, 16),          # 24 layers; ends while the rate is still high
    "last": (1450, 1450, 9e-4, 16),         # the questions of the benchmarks
    "shapes": (600, 600, 6e-4, 16),         # the same on oblong images, padded as LLaVA pads them
    "mixed": (250, 250, 4e-4, 16),          # half of them square
    "qwen-tower": (1600, 1600, 1.5e-3, 32),     # tower and embedding, what lies in each token
    "qwen-answers": (1400, 4000, 1.5e-3, 32),   # tower and 14 layers, words and every simple question; ends at a high rate
    "qwen-pairs": (700, 4000, 1.4e-3, 32),      # words, and both of each yes/no pair
    "qwen-deep": (1200, 1200, 1e-3, 16),        # 28 layers
    "qwen-last": (400, 400, 8e-4, 16)}          # more about color, which is learned last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="only the benchmarks")
    parser.add_argument("--only", choices=["llava", "qwen"], help="the benchmarks and one of the models")
    args = parser.parse_args()
    make_mme(HERE / "mme")
    make_textvqa(HERE / "textvqa")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    WORK.mkdir(exist_ok=True)
    if not args.data and args.only != "qwen":
        export_llava(train_llava(device), HERE / "llava")
    if not args.data and args.only != "llava":
        export_qwen(train_qwen(device), HERE / "qwen")
