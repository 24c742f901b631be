"""Benchmarks: files -> questions, answers -> official scores. Knows no model.

A section each: where it is from, how it is asked, how its files are read, what its paper reports.
`Question.metric` names the rule that reads and scores an answer. A file of your own is a JSON
object a line: id, image, question, answers, metric. VLMEvalKit's TSVs are read by their columns.
"""
import ast
import contextlib
import hashlib
import json
import os
import re
import warnings
from collections import Counter
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

    @property
    def seed(self) -> int:
        """Random draws depend on the question alone, not on which others are asked."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    @property
    def identity(self) -> tuple:
        """What decides an answer and its score, wherever the files lie."""
        return self.id, Path(str(self.image)).name, self.prompt, self.gold, self.metric, self.group

    @property
    def gold_normalized(self) -> str:
        """The answer whose first token the paper measures: of ten, the best-scoring one after
        normalizing; else Yes or No, the letter, or the first answer."""
        if self.metric == "vqa":
            normalized = [normalize(answer) for answer in self.gold]
            normalized = [answer for answer in normalized if answer]    # "A" and "-" become ""
            return max(normalized, key=self.points, default=self.gold[0].lower())
        if self.metric in ("yesno", "pope"):
            return self.gold[0].capitalize()
        return self.gold[0]

    @property
    def gold_written(self) -> str:
        """The answer measured as a whole, as an annotator wrote it: of ten, the most frequent of
        the best-scoring ones ("1,000", where `gold_normalized` is "1000")."""
        if self.metric != "vqa":
            return self.gold_normalized
        best = max(self.points(answer) for answer in self.gold)
        written = [answer for answer in self.gold if self.points(answer) == best]
        return Counter(written).most_common(1)[0][0]

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
YES_OR_NO = "Please answer yes or no."


def load_mme(paths: list[Path], style: str | None) -> list[Question]:
    """Read a folder a subtask: in it, or in folders of it, a text of two lines for each image."""
    questions = []
    for folder in paths:
        if folder.name in PERCEPTION + COGNITION and folder.is_dir():
            inside = [path for path in paths if folder in path.parents]
            questions += load_subtask(folder.name, inside)
    return questions


def load_subtask(name: str, inside: list[Path]) -> list[Question]:
    text_of = by_stem(inside, ".txt")
    image_of = by_stem(inside, ".jpg", ".jpeg", ".png")
    questions = []
    for stem in sorted(text_of.keys() | image_of.keys()):
        if stem not in text_of:
            raise InputError(f"{image_of[stem]}: has no {stem}.txt, which asks about it")
        file = text_of[stem]
        if stem not in image_of:
            raise InputError(f"{file}: has no {stem}.jpg or .png, which it asks about")
        lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
        with as_published(file, lines):
            pair = [line.split("\t") for line in lines]
            for number, (text, answer) in zip((0, 1), pair, strict=True):
                text = text.strip().removesuffix(YES_OR_NO).rstrip()
                questions.append(Question(f"{name}/{stem}/{number}", image_of[stem], text + SHORT,
                                          [answer.strip()], "yesno", file, name))
    return questions


def by_stem(paths: list[Path], *suffixes: str) -> dict[str, Path]:
    """Return the files with one of these suffixes by stem. Raises InputError for a duplicate."""
    found = {}
    for path in paths:
        if path.suffix.lower() in suffixes:
            twin = found.setdefault(path.stem, path)
            if twin is not path:
                raise InputError(f"{path}: {path.stem} is there twice, as {twin.name} too; want "
                                 "one")
    return found


def parse_yes_no(answer: str) -> str | None:
    """Read an answer as MME's calculation.py: the whole, else what its first four characters
    hold."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    for word in ("yes", "no"):
        if word in answer[:4]:
            return word
    return None


def mme_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Return perception, cognition and their sum, of 100 (acc + acc+) a subtask: acc+ counts the
    images with both questions right. "complete": whether all 14 subtasks are in it."""
    pairs = {}
    for question, points in zip(questions, scores):
        of_image = pairs.setdefault(question.group, {}).setdefault(question.image, [])
        of_image.append(points)
    subtasks = {}
    for group in sorted(pairs):
        right = [points for pair in pairs[group].values() for points in pair]
        both = [min(pair) for pair in pairs[group].values()]
        subtasks[group] = 100 * float(np.mean(right) + np.mean(both))
    perception = sum(subtasks.get(name, 0) for name in PERCEPTION)
    cognition = sum(subtasks.get(name, 0) for name in COGNITION)
    complete = len(subtasks) == len(PERCEPTION + COGNITION)
    return {"perception": perception, "cognition": cognition, "sum": perception + cognition,
            **subtasks, "complete": complete}


# ---- TextVQA (arXiv 1904.08920, v0.5.1 val) ------------------------------------------------------

OCR = "\nReference OCR token: "


def load_textvqa(paths: list[Path], style: str | None) -> list[Question]:
    """Read TextVQA_0.5.1_val.json and train_images/; with style llava, OCR tokens in the prompt."""
    file = find(paths, "TextVQA_0.5.1_val.json")
    if file is None:
        return []
    folder = find(paths, "train_images")
    if folder is None:
        raise InputError(f"{file}: is here, the folder train_images is not" + unpacked(paths))
    tokens = load_ocr(paths, file) if style == "llava" else {}
    questions = []
    for entry in read_list(file, "data"):
        with as_published(file, entry):
            image_id = entry["image_id"]
            text = entry["question"].capitalize()
            if style == "llava":
                text += OCR + tokens[image_id]
            questions.append(Question(str(entry["question_id"]), folder / f"{image_id}.jpg",
                                      text + SHORT, entry["answers"], "vqa", file))
    return questions


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


def misspelled_contractions() -> dict[str, str]:
    """Map each contraction without one of its apostrophes (couldnt've, couldn'tve) to the whole."""
    table = {}
    for word in CONTRACTIONS:
        for i, character in enumerate(word):
            if character == "'":
                table[word[:i] + word[i + 1:]] = word
    table["somebody'd"] = "somebodyd"                   # sic, in the official list
    return table


MISSPELLED = misspelled_contractions()


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


def load_scienceqa(paths: list[Path], style: str | None) -> list[Question]:
    """Read problems.json, pid_splits.json, and images as test/<id>/image.png."""
    file = find(paths, "problems.json")
    splits = find(paths, "pid_splits.json")
    if file is None and splits is None:
        return []
    if file is None or splits is None:
        raise InputError(f"{file or splits}: is here, "
                         f"{'pid_splits.json' if file else 'problems.json'} is not")
    problems = read_json(file)
    image_of = {}
    for path in paths:
        if path.name == "image.png" and path.parent.parent.name == "test":
            image_of[path.parent.name] = path
    questions = []
    for pid in read_list(splits, "test"):
        with as_published(file, pid):
            entry = problems[pid]
            if entry["image"]:
                letters = LETTERS[:len(entry["choices"])]
                choices = dict(zip(letters, entry["choices"], strict=True))
                prompt = choice_prompt(entry["question"], entry["hint"], choices)
                image = image_of.get(pid, file.parent / "test" / pid / "image.png")
                gold = [letters[entry["answer"]]]
                questions.append(Question(pid, image, prompt, gold, "choice", file))
    return questions


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


def load_pope(paths: list[Path], style: str | None) -> list[Question]:
    """Read coco_pope_{random,popular,adversarial}.json, JSON lines; images are COCO val2014's."""
    files = {name: find(paths, f"coco_pope_{name}.json") for name in POPE}
    present = [file for file in files.values() if file]
    if not present:
        return []
    missing = [f"coco_pope_{name}.json" for name, file in files.items() if file is None]
    if missing:
        raise InputError(f"{present[0]}: without {', '.join(missing)}; POPE's F1 is the mean of "
                         "three")
    image_of = {path.name: path for path in paths if path.name.startswith("COCO_val2014_")}
    questions = []
    for name, file in files.items():
        entries = read_lines(file)
        if not entries:
            raise InputError(f"{file}: is empty; POPE's F1 is the mean of three files")
        for entry in entries:
            with as_published(file, entry):
                image = image_of.get(entry["image"], file.parent / entry["image"])
                questions.append(Question(f"{name}/{entry['question_id']}", image,
                                          entry["text"] + SHORT, [entry["label"].capitalize()],
                                          "pope", file, name))
    return questions


def parse_pope(answer: str) -> str:
    """Read an answer as LLaVA's eval_pope.py: no if a word of the first sentence is No, not or no;
    else yes, whatever it is."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Return F1, accuracy, precision, recall (yes is positive) and share of yes of each file, in
    percent, and their means over the three files: None where one of them has no answer. A question
    of several files, "random,popular", counts in each."""
    files = [question.group.split(",") for question in questions]
    names = list(dict.fromkeys(name for of_question in files for name in of_question))
    totals = {}
    for name in names:
        rows = [i for i, of_question in enumerate(files) if name in of_question]
        label = np.array([questions[i].gold == ["Yes"] for i in rows])
        right = np.array([scores[i] for i in rows]) > 0
        yes = label == right                            # answered, rightly or wrongly
        hits = (label & yes).sum()
        for key, value in {"F1": 2 * hits / max(label.sum() + yes.sum(), 1),
                           "accuracy": right.mean(), "precision": hits / max(yes.sum(), 1),
                           "recall": hits / max(label.sum(), 1), "yes": yes.mean()}.items():
            totals[f"{key} {name}"] = 100 * float(value)
    complete = len(names) == len(POPE)
    means = {}
    for key in ("F1", "accuracy", "precision", "recall", "yes"):
        each = [totals[f"{key} {name}"] for name in names]
        means[key] = float(np.mean(each)) if complete else None
    return means | totals | {"complete": complete}


# ---- a file of your own --------------------------------------------------------------------------

OWN = ("vqa", "exact", "yesno", "choice")


def load_jsonl(file: Path, gold: bool = True) -> list[Question]:
    """Read a question a line: id, image (a path from the file's folder), question (the whole
    prompt), answers (gold, as the model writes them: information measures these very tokens),
    metric. Without gold, a line may lack both answers and metric. Raises InputError.

    metric: vqa (ten answers, soft accuracy), exact (GQA's equality), yesno (MME's rule), choice
    (ScienceQA's, the answer is a letter).
    """
    fields = {"id": (str, int), "image": str, "question": str}
    questions = []
    for entry in read_lines(file, **fields):
        about = f"question {entry['id']}"
        if gold and not {"answers", "metric"} & entry.keys():
            raise InputError(f"{file}: {about} has no answers and no metric, so it cannot be "
                             "scored; information.py --answers own and demo.py need none")
        if "answers" in entry or "metric" in entry:
            require(entry, file, about, **fields, answers=list, metric=str)
            check_own(entry["answers"], entry["metric"], f"{file}: {about}")
        answers = [answer.strip() for answer in entry.get("answers", [])]
        image = on_disk(file.parent / entry["image"])
        questions.append(Question(str(entry["id"]), image, entry["question"], answers,
                                  entry.get("metric", ""), file))
    return questions


def check_own(answers: list, metric: str, about: str):
    if metric not in OWN:
        raise InputError(f"{about}: metric is {metric!r}, want one of {', '.join(OWN)}")
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise InputError(f"{about}: answers are {answers}, want a list of strings, none empty")


def parse_exact(answer: str) -> str:
    """Read an answer as LLaVA's convert_gqa_for_eval.py: final full stops dropped, lower case."""
    return answer.rstrip(".").lower()


# ---- VLMEvalKit's TSVs: github.com/open-compass/VLMEvalKit, vlmeval/dataset ----------------------

def load_tsv(file: Path, gold: bool = True) -> list[Question]:
    """Read a TSV by its columns, whatever its name: options make a choice; else ten answers to each
    question TextVQA's, Yes or No to each MME's or POPE's; the rest is scored as exact.

    The prompts are those of the official files above, not VLMEvalKit's. Without gold, a row may
    lack its answer. Raises InputError.
    """
    rows = rows_with_images(file)
    answers = [[text.strip() for text in parse_list(row.get("answer", ""))] for row in rows]
    choices = [{letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
               for row in rows]
    without_options = metric_of([of_row for of_row, options in zip(answers, choices)
                                 if of_row != [""] and not options], rows)
    groups = groups_of(rows, without_options, any(choices))
    questions = []
    for row, of_row, options, group in zip(rows, answers, choices, groups):
        about = f"{file}: row {row['index']}"
        if not options.keys() <= set(LETTERS):
            raise InputError(f"{about} has options {', '.join(options)}; want at most "
                             f"{', '.join(LETTERS)}")
        if of_row == [""] and gold:
            raise InputError(f"{about} has no answer, so it cannot be scored")
        text = row["question"]
        metric = "choice" if options else without_options
        if metric == "choice":
            prompt = choice_prompt(text, row.get("hint", ""), options)
        elif metric == "vqa":
            prompt = text.capitalize() + SHORT
        else:
            prompt = text.strip().removesuffix(YES_OR_NO).rstrip() + SHORT
        if metric in ("yesno", "pope"):
            of_row = [answer.capitalize() for answer in of_row]
        if of_row == [""]:
            of_row, metric = [], ""
        questions.append(Question(row["index"], row["image"], prompt, of_row, metric, file, group))
    return questions


def rows_with_images(file: Path) -> list[dict]:
    """Return the rows of a TSV; "image" is the place of each row's image, no pixels. Raises
    InputError."""
    rows = []
    first = {}                          # where a text of base64 stands first
    images = {}                         # of each index
    for start, size, row in read_tsv(file):
        lacking = [name for name in ("index", "question") if name not in row]
        if lacking or not {"image", "image_path"} & row.keys():
            raise InputError(f"{file}: has columns {', '.join(row)[:100]}; want index, question, "
                             "and image or image_path, as VLMEvalKit's TSVs")
        text = row.get("image")
        path = row.get("image_path", "")
        if text is None:
            row["image"] = Published(beside(file, only(path, file, row)))
        elif len(text) > 64:            # as VLMEvalKit does; fewer characters: another row's index
            only(text, file, row)
            place = first.setdefault(hashlib.sha256(text.encode()).digest(), (start, size))
            row["image"] = Published(file, *place, list(row).index("image"), path)
            images[row["index"]] = row["image"]
        rows.append(row)
    for row in rows:
        reference = row["image"]
        if isinstance(reference, str) and reference:
            if reference not in images:
                raise InputError(f"{file}: row {row['index']}: image is {reference!r}, which is no "
                                 "base64 and no row with an image")
            row["image"] = replace(images[reference], name=row.get("image_path", ""))
    return [row for row in rows if row["image"]]        # as VLMEvalKit: no image, no question


def parse_list(text: str) -> list[str]:
    """Return the list that a cell holds as Python text, ['a', 'b'], or the text alone in a list."""
    found = text
    if text.startswith("["):
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(
                ValueError, SyntaxError, MemoryError, RecursionError):
            found = ast.literal_eval(text)
    return [str(part) for part in found] if isinstance(found, list) else [text]


def only(text: str, file: Path, row: dict) -> str:
    """Return the one image that a cell holds. Raises InputError if there are several."""
    images = parse_list(text)
    if len(images) != 1:
        raise InputError(f"{file}: row {row['index']} has {len(images)} images; want one")
    return images[0]


def beside(file: Path, image: str) -> Path:
    """Return the path of an image: as written, or in images/<name of the TSV> beside the TSV."""
    folder = file.parent / "images" / file.stem.removesuffix("_local")
    paths = [Path(image), folder / image, folder / Path(image).name, file.parent / image]
    return next((on_disk(path) for path in paths if os.path.isfile(on_disk(path))), paths[0])


def metric_of(answers: list[list[str]], rows: list[dict]) -> str:
    """Return the metric of questions without options, by all their answers and categories."""
    if answers and all(len(of_row) == 10 for of_row in answers):
        return "vqa"
    if not answers or not all(of_row in (["Yes"], ["No"], ["yes"], ["no"]) for of_row in answers):
        return "exact"
    files = {name for row in rows for name in row.get("category", "").split(",")}
    return "pope" if files <= set(POPE) else "yesno"


def groups_of(rows: list[dict], metric: str, choice: bool) -> list[str]:
    """Return each question's part of an official total, "" where there is none. MMBench asks a
    question again with rotated options: 1000007 is 7 again."""
    groups = [row.get("category", "") for row in rows]
    if choice:
        known = {row["index"] for row in rows}
        groups = [re.sub(r"^\d+(\d{6})$", lambda match: str(int(match[1])), row["index"])
                  for row in rows]
        return groups if set(groups) < known else [""] * len(rows)
    is_mme = metric == "yesno" and set(groups) <= set(PERCEPTION + COGNITION)
    return groups if metric == "pope" or is_mme else [""] * len(rows)


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

    COLUMNS are the entries that a table shows. "complete": whether all its parts are there.
    """
    first = questions[0]
    if not first.group or first.metric not in TOTALS:
        return {}
    return TOTALS[first.metric](questions, scores)


def remarks(questions: list[Question]) -> list[str]:
    """Return what a reader of their scores has to know: how many of MME's subtasks these are, other
    prompts than the source's, images of a benchmark that a viewer shows otherwise.

    The header of each image is read. Raises InputError.
    """
    found = []
    groups = {question.group for question in questions}
    if groups <= set(PERCEPTION + COGNITION):
        found.append(f"{len(groups)} of {len(PERCEPTION + COGNITION)} subtasks")
    if questions[0].source.suffix == ".tsv":
        metrics = sorted({question.metric or "none" for question in questions})
        found.append(f"asked in LLaVA's words and not VLMEvalKit's, metric {', '.join(metrics)}")
    headers = [header for image, header in read_headers(questions).items()
               if isinstance(image, Published)]
    turned = sum(header.turned for header in headers)
    transparent = sum(header.transparent for header in headers)
    if turned:
        found.append(f"images turned by EXIF and read as stored: {turned}")
    if transparent:
        found.append(f"images with transparent parts: {transparent}")
    return found


def read_headers(questions: list[Question]) -> dict:
    """Return the header of each image. Raises InputError, which names the question."""
    headers = {}
    for question in questions:
        if question.image not in headers:
            try:
                headers[question.image] = read_header(question.image)
            except InputError as e:
                raise InputError(f"{question.source}: question {question.id}: {e}")
    return headers


def score(answer: str, question: Question) -> tuple[str | None, float]:
    """Return what the metric reads in an answer, None if nothing, and its score from 0 to 1.

    vqa: 0, .3, .6, .9, 1 where 0, 1, 2, 3, 4 or more of ten annotators agree; else right or wrong.
    """
    parse = METRICS[question.metric]
    parsed = parse(answer)
    agreeing = 0
    if parsed is not None:
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

    gold: False where nothing is scored: a file then needs no answers (and no metric). Raises
    InputError.
    """
    paths = []
    if name.endswith(tuple(FILES)):
        file = on_disk(Path(name))
        questions = FILES[file.suffix](file, gold)
    else:
        paths = paths_under(data)
        questions = BENCHMARKS[name](paths, style)
        for question in questions:
            question.image = Published(question.image)
    if not questions:
        what = f"--data {data}: no {name} found in it" if paths else f"{name}: no questions in it"
        raise InputError(what + unpacked(paths))
    first = {}
    for question in questions:
        twin = first.setdefault(question.id, question)
        if twin is not question:
            raise InputError(f"{name}: question {question.id} is there twice, in {twin.source} and "
                             f"in {question.source}")
        check_gold(question)
        text = " ".join([question.id, question.prompt, *question.gold])
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"{question.source}: a question holds half a character: "
                             f"{ascii(text)[:100]}")
        if not os.path.isfile(getattr(question.image, "file", question.image)):
            raise InputError(f"{question.image}: not found; question {question.id} of {name} is "
                             "about it" + unpacked(paths))
    return questions


def check_gold(question: Question):
    """Raise InputError unless the metric can score by these gold answers."""
    gold = question.gold
    metric = question.metric
    about = f"{question.source}: question {question.id}"
    want = {"vqa": 10, "exact": len(gold), "": 0}.get(metric, 1)
    if len(gold) != want:
        raise InputError(f"{about}: {len(gold)} answers, want ten for metric vqa, one for yesno "
                         "and choice")
    if not all(isinstance(answer, str) for answer in gold):
        raise InputError(f"{about}: answers are {gold}, want strings")
    is_letter = metric != "choice" or gold[0] in set(LETTERS)
    is_yes_or_no = metric not in ("yesno", "pope") or gold[0].lower() in ("yes", "no")
    if not is_letter or not is_yes_or_no:
        raise InputError(f"{about}: the answer is {gold[0]!r}, want yes or no for metric yesno, "
                         "a letter for choice")


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
    return require(read_json(file), file, "the whole", **{key: list})[key]


def paths_under(root: Path) -> list[Path]:
    """Return every file and folder, sorted, links followed, without hidden ones and macOS's
    copies."""
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder")

    def unreadable(error):
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")
    paths = []
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:                                # a loop of links
            inner.clear()
            continue
        inner[:] = [name for name in inner if not name.startswith((".", "__MACOSX"))]
        seen.add(real)
        paths += [Path(folder, name) for name in inner + names if not name.startswith(".")]
    return sorted(paths)


def find(paths: list[Path], name: str) -> Path | None:
    """Return the one file of that name, or None. Raises InputError if there are two."""
    files = [path for path in paths if path.name == name]
    if len(files) > 1:
        raise InputError(f"--data: {name} is there {len(files)} times, as {files[0]} and "
                         f"{files[1]}; want one")
    return files[0] if files else None


def unpacked(paths: list[Path]) -> str:
    zips = [str(path) for path in paths if path.suffix == ".zip"]
    return f"; not unpacked: {', '.join(zips)}" if zips else ""
