"""Benchmarks: official files -> questions, answers -> official scores. Knows no model.

A section each: where it is from, how it is asked, how its files are read, what its paper reports.
`Question.metric` names the rule that reads and scores an answer. A file of your own is a JSON
object a line: id, image, question, answers, metric.
"""
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import read_json, read_lines, read_text, require
from tokprune import InputError

# Prompts are those of LLaVA's evaluation scripts, or of lmms-eval where that differs. TextVQA's OCR
# tokens answer a good part of it without the image: style "llava" alone shows them.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
STYLES = ("llava", "lmms-eval")


@dataclass
class Question:
    id: str                     # unique within its benchmark
    image: Path
    prompt: str                 # what follows the image
    answers: list[str]          # gold; none in a file of one's own that is only asked
    metric: str                 # one of METRICS, or "" where there are no answers
    source: Path = Path()       # the file that asks it
    group: str = ""             # MME's subtask, POPE's file; "text": ScienceQA's without an image

    @property
    def seed(self) -> int:
        """Random draws depend on the question alone, not on which others are asked."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    @property
    def identity(self) -> tuple:
        """What makes it the same question, wherever its files lie."""
        return self.id, self.image.name, self.prompt, self.answers, self.metric

    @property
    def gold_normalised(self) -> str:
        """The answer whose first token the paper measures: of ten, the best-scoring one after
        normalising; else Yes or No, the letter, or the first answer."""
        if self.metric == "vqa":
            normalised = [normalise(answer) for answer in self.answers]
            normalised = [answer for answer in normalised if answer]    # "A" and "-" become ""
            return max(normalised, key=self.points, default=self.answers[0].lower())
        if self.metric in ("yesno", "pope"):
            return self.answers[0].capitalize()
        return self.answers[0]

    @property
    def gold_written(self) -> str:
        """The answer measured as a whole, as an annotator wrote it: of ten, the most frequent of
        the best-scoring ones ("1,000", where `gold_normalised` is "1000")."""
        if self.metric != "vqa":
            return self.gold_normalised
        best = max(self.points(answer) for answer in self.answers)
        written = [answer for answer in self.answers if self.points(answer) == best]
        return Counter(written).most_common(1)[0][0]

    def gold_for(self, target: str) -> str:
        """Return the gold answer whose information is measured: for "first", or for all of it."""
        return self.gold_normalised if target == "first" else self.gold_written

    def points(self, answer: str) -> float:
        return score(answer, self)[1]


def images_of(questions: list[Question]) -> np.ndarray:
    """The number of each question's image, for statistics clustered by it."""
    return np.unique([str(question.image) for question in questions], return_inverse=True)[1]


# ---- MME (arXiv 2306.13394) ----------------------------------------------------------------------

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
YES_OR_NO = "Please answer yes or no."


def load_mme(paths: list[Path], style: str | None, images: bool) -> list[Question]:
    """A folder a subtask; in it, or in folders of it, a text of two lines for each image."""
    questions = []
    for folder in paths:
        if folder.name in PERCEPTION + COGNITION and folder.is_dir():
            inside = [path for path in paths if folder in path.parents]
            questions += load_subtask(folder, inside, style, images)
    return questions


def load_subtask(folder: Path, inside: list[Path], style, images: bool) -> list[Question]:
    texts = [path for path in inside if path.suffix == ".txt"]
    if not texts:
        raise InputError(f"{folder}: no .txt with questions in it; want one for each image")
    image_of = pair_images(texts, inside) if images else {}
    questions = []
    for file in texts:
        if images and file.stem not in image_of:
            raise InputError(f"{file}: no image {file.stem}.jpg or .png with it")
        image = image_of.get(file.stem, file.with_suffix(".jpg"))
        for number, (text, answer) in enumerate(read_pair(file)):
            if style != "lmms-eval":
                text = text.removesuffix(YES_OR_NO).rstrip()
            questions.append(Question(f"{folder.name}/{file.stem}/{number}", image, text + SHORT,
                                      [answer], "yesno", file, folder.name))
    return questions


def pair_images(texts: list[Path], inside: list[Path]) -> dict[str, Path]:
    """Images by stem; each has to have one text of the same stem."""
    stems = {text.stem for text in texts}
    image_of = {}
    for path in inside:
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            if path.stem in image_of or path.stem not in stems:
                raise InputError(f"{path}: want one {path.stem}.txt for one image {path.stem}; "
                                 f"beside it is {image_of.get(path.stem, 'nothing')}")
            image_of[path.stem] = path
    return image_of


def read_pair(file: Path) -> list[list[str]]:
    """Two lines: a question for Yes and one for No, each with a tab before its answer."""
    lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    pairs = [[part.strip() for part in line.split("\t")] for line in lines]
    complete = all(len(pair) == 2 for pair in pairs)
    if not complete or sorted(pair[1] for pair in pairs) != ["No", "Yes"]:
        raise InputError(f"{file}: holds {lines}, want two lines, question<TAB>Yes and "
                         "question<TAB>No")
    return pairs


def parse_yes_no(answer: str) -> str | None:
    """MME's calculation.py: the whole answer, else what its first four characters hold."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    for word in ("yes", "no"):
        if word in answer[:4]:
            return word
    return None


def mme_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Perception, cognition and their sum, of 100 (acc + acc+) a subtask: acc+ counts the images
    with both questions right. "complete": whether all 14 subtasks are in it."""
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


def load_textvqa(paths: list[Path], style: str | None, images: bool) -> list[Question]:
    """TextVQA_0.5.1_val.json and train_images/; with style llava, OCR tokens in the prompt."""
    file = find(paths, "TextVQA_0.5.1_val.json")
    if file is None:
        return []
    folder = find(paths, "train_images")
    if images and (folder is None or not folder.is_dir()):
        raise InputError(f"{file}: is here, the folder train_images is not" + unpacked(paths))
    folder = folder or file.parent / "train_images"
    tokens = load_ocr(paths, file) if style == "llava" else None
    data = require(read_json(file), file, "the whole", data=list)["data"]
    questions = []
    for i, entry in enumerate(data):
        require(entry, file, f"data[{i}]", question=str, question_id=(str, int),
                image_id=(str, int), answers=list)
        answers = entry["answers"]
        if len(answers) != 10 or not all(isinstance(answer, str) for answer in answers):
            raise InputError(f"{file}: question {entry['question_id']}: answers are {answers}, "
                             "want a list of ten")
        image_id = str(entry["image_id"])
        text = entry["question"].capitalize()
        if tokens is not None:
            seen = tokens.get((image_id, text.lower()), tokens.get(image_id))
            if seen is None:
                raise InputError(f"{file}: image {image_id} has no OCR tokens in the file that "
                                 "should hold them")
            text += OCR + seen
        questions.append(Question(str(entry["question_id"]), folder / f"{image_id}.jpg",
                                  text + SHORT, answers, "vqa", file))
    return questions


def load_ocr(paths: list[Path], labels: Path) -> dict:
    """OCR tokens joined by ", ": by image from Rosetta's file, or by image and question from
    LLaVA's question file."""
    rosetta = find(paths, "TextVQA_Rosetta_OCR_v0.2_val.json")
    llava = find(paths, "llava_textvqa_val_v051_ocr.jsonl")
    tokens = {}
    if rosetta:
        data = require(read_json(rosetta), rosetta, "the whole", data=list)["data"]
        for i, entry in enumerate(data):
            require(entry, rosetta, f"data[{i}]", image_id=(str, int), ocr_tokens=list)
            tokens[str(entry["image_id"])] = ", ".join(map(str, entry["ocr_tokens"]))
        return tokens
    if llava is None:
        raise InputError("--prompt-style llava: shows TextVQA's OCR tokens, and beside "
                         f"{labels} there is neither TextVQA_Rosetta_OCR_v0.2_val.json nor "
                         "llava_textvqa_val_v051_ocr.jsonl")
    for entry in read_lines(llava, question_id=(str, int), text=str):
        text, line, seen = entry["text"].removesuffix(SHORT).partition(OCR)
        if not line:
            raise InputError(f"{llava}: {json.dumps(entry)[:100]}: text has no line "
                             f"{OCR.strip()!r}")
        tokens[str(entry["question_id"]), text.lower()] = seen
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
    """Each contraction without one of its apostrophes: couldnt've and couldn'tve -> couldn't've."""
    table = {}
    for word in CONTRACTIONS:
        for i, character in enumerate(word):
            if character == "'":
                table[word[:i] + word[i + 1:]] = word
    table["somebody'd"] = "somebodyd"                   # sic, in the official list
    return table


MISSPELLED = misspelled_contractions()


def normalise(answer: str) -> str:
    """TextVQA's official normaliser (mmf, EvalAIAnswerProcessor), its quirks included."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in ';/[]"{}()=+\\_-><@`!':
        touches_blank = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if touches_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)      # sic: the original passes a flag as count
    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [MISSPELLED.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(words)


# ---- ScienceQA (arXiv 2209.09513), the 2017 test questions with an image -------------------------

LETTERS = "ABCDE"


def load_scienceqa(paths: list[Path], style: str | None, images: bool) -> list[Question]:
    """problems.json, pid_splits.json, and images as test/<id>/image.png.

    Without images, for scoring, the questions that have none are there too, as group "text".
    """
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
    for pid in require(read_json(splits), splits, "the whole", test=list)["test"]:
        pid = str(pid)
        entry = require(problems.get(pid), file, f"question {pid}", question=str, choices=list,
                        answer=int)
        if not entry.get("image") and images:
            continue
        image = image_of.get(pid, file.parent / "test" / pid / "image.png")
        check_problem(entry, pid, file)
        questions.append(Question(pid, image, prompt_of(entry), [LETTERS[entry["answer"]]],
                                  "choice", file, "" if entry.get("image") else "text"))
    return questions


def check_problem(entry: dict, pid: str, file: Path):
    choices = entry["choices"]
    if not all(isinstance(text, str) for text in (*choices, entry.get("hint", ""))):
        raise InputError(f"{file}: question {pid}: choices are {choices}, hint "
                         f"{entry.get('hint')!r}, want strings")
    if not 0 <= entry["answer"] < len(choices) <= len(LETTERS):
        raise InputError(f"{file}: question {pid}: answer is {entry['answer']} of {len(choices)} "
                         f"choices, want one of at most {len(LETTERS)}")


def prompt_of(entry: dict) -> str:
    context = f"Context: {entry['hint']}\n" if entry.get("hint") else ""
    choices = ""
    for letter, choice in zip(LETTERS, entry["choices"]):
        choices += f"\n{letter}. {choice}"
    return context + entry["question"] + choices + LETTER


def parse_choice(answer: str) -> str | None:
    """LLaVA's eval_science_qa.py: a letter; a letter with ". " behind it; or one "The answer is X"
    with any character behind it."""
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    letters = re.findall(r"The answer is ([A-Z]).", answer)
    return letters[0] if len(letters) == 1 else None


# ---- POPE (arXiv 2305.10355) ---------------------------------------------------------------------

POPE = ("random", "popular", "adversarial")


def load_pope(paths: list[Path], style: str | None, images: bool) -> list[Question]:
    """coco_pope_{random,popular,adversarial}.json, JSON lines, and the images of COCO val2014."""
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
        entries = read_lines(file, question_id=(str, int), image=str, text=str, label=str)
        if not entries:
            raise InputError(f"{file}: is empty; POPE's F1 is the mean of three files")
        for entry in entries:
            if entry["label"] not in ("yes", "no"):
                raise InputError(f"{file}: question {entry['question_id']}: label is "
                                 f"{entry['label']!r}, want yes or no")
            image = image_of.get(entry["image"], file.parent / entry["image"])
            questions.append(Question(f"{name}/{entry['question_id']}", image,
                                      entry["text"] + SHORT, [entry["label"].capitalize()], "pope",
                                      file, name))
    return questions


def parse_pope(answer: str) -> str:
    """LLaVA's eval_pope.py: no if a word of the first sentence is No, not or no; else yes, whatever
    it is."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """F1, accuracy, precision, recall (yes is positive) and share of yes of each file, in percent;
    and their means over the three files, None where one of them has no answer."""
    names = list(dict.fromkeys(question.group for question in questions))
    totals = {}
    for name in names:
        rows = [i for i, question in enumerate(questions) if question.group == name]
        label = np.array([questions[i].answers == ["Yes"] for i in rows])
        right = np.array([scores[i] for i in rows]) > 0
        said = label == right                           # yes, rightly or wrongly
        hits = (label & said).sum()
        for key, value in {"F1": 2 * hits / max(label.sum() + said.sum(), 1),
                           "accuracy": right.mean(), "precision": hits / max(said.sum(), 1),
                           "recall": hits / max(label.sum(), 1), "yes": said.mean()}.items():
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
    """A question a line: id, image (a path from the file's folder), question (the whole prompt),
    answers, metric. Without gold, a line may lack both answers and metric. Answers are as the model
    writes them: information measures these very tokens. Raises InputError.

    metric: vqa (ten answers, soft accuracy), exact (GQA's equality), yesno (MME's rule), choice
    (ScienceQA's, the answer is a letter).
    """
    fields = {"id": (str, int), "image": str, "question": str}
    scored = fields | {"answers": list, "metric": str}
    questions = []
    for entry in read_lines(file, **fields):
        about = f"question {entry['id']}"
        if gold and not {"answers", "metric"} & entry.keys():
            raise InputError(f"{file}: {about} has no answers and no metric, so it cannot be "
                             "scored; information.py --answers own and demo.py need none")
        if "answers" in entry or "metric" in entry:
            check_own(require(entry, file, about, **scored), f"{file}: {about}")
        questions.append(Question(str(entry["id"]), file.parent / entry["image"],
                                  entry["question"], entry.get("answers", []),
                                  entry.get("metric", ""), file))
    return questions


def check_own(entry: dict, about: str):
    answers = entry["answers"]
    metric = entry["metric"]
    if metric not in OWN:
        raise InputError(f"{about}: metric is {metric!r}, want one of {', '.join(OWN)}")
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{about}: answers are {answers}, want a list of strings, none empty")
    want = {"vqa": 10, "exact": len(answers)}.get(metric, 1)
    if len(answers) != want:
        raise InputError(f"{about}: {len(answers)} answers, want ten for metric vqa, one for yesno "
                         "and choice")
    is_letter = answers[0] in set(LETTERS)
    is_yes_or_no = answers[0].lower() in ("yes", "no")
    if metric == "choice" and not is_letter or metric == "yesno" and not is_yes_or_no:
        raise InputError(f"{about}: the answer is {answers[0]!r}, want yes or no for metric yesno, "
                         "a letter for choice")


def parse_exact(answer: str) -> str:
    """GQA, as LLaVA's convert_gqa_for_eval.py: final full stops dropped, lower case."""
    return answer.rstrip(".").lower()


# ---- scores --------------------------------------------------------------------------------------

METRICS = {"vqa": normalise, "exact": parse_exact, "yesno": parse_yes_no, "choice": parse_choice,
           "pope": parse_pope}
BENCHMARKS = {"mme": load_mme, "textvqa": load_textvqa, "scienceqa": load_scienceqa,
              "pope": load_pope}
# what their papers report beside the share of right answers, and what of it a table shows
TOTALS = {"mme": mme_totals, "pope": pope_totals}
COLUMNS = {"mme": ("perception", "cognition", "sum"), "pope": ("F1", "precision", "recall", "yes")}


def score(answer: str, question: Question) -> tuple[str | None, float]:
    """What the metric reads in an answer, None if nothing, and its score from 0 to 1.

    vqa: 0, .3, .6, .9, 1 where 0, 1, 2, 3, 4 or more of ten annotators agree; else right or wrong.
    """
    parse = METRICS[question.metric]
    parsed = parse(answer)
    agreeing = 0
    if parsed is not None:
        agreeing = sum(parse(gold) == parsed for gold in question.answers)
    if question.metric == "vqa":
        return parsed, min(1.0, round(0.3 * agreeing, 1))
    return parsed, float(agreeing > 0)


def is_overlong(parsed: str | None, question: Question) -> bool:
    """Whether what the metric reads in an answer begins with a right one and goes on."""
    right = [METRICS[question.metric](answer) for answer in question.answers]
    if parsed is None or parsed in right:
        return False
    return any(gold and parsed.startswith(gold) for gold in right)


# ---- files ---------------------------------------------------------------------------------------

def load_benchmark(name: str, data: Path, style: str | None = None, images: bool = True,
                   gold: bool = True) -> list[Question]:
    """All questions of a benchmark found in a folder, or of a .jsonl file of your own. Raises
    InputError.

    images: False where answers are scored that were made elsewhere: then no image has to exist.
    gold: False where nothing is scored: then a file of your own needs no answers and no metric.
    """
    paths = []
    if name.endswith(".jsonl"):
        questions = load_jsonl(Path(name), gold)
    else:
        paths = paths_under(data)
        questions = BENCHMARKS[name](paths, style, images)
    if not questions:
        what = f"--data {data}: no {name} found in it" if paths else f"{name}: no questions in it"
        raise InputError(what + unpacked(paths))
    first = {}
    for question in questions:
        twin = first.setdefault(question.id, question)
        if twin is not question:
            raise InputError(f"{name}: question {question.id} is there twice, in {twin.source} and "
                             f"in {question.source}")
        text = " ".join([question.id, question.prompt, *question.answers])
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"{question.source}: a question holds half a character: "
                             f"{ascii(text)[:100]}")
        if images and not os.path.isfile(question.image):
            raise InputError(f"{question.image}: not found; question {question.id} of {name} is "
                             "about it" + unpacked(paths))
    return questions


def paths_under(root: Path) -> list[Path]:
    """Every file and folder, sorted, links followed; hidden ones and macOS's copies left out."""
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
    """The one file of that name, None if there is none. Raises InputError if there are two."""
    files = [path for path in paths if path.name == name]
    if len(files) > 1:
        raise InputError(f"--data: {name} is there {len(files)} times, as {files[0]} and "
                         f"{files[1]}; want one")
    return files[0] if files else None


def unpacked(paths: list[Path]) -> str:
    zips = [str(path) for path in paths if path.suffix == ".zip"]
    return f"; not unpacked: {', '.join(zips)}" if zips else ""
