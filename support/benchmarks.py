"""Benchmarks: files -> questions, answers -> official scores. Knows no model.

A section each: where it is from, how it is asked, how its files are read, what its paper reports.
`Question.metric` names the rule that reads and scores an answer. A file of your own is a JSON
object a line: id, image, question, answers, metric. VLMEvalKit's TSVs are read by their columns.
"""
import ast
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from support.files import (Published, on_disk, read_header, read_json, read_lines, read_text,
                           read_tsv, require)
from tokprune import InputError

# Prompts are those of LLaVA's evaluation scripts. TextVQA's OCR tokens answer a good part of it
# without the image: style "llava" shows them, the default does not.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
STYLES = ("llava",)


@dataclass
class Question:
    id: str                     # unique within its benchmark
    image: Path | Published     # a path: of a user's own
    prompt: str                 # what follows the image
    gold: list[str]             # what annotators answered; [] in a file of your own that has none
    metric: str                 # one of METRICS, or "" where there is no gold answer
    source: Path = Path()       # the file that asks it
    group: str = ""             # MME's subtask, POPE's files, a question that MMBench rotates

    def __post_init__(self):    # stripped, as the model's answers are
        self.gold = [text.strip() if isinstance(text, str) else text for text in self.gold]

    @property
    def seed(self) -> int:
        """Random draws depend on the question alone, not on which others are asked."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    @property
    def identity(self) -> tuple:
        """What decides an answer and its score, wherever the file and its images lie."""
        file = getattr(self.image, "file", self.image)
        place = os.path.relpath(file, self.source.parent), os.path.getsize(file)
        return self.id, place, self.prompt, self.gold, self.metric, self.group

    @property
    def where(self) -> str:
        """What an error about it begins with."""
        return f"{self.source}: question {self.id}"

    @property
    def gold_normalized(self) -> str:
        """The answer whose first token the paper measures: of ten, the best-scoring one after
        normalizing; else Yes or No, the letter, or the first answer."""
        if self.metric == "vqa":
            normalized = [normalize(answer) for answer in self.gold]
            written = [answer for answer in normalized if answer]       # "A" and "-" become ""
            return max(written, key=self.points, default=self.gold[0].lower())
        if self.metric in ("yesno", "pope"):
            return self.gold[0].capitalize()
        return self.gold[0]

    @property
    def gold_written(self) -> str:
        """The answer measured as a whole, as an annotator wrote it: of ten, the most frequent of
        the best-scoring ones ("1,000", where `gold_normalized` is "1000")."""
        if self.metric != "vqa":
            return self.gold_normalized
        return max(self.gold, key=lambda answer: (self.points(answer), self.gold.count(answer)))

    def gold_for(self, target: str) -> str:
        """Return the gold answer whose information is measured: for "first", or for all of it."""
        return self.gold_normalized if target == "first" else self.gold_written

    def points(self, answer: str) -> float:
        return score(answer, self)[1]


def images_of(questions: list[Question]) -> np.ndarray:
    """Return the number of each question's image, for statistics clustered by it."""
    return np.unique([str(question.image) for question in questions], return_inverse=True)[1]


# ---- MME (arXiv 2306.13394) ----------------------------------------------------------------------

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
SUBTASKS = PERCEPTION + COGNITION
YES_OR_NO = "Please answer yes or no."
PICTURES = (".jpg", ".jpeg", ".png")
TEXT_OR_IMAGE = (".txt", *PICTURES)


def load_mme(paths: list[Path], style: str | None) -> Iterator[Question]:
    """Read a folder a subtask: in it, or in folders of it, a text of two lines for each image."""
    for folder in paths:
        if folder.name in SUBTASKS and folder.is_dir():
            depth = len(folder.parts)
            of_stem = {}                                # the text and the image of one name
            for path in paths:
                if path.parts[:depth] == folder.parts and path.suffix.lower() in TEXT_OR_IMAGE:
                    of_stem.setdefault(path.stem, []).append(path)
            for stem, files in sorted(of_stem.items()):
                file = find(files, stem + ".txt")
                image = find(files, *(stem + suffix for suffix in PICTURES))
                if file is None or image is None:
                    raise InputError(f"{file or image}: is alone; want {stem}.txt and {stem}.jpg "
                                     "or .png")
                yield from load_pair(folder.name, file, image)


def load_pair(subtask: str, file: Path, image: Path) -> Iterator[Question]:
    lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    with as_published(file, lines):
        pair = [line.split("\t") for line in lines]
        for number, (text, answer) in zip((0, 1), pair, strict=True):
            yield Question(f"{subtask}/{file.stem}/{number}", image,
                           without_request(text) + SHORT, [answer], "yesno", file, subtask)


def without_request(text: str) -> str:
    """Return an MME question without its YES_OR_NO, for which SHORT stands."""
    return text.strip().removesuffix(YES_OR_NO).rstrip()


def parse_yes_no(answer: str) -> str | None:
    """Read an answer as MME's calculation.py: by what its first four characters hold."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def mme_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Return perception, cognition and their sum, of 100 (acc + acc+) a subtask: acc+ counts the
    images with both questions right. "complete": whether all 14 subtasks are in it."""
    images = {}                                         # of each subtask: image -> its two scores
    for question, points in zip(questions, scores):
        of_subtask = images.setdefault(question.group, {})
        of_subtask.setdefault(question.image, []).append(points)
    subtasks = {}
    for name, pairs in sorted(images.items()):
        right = [points for pair in pairs.values() for points in pair]
        both = [min(pair) for pair in pairs.values()]
        subtasks[name] = 100 * float(np.mean(right) + np.mean(both))
    perception = sum(subtasks.get(name, 0) for name in PERCEPTION)
    cognition = sum(subtasks.get(name, 0) for name in COGNITION)
    return {"perception": perception, "cognition": cognition, "sum": perception + cognition,
            **subtasks, "complete": len(subtasks) == len(SUBTASKS)}


# ---- TextVQA (arXiv 1904.08920, v0.5.1 val) ------------------------------------------------------

OCR = "\nReference OCR token: "


def load_textvqa(paths: list[Path], style: str | None) -> Iterator[Question]:
    """Read TextVQA_0.5.1_val.json and train_images/; with style llava, OCR tokens in the prompt."""
    file = find(paths, "TextVQA_0.5.1_val.json")
    if file is None:
        return
    folder = find(paths, "train_images") or file.parent / "train_images"
    tokens = load_ocr(paths, file) if style == "llava" else {}
    for entry in read_list(file, "data"):
        with as_published(file, entry):
            image_id = entry["image_id"]
            text = entry["question"].capitalize()
            if style == "llava":
                text += OCR + tokens[image_id]
            yield Question(str(entry["question_id"]), folder / f"{image_id}.jpg", text + SHORT,
                           entry["answers"], "vqa", file)


def load_ocr(paths: list[Path], labels: Path) -> dict[str, str]:
    """Return the OCR tokens of each image, joined by ", "."""
    file = find(paths, "TextVQA_Rosetta_OCR_v0.2_val.json")
    if file is None:
        raise InputError("--prompt-style llava: shows TextVQA's OCR tokens, and beside "
                         f"{labels} there is no TextVQA_Rosetta_OCR_v0.2_val.json")
    tokens = {}
    for entry in read_list(file, "data"):
        with as_published(file, entry):
            tokens[entry["image_id"]] = ", ".join(entry["ocr_tokens"])
    return tokens


ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
           "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've""".split()
# each without one of its apostrophes (couldnt've, couldn'tve)
MISSPELLED = {word[:i] + word[i + 1:]: word
              for word in CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}
MISSPELLED["somebody'd"] = "somebodyd"                  # sic, in the official list


@functools.lru_cache(2 ** 16)                           # gold answers are read for every schedule
def normalize(answer: str) -> str:
    """Normalize as TextVQA's official code (mmf, EvalAIAnswerProcessor), its quirks included."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in ';/[]"{}()=+\\_-><@`!':
        touches_space = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if touches_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)      # sic: the original passes a flag as count
    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [MISSPELLED.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(words)


# ---- ScienceQA (arXiv 2209.09513), the 2017 test questions with an image -------------------------

LETTERS = "ABCDE"


def load_scienceqa(paths: list[Path], style: str | None) -> Iterator[Question]:
    """Read problems.json, pid_splits.json, and images as test/<id>/image.png."""
    file = find(paths, "problems.json")
    if file is None:
        return
    splits = find(paths, "pid_splits.json") or file.with_name("pid_splits.json")
    problems = read_json(file)
    image_of = by_name((path.parent.name, path) for path in paths
                       if path.name == "image.png" and path.parent.parent.name == "test")
    for pid in read_list(splits, "test"):
        with as_published(file, pid):
            entry = problems[pid]
            if entry["image"]:
                letters = LETTERS[:len(entry["choices"])]
                choices = dict(zip(letters, entry["choices"], strict=True))
                prompt = choice_prompt(entry["question"], entry["hint"], choices)
                image = image_of.get(pid, file.parent / "test" / pid / "image.png")
                gold = [letters[entry["answer"]]]
                yield Question(pid, image, prompt, gold, "choice", file)


def choice_prompt(question: str, hint: str, choices: dict[str, str]) -> str:
    context = "Context: " + hint + "\n" if hint else ""
    lines = "".join("\n" + letter + ". " + choice for letter, choice in choices.items())
    return context + question + lines + LETTER


def parse_choice(answer: str) -> str | None:
    """Read an answer as LLaVA's eval_science_qa.py: a letter; a letter with ". " behind it; or one
    "The answer is X" with any character behind it."""
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    letters = re.findall(r"The answer is ([A-Z]).", answer)
    return letters[0] if len(letters) == 1 else None


# ---- POPE (arXiv 2305.10355) ---------------------------------------------------------------------

POPE = ("random", "popular", "adversarial")


def load_pope(paths: list[Path], style: str | None) -> Iterator[Question]:
    """Read coco_pope_{random,popular,adversarial}.json, JSON lines; images are COCO val2014's."""
    files = [f"coco_pope_{name}.json" for name in POPE]
    present = [path for path in paths if path.name in files]
    if not present:
        return
    image_of = by_name((path.name, path) for path in paths
                       if path.name.startswith("COCO_val2014_"))
    for name, file_name in zip(POPE, files):
        file = find(paths, file_name) or present[0].with_name(file_name)
        for entry in read_lines(file).values():
            with as_published(file, entry):
                image = image_of.get(entry["image"], file.parent / entry["image"])
                yield Question(f"{name}/{entry['question_id']}", image, entry["text"] + SHORT,
                               [entry["label"]], "pope", file, name)


def parse_pope(answer: str) -> str:
    """Read an answer as LLaVA's eval_pope.py: no if a word of the first sentence is No, not or no;
    else yes, whatever it is."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Return F1, accuracy, precision, recall (yes is positive) and share of yes of each file, in
    percent, and their means over the three files: None where one of them has no answer. A question
    of several files, "random,popular", counts in each."""
    keys = ("F1", "accuracy", "precision", "recall", "yes")
    parts = {}
    for name in POPE:
        rows = [i for i, question in enumerate(questions) if name in question.group.split(",")]
        if rows:
            label = np.array([questions[i].gold_normalized == "Yes" for i in rows])
            right = np.array([scores[i] for i in rows]) > 0
            yes = label == right                        # answered, rightly or wrongly
            hits = (label & yes).sum()
            shares = (2 * hits / max(label.sum() + yes.sum(), 1), right.mean(),
                      hits / max(yes.sum(), 1), hits / max(label.sum(), 1), yes.mean())
            parts[name] = {key: 100 * float(share) for key, share in zip(keys, shares)}
    complete = len(parts) == len(POPE)
    totals = {key: float(np.mean([part[key] for part in parts.values()])) if complete else None
              for key in keys}
    for name, part in parts.items():
        totals |= {f"{key} {name}": share for key, share in part.items()}
    return totals | {"complete": complete}


# ---- a file of your own --------------------------------------------------------------------------

def load_jsonl(file: Path) -> Iterator[Question]:
    """Read a question a line: id, image (a path from the file's folder), question (the whole
    prompt), answers (gold, as the model writes them: information measures these very tokens) and
    metric; or neither of these two, where nothing is scored. Raises InputError.

    metric: vqa (ten answers, soft accuracy), exact (GQA's equality), yesno (MME's rule), choice
    (ScienceQA's, the answer is a letter).
    """
    for place, entry in read_lines(file).items():
        entry = require({"answers": [], "metric": ""} | entry, place, id="text or a whole number",
                        image="text", question="text", answers="a list", metric="text")
        yield Question(str(entry["id"]), on_disk(file.parent / entry["image"]),
                       entry["question"], entry["answers"], entry["metric"], file)


def parse_exact(answer: str) -> str:
    """Read an answer as LLaVA's convert_gqa_for_eval.py: final full stops dropped, lower case."""
    return answer.rstrip(".").lower()


# ---- VLMEvalKit's TSVs: github.com/open-compass/VLMEvalKit, vlmeval/dataset ----------------------

def load_tsv(file: Path) -> Iterator[Question]:
    """Read a TSV by its columns, whatever its name: options make a choice; else ten answers to each
    question TextVQA's, Yes or No to each MME's or POPE's; the rest is scored as exact. The prompts
    are those of the official files above, not VLMEvalKit's. Raises InputError."""
    rows = rows_with_images(file)
    golds = [parse_list(row.get("answer", "")) for row in rows]
    options = [{letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
               for row in rows]
    without_options = metric_of([gold for gold, choices in zip(golds, options)
                                 if gold and not choices], rows)
    groups = groups_of(rows, without_options, any(options))
    for row, gold, choices, group in zip(rows, golds, options, groups):
        if not choices.keys() <= set(LETTERS):
            raise InputError(f"{file}: question {row['index']} has options {', '.join(choices)}; "
                             f"want at most {', '.join(LETTERS)}")
        if choices and gold and gold[0] not in choices:
            raise InputError(f"{file}: question {row['index']}: answer is {gold[0]!r}, want one of "
                             f"{', '.join(choices)}")
        text = row["question"]
        metric = "choice" if choices else without_options
        if metric == "choice":
            prompt = choice_prompt(text, row.get("hint", ""), choices)
        elif metric == "vqa":
            prompt = text.capitalize() + SHORT
        else:
            prompt = without_request(text) + SHORT
        yield Question(row["index"], row["image"], prompt, gold, metric if gold else "", file,
                       group)


def rows_with_images(file: Path) -> list[dict]:
    """Return the rows of a TSV; "image" is the place of each row's image, no pixels. Raises
    InputError."""
    rows = []
    first = {}                          # where a text of base64 stands first
    with_image = {}                     # index: place of the image
    for start, size, row in read_tsv(file):
        if not {"index", "question"} <= row.keys() or not {"image", "image_path"} & row.keys():
            raise InputError(f"{file}: has columns {', '.join(row)[:100]}; want index, question, "
                             "and image or image_path, as VLMEvalKit's TSVs")
        path = row.get("image_path", "")
        images = parse_list(row.get("image", path))
        if len(images) > 1:
            raise InputError(f"{file}: question {row['index']} has {len(images)} images; want one")
        if not images:
            continue                    # as VLMEvalKit: no image, no question
        if "image" not in row:
            row["image"] = Published(beside(file, images[0]))
        elif len(images[0]) > 64:       # as VLMEvalKit; fewer characters: another row's index
            digest = hashlib.sha256(images[0].encode()).digest()
            place = first.setdefault(digest, (start, size))
            row["image"] = Published(file, *place, list(row).index("image"), path)
            with_image[row["index"]] = row["image"]
        else:
            row["image"] = images[0]
        rows.append(row)
    for row in rows:
        index = row["image"]
        if isinstance(index, str):
            if index not in with_image:
                raise InputError(f"{file}: question {row['index']}: image is {index!r}, which is "
                                 "no base64 and no row with an image")
            row["image"] = replace(with_image[index], name=row.get("image_path", ""))
    return rows


def parse_list(text: str) -> list[str]:
    """Return the list that a cell holds as Python text, ['a', 'b'], or the text alone in a list,
    which is empty if the text is."""
    found = text
    if text.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(text)
    if isinstance(found, list):
        return [str(part).strip() for part in found]
    return [text.strip()] if text.strip() else []


def beside(file: Path, image: str) -> Path:
    """Return the path of an image: as written, or in images/<name of the TSV> beside the TSV."""
    folder = file.parent / "images" / file.stem.removesuffix("_local")
    paths = [on_disk(path) for path in (folder / image, folder / Path(image).name,
                                        file.parent / image)]
    return next(filter(os.path.isfile, paths), paths[0])


def metric_of(golds: list[list[str]], rows: list[dict]) -> str:
    """Return the metric of questions without options, by all their answers and categories."""
    if any(len(gold) == 10 for gold in golds):
        return "vqa"
    if not golds or not all(is_yes_or_no(gold) for gold in golds):
        return "exact"
    files = {name for row in rows for name in category_of(row).split(",")}
    return "pope" if files <= set(POPE) else "yesno"


def category_of(row: dict) -> str:
    """Return a row's category; POPE's is "random,popular", whatever its spaces and case."""
    category = row.get("category", "").strip()
    files = category.lower().replace(" ", "")
    return files if set(files.split(",")) <= set(POPE) else category


def groups_of(rows: list[dict], metric: str, is_choice: bool) -> list[str]:
    """Return each question's part of an official total, "" where there is none. MMBench asks a
    question again with rotated options: 1000007 is 7 again."""
    if is_choice:
        groups = [re.sub(r"^\d+(\d{6})$", lambda match: str(int(match[1])), row["index"])
                  for row in rows]
        has_total = set(groups) < {row["index"] for row in rows}
    else:
        groups = [category_of(row) for row in rows]
        has_total = metric == "pope" or metric == "yesno" and set(groups) <= set(SUBTASKS)
    return groups if has_total else [""] * len(rows)


def circular_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Return MMBench's accuracy: a question is right if it is in every rotation of its options."""
    worst = {}
    for question, points in zip(questions, scores):
        worst[question.group] = min(points, worst.get(question.group, 1))
    return {"circular": 100 * float(np.mean(list(worst.values()))), "complete": True}


# ---- scores --------------------------------------------------------------------------------------

METRICS = {"vqa": normalize, "exact": parse_exact, "yesno": parse_yes_no, "choice": parse_choice,
           "pope": parse_pope}
BENCHMARKS = {"mme": load_mme, "textvqa": load_textvqa, "scienceqa": load_scienceqa,
              "pope": load_pope}
FILES = {".jsonl": load_jsonl, ".tsv": load_tsv}
# what a benchmark's paper reports, of questions that have a group, and what of it a table shows
TOTALS = {"yesno": mme_totals, "pope": pope_totals, "choice": circular_totals}
COLUMNS = ("perception", "cognition", "sum", "F1", "precision", "recall", "yes", "circular")


def official_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Return what the benchmark's paper reports beside the share of right answers, {} if nothing.
    "complete": whether all its parts are there."""
    first = questions[0]
    if not first.group or first.metric not in TOTALS:
        return {}
    return TOTALS[first.metric](questions, scores)


def remarks(questions: list[Question]) -> list[str]:
    """Return what a reader of their scores has to know: how many of MME's subtasks these are, other
    prompts than the source's, images of a benchmark that a viewer shows otherwise, by their
    headers. Raises InputError."""
    found = []
    groups = {question.group for question in questions}
    if groups <= set(SUBTASKS):
        found.append(f"{len(groups)} of {len(SUBTASKS)} subtasks")
    if questions[0].source.suffix.lower() == ".tsv":
        metrics = sorted({question.metric or "none" for question in questions})
        found.append(f"asked in LLaVA's words and not VLMEvalKit's, metric {', '.join(metrics)}")
    headers = [read_header(image) for image in {question.image for question in questions}
               if isinstance(image, Published)]
    turned = sum(header.turned for header in headers)
    transparent = sum(header.transparent for header in headers)
    if turned:
        found.append(f"images turned by EXIF and read as stored: {turned}")
    if transparent:
        found.append(f"images with transparent parts: {transparent}")
    return found


def score(answer: str, question: Question) -> tuple[str | None, float]:
    """Return what the metric reads in an answer, None if nothing, and its score from 0 to 1.

    vqa: 0, .3, .6, .9, 1 where 0, 1, 2, 3, 4 or more of ten annotators agree; else right or wrong.
    """
    parse = METRICS[question.metric]
    parsed = parse(answer)
    agreeing = sum(parse(gold) == parsed for gold in question.gold)
    if question.metric == "vqa":
        return parsed, min(1.0, round(0.3 * agreeing, 1))
    return parsed, float(agreeing > 0)


def is_overlong(parsed: str | None, question: Question) -> bool:
    """Tell whether what the metric reads in an answer begins with a right one and goes on."""
    right = [METRICS[question.metric](answer) for answer in question.gold]
    if parsed is None or parsed in right:
        return False
    return any(gold and parsed.startswith(gold) for gold in right)


# ---- files ---------------------------------------------------------------------------------------

def load_benchmark(name: str, data: Path, style: str | None = None,
                   gold: bool = True) -> list[Question]:
    """Return all questions of a benchmark found in a folder, or of a file, .jsonl or .tsv.

    style: one of STYLES. gold: False where nothing is scored: a file then needs no answers. Raises
    InputError.
    """
    paths = []
    if name in BENCHMARKS:
        paths = paths_under(data)
        questions = list(BENCHMARKS[name](paths, style))
        for question in questions:
            question.image = Published(question.image)
    elif style:
        raise InputError(f"--prompt-style {style}: {name} has no OCR tokens; want the official "
                         "files, --bench textvqa")
    else:
        file = on_disk(Path(name))
        questions = list(FILES[file.suffix.lower()](file))
    if not questions:
        if name not in BENCHMARKS:
            raise InputError(f"{name}: no questions in it")
        raise InputError(f"--data {data}: no {name} found in it{unpacked(paths)}")
    first = {}
    for question in questions:
        twin = first.setdefault(question.id, question)
        if twin is not question:
            raise InputError(f"{question.where} is a duplicate of one in {twin.source}")
        check_gold(question)
        if gold and not question.metric:
            raise InputError(f"{question.where} has no answers and no metric, so it cannot be "
                             "scored; plan.py and information.py --answers own need none")
        check_text(" ".join([question.id, question.prompt, *question.gold]), question.where)
        if not (question.id.strip() and question.prompt.strip()):
            raise InputError(f"{question.where} is {question.prompt[:100]!r}, want an id and a "
                             "question")
        if not os.path.isfile(getattr(question.image, "file", question.image)):
            raise InputError(f"{question.where}: {question.image}: not found; want an image"
                             + unpacked(paths))
    return questions


def check_text(text: str, where: str):
    """Raise InputError if the text is not Unicode: half a pair of surrogates, or another encoding's
    byte on the command line."""
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"{where}: holds half a character: {ascii(text)[:100]}")


def is_yes_or_no(gold: list[str]) -> bool:
    return [answer.lower() for answer in gold] in (["yes"], ["no"])


def check_gold(question: Question):
    """Raise InputError unless the metric can score by the gold answers."""
    gold = question.gold
    if not all(isinstance(answer, str) for answer in gold):
        raise InputError(f"{question.where}: answers are {str(gold)[:100]}, want strings")
    fits = {"": not gold, "vqa": len(gold) == 10, "exact": gold and all(gold),
            "yesno": is_yes_or_no(gold), "pope": is_yes_or_no(gold),
            "choice": gold in map(list, LETTERS)}
    if not fits.get(question.metric):
        raise InputError(f"{question.where}: answers are {str(gold)[:100]}, metric is "
                         f"{question.metric!r}; want ten for vqa, one or more for exact, yes or no "
                         "for yesno, a letter for choice")


@contextlib.contextmanager
def as_published(file: Path, entry):
    """Turn what plain reading stumbles over into one line. An official file is as published or is
    refused: what is wrong with it is not looked for."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise InputError(f"{file}: not as published: {json.dumps(entry)[:100]} "
                         f"({type(e).__name__}: {e})")


def read_list(file: Path, key: str) -> list:
    """Return the list that a JSON file holds under that key. Raises InputError."""
    return require(read_json(file), file, **{key: "a list"})[key]


def paths_under(root: Path) -> list[Path]:
    """Return every file and folder, sorted, links followed, without hidden ones and macOS's
    copies. Raises InputError."""
    def unreadable(error):
        raise InputError(f"--data {error.filename}: cannot be read ({error.strerror})")
    paths = []
    seen = set()
    for folder, inner, names in os.walk(on_disk(root), followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        inner[:] = [name for name in inner if not name.startswith((".", "__MACOSX"))]
        if real in seen:                                # a loop of links
            inner.clear()
        else:
            seen.add(real)
            paths += [Path(folder, name) for name in inner + names if not name.startswith(".")]
    return sorted(paths)


def by_name(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return the files by their names. Raises InputError if there are two of one."""
    found = {}
    for name, path in files:
        twin = found.setdefault(name, path)
        if twin is not path:
            raise InputError(f"--data: image {name} is there twice, as {twin} and {path}; want one")
    return found


def find(paths: list[Path], *names: str) -> Path | None:
    """Return the one file of these names, in any case, or None. Raises InputError if there are
    two."""
    wanted = [name.lower() for name in names]
    files = [path for path in paths if path.name.lower() in wanted]
    if len(files) > 1:
        raise InputError(f"--data: {names[0]} is there {len(files)} times, as {files[0]} and "
                         f"{files[1]}; want one")
    return files[0] if files else None


def unpacked(paths: list[Path]) -> str:
    """Return a remark on zip files that lie there, for an error about what is missing."""
    zips = [str(path) for path in paths if path.suffix == ".zip"]
    return f"; not unpacked: {', '.join(zips)}" if zips else ""
