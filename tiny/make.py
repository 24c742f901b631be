"""Makes everything in tiny/ from seeds: two benchmarks, a tokenizer, and a LLaVA-1.5 trained to answer them.

    python tiny/make.py            all of it; an interrupted run goes on where it stood
    python tiny/make.py --data     only the benchmarks (seconds)

Every image shows one or two words and one to four shapes at free places and sizes. The training is the ordinary one:
next-token cross entropy on the answers, every visual token in every layer. Nothing in it knows about pruning.
It takes about two hours on two CPU cores (127 minutes logged, with other work beside it); a CUDA device is used if there
is one.
"""
import argparse
import json
import math
import random
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from eval import SHORT  # noqa: E402
from model_llava import CLIP_MEAN, CLIP_STD, PROMPT, Config, Llava, TextConfig, VisionConfig, normalize  # noqa: E402

SIDE, PATCH = 112, 14
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

def draw_scene(rng: random.Random, test: bool):
    """-> image, words [(text, color, cells)], shapes [(shape, color, box)]; boxes in pixels, no two overlap."""
    while True:                                                # a crowded start may leave no room: start again
        boxes = []
        words = [(new_word(rng, test), color) for color in rng.sample(list(COLORS), rng.choice([1, 2]))]
        shapes = list(zip(rng.sample(SHAPES, rng.randint(1, 4)), rng.choices(list(COLORS), k=4)))
        sizes = [(rng.randint(14, 16) * len(text), rng.randint(19, 23)) for text, _ in words]
        sizes += [(side, side) for side in (rng.randint(16, 28) for _ in shapes)]
        for w, h in sizes:
            for _ in range(60):
                x, y = rng.randint(1, SIDE - w - 1), rng.randint(1, SIDE - h - 1)
                if all(x + w + 1 < a or c + 1 < x or y + h + 1 < b or d + 1 < y for a, b, c, d in boxes):
                    boxes.append((x, y, x + w, y + h))
                    break
        if len(boxes) == len(sizes):
            break
    image = background(rng)
    draw = ImageDraw.Draw(image)
    placed = []
    for (text, color), box in zip(words, boxes):
        placed.append((text, color, draw_word(draw, text, COLORS[color], box)))
    shapes = [(shape, color, box) for (shape, color), box in zip(shapes, boxes[len(words):])]
    for shape, color, box in shapes:
        draw_shape(draw, shape, COLORS[color], box)
    return image, placed, shapes


def new_word(rng: random.Random, test: bool) -> str:
    """Three to six glyphs. One word in eight is for test images alone, so no training image is ever a test image."""
    while True:
        word = "".join(rng.choices(GLYPHS, k=rng.choice([3, 4, 4, 5, 5, 6])))
        if word not in VOCABULARY and (zlib.crc32(word.encode()) % 8 == 0) == test:
            return word


def background(rng: random.Random) -> Image.Image:
    """Light paper with a slow gradient and a few pale strokes."""
    a, b = ([rng.randint(205, 255) for _ in range(3)] for _ in range(2))
    ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((SIDE, SIDE))
    image = Image.composite(Image.new("RGB", (SIDE, SIDE), tuple(a)), Image.new("RGB", (SIDE, SIDE), tuple(b)), ramp)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        draw.line([rng.randint(0, SIDE) for _ in range(4)], tuple(rng.randint(185, 235) for _ in range(3)), rng.randint(1, 3))
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

def ask_text(rng, words, shapes):
    return [(f"What does the {color} word say?", text) for text, color, _ in words]


def ask_existence(rng, words, shapes):
    present, absent = rng.choice(shapes)[0], rng.choice([s for s in SHAPES if s not in [x[0] for x in shapes]])
    return [(f"Is there a {present} in this image?", "Yes"), (f"Is there a {absent} in this image?", "No")]


def ask_count(rng, words, shapes):
    n = len(shapes)
    wrong = rng.choice([m for m in (n - 1, n + 1) if m > 0])
    return [(f"Are there {NUMBERS[m]} shapes in this image?", a) for m, a in ((n, "Yes"), (wrong, "No"))]


def ask_relation(rng, words, shapes):
    """About two shapes that stand well apart along the direction asked for; none such, no question."""
    pairs = []
    for i, (a, _, p) in enumerate(shapes):
        for b, _, q in shapes[:i] + shapes[i + 1:]:
            dx, dy = (q[0] + q[2] - p[0] - p[2]) / 2, (q[1] + q[3] - p[1] - p[3]) / 2
            pairs += [(a, b, "on the left side of", "on the right side of")] * (dx > 20)
            pairs += [(a, b, "above", "below")] * (dy > 20)
    if not pairs:
        return []
    a, b, right, wrong = rng.choice(pairs)
    if rng.random() < 0.5:
        a, b, right, wrong = b, a, wrong, right
    return [(f"Is the {a} {right} the {b}?", "Yes"), (f"Is the {a} {wrong} the {b}?", "No")]


def ask_color(rng, words, shapes):
    shape, color, _ = rng.choice(shapes)
    wrong = rng.choice([c for c in COLORS if c != color])
    return [(f"Is the {shape} {color}?", "Yes"), (f"Is the {shape} {wrong}?", "No")]


def ask_word(rng, words, shapes):
    """The wrong word has the right length and differs in at least two places."""
    text, color, _ = rng.choice(words)
    wrong = text
    while sum(a != b for a, b in zip(text, wrong)) < 2:
        wrong = "".join(rng.choices(GLYPHS, k=len(text)))
    return [(f'Is the {color} word "{text}"?', "Yes"), (f'Is the {color} word "{wrong}"?', "No")]


def ask_side(rng, words, shapes):
    """About the half of the image a shape lies in, if it is clear of the middle."""
    shape, _, (a, b, c, d) = rng.choice(shapes)
    pairs = []
    for near, first, second in ((a + c, "on the left side", "on the right side"), (b + d, "at the top", "at the bottom")):
        pairs += [(first, second)] * (near < SIDE - 16) + [(second, first)] * (near > SIDE + 16)
    if not pairs:
        return []
    right, wrong = rng.choice(pairs)
    return [(f"Is the {shape} {right} of this image?", "Yes"), (f"Is the {shape} {wrong} of this image?", "No")]


HALVES = [(0, "on the left side"), (1, "at the top")]


def ask_half(rng, words, shapes, halves=HALVES):
    """About two shapes, one clear of the middle to the left or the top, one to the right or the bottom."""
    axis, where = rng.choice(halves)
    first = [shape for shape, _, box in shapes if box[axis] + box[axis + 2] < SIDE - 16]
    second = [shape for shape, _, box in shapes if box[axis] + box[axis + 2] > SIDE + 16]
    if not first or not second:
        return []
    return [(f"Is the {rng.choice(half)} {where} of this image?", answer) for half, answer in ((first, "Yes"), (second, "No"))]


def ask_top(rng, words, shapes):
    """Top and bottom alone: what the finished model knows well enough to be asked."""
    return ask_half(rng, words, shapes, HALVES[1:])


def ask_digit(rng, words, shapes):
    """About two words of which one starts with a digit; nothing about others."""
    asked = sorted((first_character(*word) for word in words), key=lambda pair: pair[1] == "No")
    return asked if len({answer for _, answer in asked}) == 2 else []


def ask_any_digit(rng, words, shapes):
    """The same about any word, most of those that start with a letter left out."""
    return [first_character(*word) for word in words if word[0][0].isdigit() or rng.random() < 0.3]


def first_character(text, color, _):
    return f"Is the first character of the {color} word a digit?", "Yes" if text[0].isdigit() else "No"


def ask_length(rng, words, shapes):
    """How many glyphs a word has, or one more or fewer."""
    text, color, _ = rng.choice(words)
    wrong = rng.choice([m for m in (len(text) - 1, len(text) + 1) if 3 <= m <= 6])
    return [(f"Are there {NUMBERS[m]} characters in the {color} word?", a) for m, a in ((len(text), "Yes"), (wrong, "No"))]


def ask_letter(rng, words, shapes):
    """The step before a whole word: one of its glyphs."""
    text, color, _ = rng.choice(words)
    wrong = rng.choice([g for g in GLYPHS if g not in text])
    return [(f'Is there a "{g}" in the {color} word?', answer) for g, answer in ((rng.choice(text), "Yes"), (wrong, "No"))]


def ask_open(rng, words, shapes):
    """Answered with a word instead of yes or no."""
    shape, color, _ = rng.choice(shapes)
    return [(f"What color is the {shape}?", color), ("How many shapes are in this image?", NUMBERS[len(shapes)])]


def ask_more(rng, words, shapes):
    """Where things lie, and the ways back: from a color to its shape, from a word to its color."""
    shape, color, (a, b, c, d) = rng.choice(shapes)
    text, hue, _ = rng.choice(words)
    place = ("top" if b + d < SIDE else "bottom") + (" left" if a + c < SIDE else " right")
    asked = [(f"Where is the {shape}?", place), (f'What color is the word "{text}"?', hue)]
    return asked + [(f"What shape is {color}?", shape)] * (sum(x[1] == color for x in shapes) == 1)


MME = {"existence": ask_existence, "count": ask_count, "position": ask_top, "color": ask_color, "OCR": ask_digit}

# Of these pairs, which stage of the training asks one question and which both; see STAGES.
ONE = {"answers": [ask_existence, ask_count, ask_relation, ask_color, ask_word], "last": [ask_existence, ask_count, ask_color]}
ONE["more"] = ONE["hard"] = ONE["deep"] = ONE["answers"] + [ask_side]
BOTH = {"answers": [], "more": [], "hard": [ask_relation, ask_word, ask_side, ask_letter], "deep": [ask_side, ask_length],
        "last": [ask_half, ask_half, ask_any_digit]}


def training_questions(rng, words, shapes, stage):
    """Every word, open questions and yes/no pairs in random order; from the third stage on the words come first."""
    text = ask_text(rng, words, shapes)
    asked = ask_open(rng, words, shapes) if stage in ("answers", "more", "hard") else []
    asked = text + asked if stage in ("answers", "more") else asked
    asked += ask_more(rng, words, shapes) if stage != "answers" else []
    for ask in ONE[stage]:
        pair = ask(rng, words, shapes)
        asked += [rng.choice(pair)] if pair else []
    for ask in BOTH[stage]:
        asked += ask(rng, words, shapes)
    rng.shuffle(asked)
    return asked if stage in ("answers", "more") else text + asked


# ---- benchmarks -------------------------------------------------------------------------------------------------

def make_mme(folder: Path):
    """The official MME layout: 40 images a subtask, each with a question for Yes and one for No."""
    for subtask, ask in MME.items():
        (folder / subtask).mkdir(parents=True, exist_ok=True)
        rng, number = random.Random(f"mme {subtask}"), 0
        while number < 40:
            image, words, shapes = draw_scene(rng, test=True)
            pair = ask(rng, words, shapes)
            if pair:
                number += 1
                image.save(folder / subtask / f"{number:04}.jpg", quality=95, subsampling=0)
                (folder / subtask / f"{number:04}.txt").write_text(
                    "".join(f"{question} Please answer yes or no.\t{answer}\n" for question, answer in pair))


def make_textvqa(folder: Path):
    """The official TextVQA layout: 160 images, a question about each of their words, ten annotators of one mind."""
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    rng, data = random.Random("textvqa"), []
    for number in range(160):
        image, words, shapes = draw_scene(rng, test=True)
        image.save(folder / "train_images" / f"{number:04}.jpg", quality=95, subsampling=0)
        for question, text in ask_text(rng, words, shapes):
            data.append({"question": question, "image_id": f"{number:04}", "question_id": len(data),
                         "answers": [text] * 10})
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_version": "0.5.1", "data": data}, indent=0) + "\n")


# ---- tokenizer --------------------------------------------------------------------------------------------------

def make_tokenizer() -> Tokenizer:
    """LLaMA's tokenizer.json in small: same normaliser, BOS and special tokens; a token per template word, else per character.

    The two sentences that stand in every prompt are a token each, so that the small decoder spends its time elsewhere.
    """
    characters = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    sentences = [PROMPT.split(" USER")[0], SHORT.strip()]
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


# ---- training ---------------------------------------------------------------------------------------------------

TOWER = VisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
                     image_size=SIDE, patch_size=PATCH)
VISUAL = (SIDE // PATCH) ** 2
LENGTH = VISUAL + 148                       # rows of a training sequence: prompt, image and as many questions as fit


def make_model(layers: int, tokenizer: Tokenizer) -> Llava:
    """Depth-scaled random start; the last CLIP block is used (feature layer -1), so no weight in the file is idle."""
    text = TextConfig(vocab_size=-(-tokenizer.get_vocab_size() // 32) * 32, hidden_size=128, intermediate_size=344,
                      num_hidden_layers=layers, num_attention_heads=4, rms_norm_eps=1e-5)
    model = Llava(Config(text, TOWER, tokenizer.token_to_id("<image>"), vision_feature_layer=-1), tokenizer, {2})
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02 if "embed" in name else p[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            p.data /= (2 * layers) ** 0.5
    return model


class Scenes(torch.utils.data.Dataset):
    """Batch i of training, the same whenever it is asked for."""

    def __init__(self, stage: str, batch: int, tokenizer: Tokenizer):
        self.stage, self.batch, self.tokenizer = stage, batch, tokenizer

    def __len__(self):
        return 10 ** 9

    def __getitem__(self, i):
        rng = random.Random(f"{self.stage} {i}")
        scenes = [draw_scene(rng, test=False) for _ in range(self.batch)]
        pixels = torch.stack([normalize(image) for image, _, _ in scenes])
        rows = [patch_labels(*s[1:]) if self.stage == "tower" else pack(rng, self.tokenizer, *s[1:], self.stage) for s in scenes]
        return pixels, *(torch.tensor(x) for x in zip(*rows))


def patch_labels(words, shapes):
    """What lies on the center of each patch: -> (V, 4) glyph, its place in the word, color, shape; 0 for none."""
    labels = [[0, 0, 0, 0] for _ in range(VISUAL)]
    centers = [(i % (SIDE // PATCH) * PATCH + PATCH / 2, i // (SIDE // PATCH) * PATCH + PATCH / 2) for i in range(VISUAL)]
    items = [(box, [1 + GLYPHS.index(glyph), place, 1 + list(COLORS).index(color), 0])
             for _, color, cells in words for place, (glyph, box) in enumerate(cells, 1)]
    items += [(box, [0, 0, 1 + list(COLORS).index(color), 1 + SHAPES.index(shape)]) for shape, color, box in shapes]
    for (a, b, c, d), label in items:
        for i, (x, y) in enumerate(centers):
            if a <= x <= c and b <= y <= d:
                labels[i] = label
    return (labels,)


def pack(rng, tokenizer, words, shapes, stage):
    """One prompt up to the image, then questions with answers that see image and prompt but not each other.

    -> ids (T), positions (T), block (T; 0 the shared start, -1 padding), targets (T; -100 where nothing is asked).
    """
    ids, pos, block, targets = [], [], [], []
    for number, (question, answer) in enumerate(training_questions(rng, words, shapes, stage), 1):
        suffix = "" if rng.random() < 0.2 else SHORT
        prompt = tokenizer.encode(PROMPT.format(question=question + suffix)).ids
        start = prompt.index(tokenizer.token_to_id("<image>"))
        if not ids:
            ids = prompt[:start] + [prompt[start]] * VISUAL
            pos, block, targets = list(range(len(ids))), [0] * len(ids), [-100] * len(ids)
        answer = tokenizer.encode(answer, add_special_tokens=False).ids + [2]
        turn = prompt[start + 1:] + answer[:-1]
        if len(ids) + len(turn) > LENGTH:
            break
        first = start + VISUAL
        ids, pos, block = ids + turn, pos + list(range(first, first + len(turn))), block + [number] * len(turn)
        targets += [-100] * (len(turn) - len(answer)) + answer
    pad = LENGTH - len(ids)
    return ids + [0] * pad, pos + [0] * pad, block + [-1] * pad, targets + [-100] * pad


def answer_loss(model, pixels, ids, pos, block, targets):
    """Next-token cross entropy on the answers. Every row passes every layer."""
    features = model.multi_modal_projector(model.vision_tower(pixels)[0])
    start = (ids[0] == model.config.image_token).nonzero()[0].item()
    x = model.language_model.embed_tokens(ids)
    x = torch.cat([x[:, :start], features.to(x.dtype), x[:, start + VISUAL:]], 1)
    same = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    mask = (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=ids.device).tril())[:, None]
    rope = model.rope(pos, torch.bfloat16)
    for layer in model.language_model.layers:
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


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """softmax(QK^T)V spelled out: the backward pass of the fused one is slow on a CPU."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    return scores.softmax(-1).to(v.dtype) @ v


def train(stage, module, layers, loss, steps, decay, lr, batch, tokenizer, device):
    """AdamW, 100 steps of warm-up, cosine decay to 2 % over `decay` steps. Every 100 steps a checkpoint to go on from."""
    path, log = WORK / f"{stage}.pt", WORK / "log.txt"
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
            value = loss(*(x.to(device) for x in data))
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


def double(model: Llava, tokenizer) -> Llava:
    """Every decoder layer twice in a row, each branch adding half of what it did: to first order the same function."""
    deep = make_model(2 * model.num_layers, tokenizer)
    state = {}
    for name, p in model.state_dict().items():
        part = name.split(".")
        if part[:2] != ["language_model", "layers"]:
            state[name] = p
            continue
        for copy in (0, 1):
            part[2] = str(2 * int(name.split(".")[2]) + copy)
            state[".".join(part)] = p / 2 if part[-2] in ("o_proj", "down_proj") else p.clone()
    deep.load_state_dict(state)
    return deep


def train_llava(device) -> Llava:
    """The stages in order, each from its own checkpoint if there is one. Before the last, every layer is doubled."""
    F.scaled_dot_product_attention = attention
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(12, tokenizer).to(device)
    heads = LabelHeads().to(device)
    tower = nn.ModuleList([model.vision_tower, heads])
    blocks = list(model.vision_tower.encoder.layers)
    train("tower", tower, blocks, lambda pixels, labels: heads.loss(model.vision_tower, pixels, labels),
          *STAGES["tower"], tokenizer, device)
    for stage in ("answers", "more", "hard", "deep", "last"):
        if stage == "deep":
            model = double(model, tokenizer).to(device)
        layers = list(model.language_model.layers) + list(model.vision_tower.encoder.layers)
        train(stage, model, layers, lambda *data: answer_loss(model, *data), *STAGES[stage], tokenizer, device)
    return model


# ---- export -----------------------------------------------------------------------------------------------------

def export(model: Llava, tokenizer: Tokenizer, folder: Path):
    """The published folder layout, in bfloat16, with the hub's tensor names."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, p in model.state_dict().items():
        for old, new in (("language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                         ("vision_tower.", "vision_tower.vision_model.")):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        tensors[name] = p.detach().cpu().bfloat16().contiguous()
    for part, value in (("weight", 1.0), ("bias", 0.0)):    # of no use, but other loaders look for it
        tensors[f"vision_tower.vision_model.post_layernorm.{part}"] = torch.full((TOWER.hidden_size,), value).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    text, ids = model.config.text, {t: tokenizer.token_to_id(t) for t in ("<image>", "<pad>")}
    files = {
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
            "do_convert_rgb": True}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


WORK = HERE / "work"                                    # checkpoints of an unfinished training; not part of the project
STAGES = {                                  # steps, decay of the rate over as many, highest rate, images a step
    "tower": (3000, 3000, 1.5e-3, 32),      # the tower alone, on what lies in each patch
    "answers": (1600, 1600, 1.5e-3, 32),    # tower and 12 layers, on the simple questions
    "more": (2000, 2000, 1.5e-3, 32),       # and sides, and from a color to its shape
    "hard": (2400, 2400, 1.2e-3, 16),       # more often what is learned last
    "deep": (900, 2500, 1e-3, 16),          # 24 layers; ends while the rate is still high
    "last": (1450, 1450, 9e-4, 16)}         # the questions of the benchmarks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="only the benchmarks, not the model")
    only_data = parser.parse_args().data
    make_mme(HERE / "mme")
    make_textvqa(HERE / "textvqa")
    if not only_data:
        WORK.mkdir(exist_ok=True)
        export(train_llava(torch.device("cuda" if torch.cuda.is_available() else "cpu")), make_tokenizer(), HERE / "llava")
