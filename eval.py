"""How much of a vision-language model's score is left when a method prunes its visual tokens.

    python eval.py --layer 20 --ratio 0.9                  every method on the built-in model and benchmarks
    python eval.py --layer all --ratio 0.9 --plot c.png    score against layer, a method a line
    python eval.py --image cat.jpg --question "Is there a cat?" --layer 20 --ratio 0.9

In this order: benchmarks (files, prompt, score), the one loop over questions, statistics, report, pictures, command line.
"""
import argparse
import hashlib
import json
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import model_llava
from tokprune import (METHODS, NEED_A_LAYER, InputError, check_method, count, flops, keep_one, mean_visual_tokens, parse_schedule,
                      per_token, prefill, prune, visual_tokens)

HERE = Path(__file__).resolve().parent
MODELS = {"llava": model_llava}                         # config.json's model_type -> the file that implements it


# ---- benchmarks -------------------------------------------------------------------------------------------------

@dataclass
class Question:
    id: str                     # unique within its benchmark
    image: Path
    prompt: str                 # what follows the image
    answers: list[str]          # gold
    group: str = ""             # MME's subtask

    @property
    def seed(self) -> int:
        """Random draws depend on the question alone, not on which others are asked."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    @property
    def gold(self) -> str:
        """The answer whose information is measured: the best-scoring of the normalised ten, or Yes or No."""
        if len(self.answers) == 1:
            return self.answers[0]
        return max(map(normalise, self.answers), key=lambda a: soft_accuracy(a, self))


SHORT = "\nAnswer the question using a single word or phrase."          # LLaVA's evaluation prompt for MME and TextVQA
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def load_mme(root: Path) -> list[Question]:
    """The official folders (arXiv 2306.13394): a subtask each, a text of two lines beside an image or in its own folder."""
    folders = [f for f in sorted(root.rglob("*")) if f.is_dir() and f.name in PERCEPTION + COGNITION and "__MACOSX" not in f.parts]
    questions = []
    for folder in folders:
        images = {p.stem: p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")}
        for file in sorted(folder.rglob("*.txt")):
            if file.stem not in images:
                raise InputError(f"{file}: no image {file.stem}.jpg or .png beside it")
            lines = [line.rstrip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
            for i, line in enumerate(lines):
                question, tab, answer = line.partition("\t")
                if not tab or answer.strip() not in ("Yes", "No"):
                    raise InputError(f"{file}, line {i + 1}: {line!r}, want question<TAB>Yes or question<TAB>No")
                questions.append(Question(f"{folder.name}/{file.stem}/{i}", images[file.stem],
                                          question.removesuffix("Please answer yes or no.").rstrip() + SHORT,
                                          [answer.strip()], folder.name))
    return questions


def parse_yes_no(answer: str) -> str:
    """MME's calculation.py: the whole answer, else what its first four characters hold."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    return "yes" if "yes" in answer[:4] else "no" if "no" in answer[:4] else "other"


def score_mme(answer: str, question: Question) -> float:
    return float(parse_yes_no(answer) == question.answers[0].lower())


def load_textvqa(root: Path) -> list[Question]:
    """TextVQA_0.5.1_val.json (arXiv 1904.08920) and train_images/; the prompt carries no OCR tokens, as in lmms-eval."""
    file = next(iter(sorted(root.rglob("TextVQA_0.5.1_val.json"))), None)
    if file is None:
        return []
    images = next((f for f in (file.parent / "train_images", *sorted(root.rglob("train_images"))) if f.is_dir()), None)
    if images is None:
        raise InputError(f"{root}: {file.name} is here, its folder train_images is not")
    questions = []
    for entry in model_llava.read_json(file).get("data", []):
        if len(entry["answers"]) != 10:
            raise InputError(f"{file}: question {entry['question_id']} has {len(entry['answers'])} answers, want 10")
        questions.append(Question(str(entry["question_id"]), images / f"{entry['image_id']}.jpg",
                                  entry["question"].capitalize() + SHORT, entry["answers"]))
    return questions


def soft_accuracy(answer: str, question: Question) -> float:
    """VQA soft accuracy: 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 and more of the ten annotators agreeing."""
    agreeing = sum(normalise(a) == normalise(answer) for a in question.answers)
    return min(1.0, round(0.3 * agreeing, 1))


ARTICLES = {"a", "an", "the"}
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTIONS = {full[:i] + full[i + 1:]: full for full in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've""".split() for i, character in enumerate(full) if character == "'"} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """The official answer normaliser of TextVQA (mmf, EvalAIAnswerProcessor), its quirks included."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = seen = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        alone = f"{mark} " in seen or f" {mark}" in seen or re.search(r"\d,\d", seen)
        text = text.replace(mark, "" if alone else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(w, w) for w in text.split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


BENCHMARKS = {"mme": (load_mme, score_mme), "textvqa": (load_textvqa, soft_accuracy)}


def load_benchmark(name: str, data: Path, limit: int | None, seed: int) -> list[Question]:
    """All questions, or about `limit`, drawn by seed; the questions of an image stay together."""
    questions = BENCHMARKS[name][0](data)
    if not questions:
        raise InputError(f"--data {data}: no {name} found in it")
    missing = next((q for q in questions if not q.image.exists()), None)
    if missing:
        raise InputError(f"{missing.image}: not found; question {missing.id} of {name} is about it")
    if limit is None or limit >= len(questions):
        return questions
    images = sorted({q.image for q in questions})
    random.Random(seed).shuffle(images)
    chosen, room = set(), limit
    for image in images:
        chosen.add(image)
        room -= sum(q.image == image for q in questions)
        if room <= 0:
            break
    return [q for q in questions if q.image in chosen]


# ---- the one loop -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """A schedule run with one seed. The empty schedule is the unpruned model."""
    row: str                    # the name of its row in the table
    schedule: tuple
    seed: int

    @property
    def key(self) -> str:
        """What its answers stand under in answers.jsonl."""
        stages = [f"{method}@{layer}" + (f"={amount}" if isinstance(amount, int) else f":{amount}") for layer, method, amount in self.schedule]
        return " ".join(stages + [f"seed {self.seed}"]) if stages else "unpruned"


def answer_cells(model, question: Question, pixels, cells: list[Cell], args, clock) -> dict:
    """The answer of every cell to one question, and how many visual and text rows its prompt has.

    The unpruned stream runs once; at each layer where a schedule begins, pruned copies of it go through the rest. Cells
    that keep equally many tokens at the same layers are one batch of variants.
    """
    stream = model.begin(pixels, question.prompt)
    N = stream.visual[1]
    stages = [stage for cell in cells for stage in cell.schedule]
    at, s = {}, stream
    for layer in sorted({layer for layer, _, _ in stages}):
        s = at[layer] = model.run(s, stop=layer)
    full = model.run(s)
    with clock("oracle"):
        oracle = {layer: per_token(keep_one(model, at[layer], full, model.answer_id(question.gold)), full.grid)
                  for layer in {layer for layer, method, _ in stages if method == "info"}}
    batches = defaultdict(list)
    for cell in cells:
        batches[tuple((layer, count(amount, N)) for layer, _, amount in cell.schedule)].append(cell)
    answers = {}
    for plan, batch in batches.items():
        s = at[plan[0][0]] if plan else full
        for i, (layer, n) in enumerate(plan):
            s = prune(model, model.run(s, stop=layer), [cell.schedule[i][1] for cell in batch], n,
                      [cell.seed + question.seed for cell in batch], oracle.get(layer), args.positions)
        answers |= dict(zip([cell.key for cell in batch], model.decode(model.run(s), args.max_new_tokens)))
    return {"answers": answers, "visual_tokens": N, "text_rows": stream.x.shape[1] - N}


def evaluate(model, benchmark: str, questions: list[Question], cells: list[Cell], args, clock, out: Path) -> list[dict]:
    """Every question in every cell, a line each appended to out/answers.jsonl as it comes; what stands there is not asked again."""
    file, score = out / "answers.jsonl", BENCHMARKS[benchmark][1]
    done = {line["id"]: line for line in read_answers(file) if line["benchmark"] == benchmark}
    started, asked, right = time.time(), 0, 0.0
    with file.open("a", encoding="utf-8") as f:
        for i, question in enumerate(questions, 1):
            if question.id not in done:
                with clock("questions"):
                    line = answer_cells(model, question, model.preprocess(read_image(question.image)), cells, args, clock)
                scores = {key: score(answer, question) for key, answer in line["answers"].items()}
                done[question.id] = {"benchmark": benchmark, "id": question.id, **line, "scores": scores}
                f.write(json.dumps(done[question.id], ensure_ascii=False) + "\n")
                f.flush()
                asked += 1
            right += done[question.id]["scores"][cells[0].key]
            progress(f"{benchmark} {i}/{len(questions)}  unpruned {100 * right / i:.1f}  {asked / (time.time() - started):.1f}/s")
    progress("")
    return [done[question.id] for question in questions]


def read_answers(file: Path) -> list[dict]:
    """The lines of an earlier run; a half-written last one is cut off, so that its question is asked again."""
    if not file.exists():
        return []
    whole = file.read_bytes()
    whole = whole[:whole.rfind(b"\n") + 1]
    with file.open("r+b") as f:
        f.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def read_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except OSError as e:                                # Pillow's own errors are OSErrors too
        raise InputError(f"{path}: cannot be read as an image ({e})")
    return image


class Clock:
    """Seconds spent under each name, the device's queue included."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.open = device, defaultdict(float), []

    def __call__(self, name: str):
        self.open.append([name, 0.0])
        return self

    def __enter__(self):
        self.open[-1][1] = self.now()

    def __exit__(self, *_):
        name, start = self.open.pop()
        self.seconds[name] += self.now() - start

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def progress(line: str):
    """Overwrites itself; silent where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---- statistics -------------------------------------------------------------------------------------------------

def standard_error(scores: np.ndarray, image: np.ndarray) -> float:
    """Of the mean, clustered by image: questions about one image are not independent."""
    sums = np.bincount(image, scores - scores.mean())
    return float(np.sqrt((sums ** 2).sum() * len(sums) / max(len(sums) - 1, 1)) / len(scores))


def paired_difference(scores: np.ndarray, other: np.ndarray, image: np.ndarray) -> tuple[float, float, float]:
    """Mean of scores - other on the same questions, and its 95 % interval: percentile bootstrap over images, fixed seed."""
    sums, sizes = np.bincount(image, scores - other), np.bincount(image)
    draws = np.random.default_rng(0).integers(0, len(sums), (2000, len(sums)))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    return float((scores - other).mean()), *np.percentile(means, [2.5, 97.5]).tolist()


def mme_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """100 (acc + acc+) of each subtask, and their sums; acc+ counts images with both questions right."""
    subtasks = {}
    for group in sorted({q.group for q in questions}):
        pairs = defaultdict(list)
        for q, s in zip(questions, scores):
            if q.group == group:
                pairs[q.image].append(s)
        right = [s for pair in pairs.values() for s in pair]
        subtasks[group] = 100 * (sum(right) / len(right) + np.mean([min(pair) for pair in pairs.values()]))
    return {"perception": float(sum(v for k, v in subtasks.items() if k in PERCEPTION)),
            "cognition": float(sum(v for k, v in subtasks.items() if k in COGNITION)), "subtasks": subtasks}


def summarise(model, benchmark: str, questions: list[Question], done: list[dict], cells: list[Cell]) -> list[dict]:
    """A row for each schedule, its seeds averaged: score and differences in percent, tokens, FLOPs."""
    places = {path: i for i, path in enumerate(sorted({q.image for q in questions}))}
    image = np.array([places[q.image] for q in questions])
    scores, names, L = defaultdict(list), {}, model.num_layers
    for cell in cells:
        names[cell.schedule] = cell.row
        scores[cell.schedule].append([line["scores"][cell.key] for line in done])
    scores = {schedule: 100 * np.mean(seeds, 0) for schedule, seeds in scores.items()}
    rows = []
    for schedule, s in scores.items():
        baseline = tuple((layer, "random", amount) for layer, _, amount in schedule)
        tokens = [visual_tokens(schedule, line["visual_tokens"], L) for line in done]
        rows.append({
            "method": names[schedule], "layer": schedule[0][0] if schedule else None, "score": float(s.mean()),
            "standard_error": standard_error(s, image),
            "minus_unpruned": paired_difference(s, scores[()], image) if schedule else None,
            "minus_random": paired_difference(s, scores[baseline], image) if baseline in scores and baseline != schedule else None,
            "kept": float(np.mean([t[-1] for t in tokens])), "mean_visual_tokens": float(np.mean(tokens)),
            "gflops": float(np.mean([flops(model.config.text, [line["text_rows"] + v for v in t])
                                     for line, t in zip(done, tokens)])) / 1e9,
            **({"mme": mme_totals(questions, s / 100)} if benchmark == "mme" else {})})
    return rows


def time_prefill(model, question: Question, cells: list[Cell], args, clock, rounds: int = 7) -> dict:
    """Median milliseconds from the input of layer 0 to the first logits, by schedule, alone in its batch; the oracle is not timed."""
    stream = model.begin(read_image(question.image), question.prompt)
    schedules = [s for s in dict.fromkeys(cell.schedule for cell in cells) if "info" not in [method for _, method, _ in s]]
    spent = defaultdict(list)
    for _ in range(rounds + 1):                         # the first round warms up
        for schedule in schedules:
            start = clock.now()
            model.logits(prefill(model, stream, schedule, positions=args.positions))
            spent[schedule].append(1000 * (clock.now() - start))
    return {schedule: float(np.median(ms[1:])) for schedule, ms in spent.items()}


# ---- report -----------------------------------------------------------------------------------------------------

def print_table(benchmark: str, rows: list[dict]):
    """One layer: a row a method, everything known. Several layers: a row a layer, a method a column, scores alone."""
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None and row["method"] in METHODS})
    if len(layers) > 1:
        methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
        by = {(row["method"], row["layer"]): f"{row['score']:.1f}" for row in rows}
        for row in rows:
            if row["method"] not in METHODS:
                print(f"{benchmark}, {row['method']}: {row['score']:.1f}")
        print(f"\n| {benchmark}, layer | " + " | ".join(methods) + " |\n|---:" * 1 + "|---:" * len(methods) + "|")
        for layer in layers:
            print(f"| {layer} | " + " | ".join(by.get((m, layer), "-") for m in methods) + " |")
        print()
        return
    mme = " MME |" if benchmark == "mme" else ""
    print(f"\n| {benchmark} | score | ± |{mme} - unpruned | - random | kept | mean tokens | GFLOPs | prefill ms |")
    print("|---|" + "---:|" * (8 + bool(mme)))
    for row in rows:
        total = f" {row['mme']['perception'] + row['mme']['cognition']:.0f} |" if mme else ""
        print(f"| {row['method']} | {row['score']:.1f} | {row['standard_error']:.1f} |{total} {difference(row['minus_unpruned'])} | "
              f"{difference(row['minus_random'])} | {row['kept']:g} | {row['mean_visual_tokens']:.1f} | {row['gflops']:.3g} | "
              f"{'-' if row['prefill_ms'] is None else format(row['prefill_ms'], '.1f')} |")
    print()


def difference(values) -> str:
    return "-" if values is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values)


# ---- pictures ---------------------------------------------------------------------------------------------------

INK = dict(zip(METHODS, ["#7f7f7f", "#d62728", "#ff7f0e", "#2ca02c", "#1f77b4", "#9467bd", "#111111"]))


def plot(report: dict, path: Path):
    """Score against layer, a panel a benchmark, a method a line; dashed: the unpruned model, and the one without image."""
    width, height, left, top = 620, 380, 60, 46
    picture = Image.new("RGB", (width * len(report), height + 30), "white")
    draw, font, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(12)
    for panel, (benchmark, rows) in enumerate(report.items()):
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 110, top, height - 40
        layers = sorted({row["layer"] for row in rows if row["method"] in METHODS})
        low, high = layers[0] - 0.5, layers[-1] + 0.5

        def place(layer, score):
            return x0 + (layer - low) / (high - low) * (x1 - x0), y1 - score / 100 * (y1 - y0)
        draw.text(((x0 + x1) / 2, 18), benchmark, "black", font, anchor="mm")
        draw.text(((x0 + x1) / 2, height - 4), "pruned at the input of layer", "black", small, anchor="mm")
        for score in range(0, 101, 20):
            x, y = place(low, score)
            draw.line((x0, y, x1, y), "#e4e4e4")
            draw.text((x - 8, y), f"{score}", "black", small, anchor="rm")
        for layer in layers[::-(-len(layers) // 12)]:
            draw.text((place(layer, 0)[0], y1 + 12), f"{layer}", "black", small, anchor="mm")
        for row in rows:
            if row["method"] in ("unpruned", "no image"):
                y = place(low, row["score"])[1]
                for x in range(x0, x1, 8):
                    draw.line((x, y, x + 4, y), "black")
                draw.text((x1 + 6, y), row["method"], "black", small, anchor="lm")
        lines = {m: [(row["layer"], row["score"]) for row in rows if row["method"] == m] for m in METHODS}
        for i, (method, points) in enumerate((m, p) for m, p in lines.items() if p):
            dots = [place(*point) for point in sorted(points)]
            draw.line(dots, INK.get(method, "#8c564b"), 2, joint="curve")
            for x, y in dots:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), INK.get(method, "#8c564b"))
            y = (y0 + y1) / 2 - 50 + 17 * i
            draw.line((x1 + 6, y, x1 + 24, y), INK.get(method, "#8c564b"), 3)
            draw.text((x1 + 30, y), method, "black", small, anchor="lm")
    picture.save(path)


def overlay(canvas: Image.Image, panels: list[tuple[str, list[int] | None]], grid: tuple[int, int], path: Path):
    """The image once per panel (caption, kept tokens or None for all); what was dropped is dimmed."""
    rows, cols = grid
    side = 224
    canvas = canvas.resize((side, round(side * canvas.height / canvas.width)), Image.BICUBIC)
    across = min(4, len(panels))
    picture = Image.new("RGB", (across * (side + 8), -(-len(panels) // across) * (canvas.height + 28)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    dim = Image.blend(canvas, Image.new("RGB", canvas.size, "white"), 0.8)
    for i, (caption, kept) in enumerate(panels):
        panel = canvas if kept is None else dim.copy()
        for token in kept or []:
            r, c = divmod(token, cols)
            box = tuple(round(v) for v in (c * side / cols, r * canvas.height / rows,
                                           (c + 1) * side / cols, (r + 1) * canvas.height / rows))
            panel.paste(canvas.crop(box), box)
        x, y = i % across * (side + 8), i // across * (canvas.height + 28)
        picture.paste(panel, (x + 4, y + 24))
        draw.text((x + 6, y + 12), caption, "black", font, anchor="lm")
    picture.save(path)


def show_image(model, args, cells: list[Cell], out: Path) -> dict:
    """One picture, one question: the answer with and without each pruning, and an overlay of what was kept."""
    image = read_image(Path(args.image))
    stream = model.begin(image, args.question)
    report, panels = {}, []
    for cell in cells:
        s = prefill(model, stream, cell.schedule, cell.seed, args.positions)
        answer = report[cell.key] = model.decode(s, args.max_new_tokens)[0]
        kept = s.origin[0].tolist() if cell.schedule else None
        panels.append((f"{cell.row}: {answer}", kept))
        print(f"{cell.row:12} {s.visual[1]:5} visual tokens    {answer}")
    overlay(model.canvas(image), panels, stream.grid, out / "overlay.png")
    print(f"overlay: {out / 'overlay.png'}")
    return {"question": args.question, "answers": report}


# ---- command line -----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse_arguments(argv) -> argparse.Namespace:
    p = Parser(prog="eval.py", description="Scores of a vision-language model with its visual tokens pruned.")
    p.add_argument("--model", default=HERE / "tiny" / "llava", type=Path, help="checkpoint folder (default: tiny/llava)")
    p.add_argument("--data", default=HERE / "tiny", type=Path, help="folder that holds the benchmarks (default: tiny)")
    p.add_argument("--bench", default=",".join(BENCHMARKS), help="comma-separated (default: %(default)s)")
    p.add_argument("--method", default=None, help=f"comma-separated, of {', '.join(METHODS)} (default: all)")
    p.add_argument("--layer", default="20", help="0-based layer at whose input tokens leave: one, several as 2,10,20, or all (default: 20)")
    p.add_argument("--ratio", default="0.9", help="fraction of the visual tokens removed, 0 to 1 (default: 0.9)")
    p.add_argument("--schedule", action="append", metavar="S", help="instead of layer, ratio and method: 'dart@2=252 random@20:0.9'; repeatable")
    p.add_argument("--limit", type=int, metavar="N", help="about N questions a benchmark, drawn by seed, whole images (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of random pruning and of --limit (default: 0)")
    p.add_argument("--seeds", type=int, default=3, help="how many seeds random is averaged over (default: 3)")
    p.add_argument("--out", type=Path, help="folder for answers and pictures; an interrupted run goes on there (default: runs/<flags>)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on cuda, float32 on cpu)")
    p.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="(default: 16)")
    p.add_argument("--positions", choices=["keep", "compact"], default="keep", help="of the kept tokens: original or renumbered (default: keep)")
    p.add_argument("--plot", type=Path, metavar="PNG", help="score against layer, as a picture")
    p.add_argument("--image", type=Path, help="one picture instead of the benchmarks; with --question")
    p.add_argument("--question", help="what to ask about --image")
    return p.parse_args(argv)


def parse_cells(args, num_layers: int) -> list[Cell]:
    """The rows of the table: the unpruned model, no image at all, then each method at each layer, or the schedules given."""
    for flag in ("limit", "seeds", "max_new_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')}: {value}, want 1 or more")
    if args.schedule:
        schedules = [(text, parse_schedule(text)) for text in args.schedule]
        schedules += [("random at the same layers", [(layer, "random", amount) for layer, _, amount in s]) for _, s in schedules]
        schedules = [(name, tuple(s)) for name, s in schedules]
    else:
        try:
            ratio = float(args.ratio)
            layers = list(range(num_layers)) if args.layer == "all" else [int(x) for x in args.layer.split(",")]
        except ValueError:
            raise InputError(f"--layer {args.layer} --ratio {args.ratio}: want layers as 20, 2,10,20 or all, and a ratio as 0.9")
        if not 0 <= ratio <= 1:
            raise InputError(f"--ratio: {args.ratio}, want 0 to 1, the fraction removed")
        methods = args.method.split(",") if args.method else list(METHODS)
        schedules = []
        for layer in layers:
            for method in methods:
                if args.method and args.layer != "all":
                    check_method(method, layer)
                elif layer == 0 and method in NEED_A_LAYER:
                    continue                            # asked for by "every method" or "all layers", not by name
                schedules.append((method, ((layer, method, ratio),)))
    for _, schedule in schedules:
        for layer, method, _ in schedule:
            if not 0 <= layer < num_layers:
                raise InputError(f"layer {layer} is out of range; this model has layers 0 to {num_layers - 1}")
            check_method(method, layer)
    if args.image:
        schedules = [(name, s) for name, s in schedules if "info" not in [method for _, method, _ in s]]
    rows = {(): "unpruned", ((0, "random", 0),): "no image"}
    for name, schedule in schedules:
        rows.setdefault(schedule, name)                 # a schedule asked for twice is run once
    cells = []
    for schedule, name in rows.items():
        stochastic = any(method == "random" and amount not in (0, 1.0) for _, method, amount in schedule) and not args.image
        cells += [Cell(name, schedule, args.seed + i) for i in range(args.seeds if stochastic else 1)]
    return cells


def load_model(args):
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: not usable here ({str(e).splitlines()[0]})")
    if not args.model.is_dir():
        raise InputError(f"--model {args.model}: no such folder; want a checkpoint folder with config.json")
    kind = model_llava.read_json(args.model / "config.json").get("model_type")
    if kind not in MODELS:
        raise InputError(f"--model {args.model}: model_type is {kind!r}, want one of {', '.join(MODELS)}")
    return MODELS[kind].load(args.model, device, getattr(torch, args.dtype) if args.dtype else None)


def open_folder(args, argv: list[str], settings: dict) -> Path:
    """The folder of this run; one that holds a run with other settings is refused."""
    name = re.sub(r"[^\w.,=@:-]+", "_", "_".join(argv).replace("--", "")) or "default"
    out = args.out or Path("runs") / name[:150]
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "settings.json"
        if file.exists():
            before = model_llava.read_json(file)
            other = [key for key in settings if before.get(key) != settings[key]]
            if other:
                raise InputError(f"--out {out}: holds a run with other settings: " + ", ".join(
                    f"{key} is {before.get(key)!r}, this run's is {settings[key]!r}" for key in other))
        file.write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e})")
    return out


def main(argv: list[str]):
    args = parse_arguments(argv)
    benchmarks = args.bench.split(",")
    for benchmark in benchmarks:
        if benchmark not in BENCHMARKS:
            raise InputError(f"--bench: unknown benchmark {benchmark!r}; want one of {', '.join(BENCHMARKS)}")
    if bool(args.image) != bool(args.question):
        raise InputError("--image and --question go together")
    model = load_model(args)
    weight = next(model.parameters())
    cells = parse_cells(args, model.num_layers)
    settings = {"model": str(args.model), "data": str(args.data), "device": str(weight.device), "dtype": str(weight.dtype),
                "cells": [[c.row, [list(stage) for stage in c.schedule], c.seed] for c in cells], "limit": args.limit,
                "max_new_tokens": args.max_new_tokens, "positions": args.positions, "image": str(args.image) if args.image else None}
    if args.image:
        report = show_image(model, args, cells, open_folder(args, argv, settings))
    else:
        data = {b: load_benchmark(b, args.data, args.limit, args.seed) for b in benchmarks}
        out, clock, report = open_folder(args, argv, settings), Clock(weight.device), {}
        for benchmark, questions in data.items():
            done = evaluate(model, benchmark, questions, cells, args, clock, out)
            milliseconds = time_prefill(model, questions[0], cells, args, clock)
            rows = report[benchmark] = summarise(model, benchmark, questions, done, cells)
            for row, schedule in zip(rows, dict.fromkeys(cell.schedule for cell in cells)):
                row["prefill_ms"] = milliseconds.get(schedule)
            print_table(benchmark, rows)
        print(f"{clock.seconds['questions']:.0f} s for the questions, {clock.seconds['oracle']:.0f} s of them the oracle's measuring "
              f"(info); {weight.device}, {str(weight.dtype)[6:]}, {torch.get_num_threads()} threads; answers in {out}\n")
        if args.plot:
            plot(report, args.plot)
        report = {"benchmarks": report, "seconds": dict(clock.seconds)}
    print(json.dumps({"command": " ".join(["eval.py", *argv]), **settings, **report}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        print(f"eval.py: error: {e}", file=sys.stderr)
        sys.exit(2)
