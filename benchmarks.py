"""Benchmarks: official files -> questions, answers -> official scores. Knows no model.

A page each: where it is from, how it is asked, how its files are read, what its paper reports. `Question.metric` names the rule
that reads and scores an answer. A file of your own is a JSON object a line: id, image, question, answers, metric.
"""
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokprune import InputError

# Prompts are those of LLaVA's evaluation scripts; style "lmms-eval" is that tool's where it differs. TextVQA's OCR tokens, which
# answer a good part of it without the image, are shown in style "llava" alone, and not by default.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
STYLES = ("llava", "lmms-eval")


@dataclass
class Question:
    id: str                     # unique within its benchmark
    image: Path
    prompt: str                 # what follows the image
    answers: list[str]          # gold
    metric: str                 # one of METRICS
    source: Path = Path()       # the file that asks it
    group: str = ""             # MME's subtask, POPE's file
    choices: int = 5            # how many letters there are to choose from

    @property
    def seed(self) -> int:
        """Random draws depend on the question alone, not on which others are asked."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    @property
    def gold(self) -> str:
        """The answer whose information is measured: the best-scoring of the normalised ten, or Yes or No, or the letter."""
        if self.metric == "vqa":
            normalised = [a for a in map(normalise, self.answers) if a]        # nothing is left of "A" or "-"
            return max(normalised, key=lambda a: score(a, self)[1], default=self.answers[0].lower())
        return self.answers[0].capitalize() if self.metric in ("yesno", "pope") else self.answers[0]


# ---- MME (arXiv 2306.13394) -------------------------------------------------------------------------------------

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
YES_OR_NO = "Please answer yes or no."


def load_mme(paths: list[Path], style: str | None) -> list[Question]:
    """A folder a subtask; in it, or in folders of it, texts of two lines, each beside an image of the same stem."""
    questions = []
    for folder in (path for path in paths if path.name in PERCEPTION + COGNITION and path.is_dir()):
        inside = [path for path in paths if str(path).startswith(f"{folder}{os.sep}")]
        images, texts = {}, [path for path in inside if path.suffix == ".txt"]
        if not texts:
            raise InputError(f"{folder}: no .txt with questions in it; want one for each image")
        for path in (path for path in inside if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
            if path.stem in images or path.stem not in {text.stem for text in texts}:
                other = images.get(path.stem, "nothing")
                raise InputError(f"{path}: want one {path.stem}.txt for one image {path.stem}; beside it is {other}")
            images[path.stem] = path
        for file in texts:
            if file.stem not in images:
                raise InputError(f"{file}: no image {file.stem}.jpg or .png with it")
            lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
            pairs = [[part.strip() for part in line.split("\t")] for line in lines]
            if sorted(pair[-1] for pair in pairs) != ["No", "Yes"] or any(len(pair) != 2 for pair in pairs):
                raise InputError(f"{file}: holds {lines}, want two lines, question<TAB>Yes and question<TAB>No")
            for i, (text, answer) in enumerate(pairs):
                text = text if style == "lmms-eval" else text.removesuffix(YES_OR_NO).rstrip()
                questions.append(Question(f"{folder.name}/{file.stem}/{i}", images[file.stem], text + SHORT, [answer], "yesno",
                                          file, folder.name))
    return questions


def parse_yes_no(answer: str, question: Question) -> str | None:
    """MME's calculation.py: the whole answer, else what its first four characters hold."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    return "yes" if "yes" in answer[:4] else "no" if "no" in answer[:4] else None


def mme_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """Perception, cognition and their sum, of 100 (acc + acc+) a subtask; acc+ counts images with both questions right."""
    subtasks = {}
    for group in sorted({q.group for q in questions}):
        pairs = defaultdict(list)
        for q, s in zip(questions, scores):
            if q.group == group:
                pairs[q.image].append(s)
        acc = np.mean([s for pair in pairs.values() for s in pair])
        subtasks[group] = 100 * float(acc + np.mean([min(pair) for pair in pairs.values()]))
    perception, cognition = (sum(v for k, v in subtasks.items() if k in part) for part in (PERCEPTION, COGNITION))
    return {"perception": perception, "cognition": cognition, "sum": perception + cognition} | subtasks


# ---- TextVQA (arXiv 1904.08920, v0.5.1 val) ---------------------------------------------------------------------

OCR = "\nReference OCR token: "


def load_textvqa(paths: list[Path], style: str | None) -> list[Question]:
    """TextVQA_0.5.1_val.json and train_images/, with OCR tokens as LLaVA's prompt has them or, by default, without."""
    file = find(paths, "TextVQA_0.5.1_val.json")
    if file is None:
        return []
    folders = [path for path in paths if path.name == "train_images" and path.is_dir()]
    if not folders:
        raise InputError(f"{file}: is here, the folder train_images is not" + unpacked(paths))
    data, questions = require(read_json(file), file, "the whole", data=list)["data"], []
    tokens = load_ocr(paths, file) if style == "llava" else None
    for i, entry in enumerate(data):
        require(entry, file, f"data[{i}]", question=str, question_id=(str, int), image_id=(str, int), answers=list)
        if len(entry["answers"]) != 10 or not all(isinstance(answer, str) for answer in entry["answers"]):
            raise InputError(f"{file}: question {entry['question_id']}: answers are {entry['answers']}, want a list of ten")
        image_id, text = str(entry["image_id"]), entry["question"].capitalize()
        if tokens is not None:
            seen = tokens.get((image_id, text.lower()), tokens.get(image_id))
            if seen is None:
                raise InputError(f"{file}: image {image_id} has no OCR tokens in the file that should hold them")
            text += OCR + seen
        questions.append(Question(str(entry["question_id"]), folders[0] / f"{image_id}.jpg", text + SHORT,
                                  entry["answers"], "vqa", file))
    return questions


def load_ocr(paths: list[Path], labels: Path) -> dict:
    """OCR tokens joined by ", ": by image from Rosetta's file, else by image and question from LLaVA's question file."""
    rosetta, llava = find(paths, "TextVQA_Rosetta_OCR_v0.2_val.json"), find(paths, "llava_textvqa_val_v051_ocr.jsonl")
    if rosetta:
        entries = require(read_json(rosetta), rosetta, "the whole", data=list)["data"]
        return {str(require(entry, rosetta, f"data[{i}]", image_id=(str, int), ocr_tokens=list)["image_id"]):
                ", ".join(map(str, entry["ocr_tokens"])) for i, entry in enumerate(entries)}
    if llava is None:
        raise InputError(f"--prompt-style llava: shows TextVQA's OCR tokens, and beside {labels} there is neither "
                         "TextVQA_Rosetta_OCR_v0.2_val.json nor llava_textvqa_val_v051_ocr.jsonl")
    tokens = {}
    for entry in read_lines(llava, question_id=(str, int), text=str):
        text, line, seen = entry["text"].removesuffix(SHORT).partition(OCR)
        if not line:
            raise InputError(f"{llava}: {json.dumps(entry)[:100]}: text has no line {OCR.strip()!r}")
        tokens[str(entry["question_id"]), text.lower()] = seen
    return tokens


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


def normalise(answer: str, question: Question | None = None) -> str:
    """The official answer normaliser of TextVQA (mmf, EvalAIAnswerProcessor), its quirks included."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = seen = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        text = text.replace(mark, "" if f"{mark} " in seen or f" {mark}" in seen else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(w, w) for w in text.split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


# ---- ScienceQA (arXiv 2209.09513), the 2017 test questions with an image ----------------------------------------

LETTERS = "ABCDE"


def load_scienceqa(paths: list[Path], style: str | None) -> list[Question]:
    """problems.json, pid_splits.json, and images as test/<id>/image.png."""
    file, splits = find(paths, "problems.json"), find(paths, "pid_splits.json")
    if file is None and splits is None:
        return []
    if file is None or splits is None:
        raise InputError(f"{file or splits}: is here, {'pid_splits.json' if file else 'problems.json'} is not")
    problems, questions = read_json(file), []
    test = require(read_json(splits), splits, "the whole", test=list)["test"]
    images = {path.parent.name: path for path in paths if path.name == "image.png" and path.parent.parent.name == "test"}
    for pid in test:
        entry = require(problems.get(str(pid)), file, f"question {pid}", question=str, choices=list, answer=int)
        if not entry.get("image"):
            continue
        if not all(isinstance(text, str) for text in (*entry["choices"], entry.get("hint", ""))):
            raise InputError(f"{file}: question {pid}: choices are {entry['choices']}, hint {entry.get('hint')!r}, want strings")
        if not 0 <= entry["answer"] < len(entry["choices"]) <= len(LETTERS):
            raise InputError(f"{file}: question {pid}: answer is {entry['answer']} of {len(entry['choices'])} choices, want one "
                             f"of at most {len(LETTERS)}")
        context = f"Context: {entry['hint']}\n" if entry.get("hint") else ""
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, entry["choices"]))
        questions.append(Question(pid, images.get(pid, file.parent / "test" / pid / "image.png"),
                                  context + entry["question"] + choices + LETTER, [LETTERS[entry["answer"]]], "choice", file,
                                  choices=len(entry["choices"])))
    return questions


def parse_choice(answer: str, question: Question) -> str | None:
    """LLaVA's eval_science_qa.py: a letter, a letter with ". " after it, or one "The answer is X" with any character after it."""
    if answer in LETTERS and len(answer) == 1:
        found = [answer]
    elif answer[:1] in LETTERS and answer[1:3] == ". ":
        found = [answer[0]]
    else:
        found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 and found[0] in LETTERS[:question.choices] else None


# ---- POPE (arXiv 2305.10355) ------------------------------------------------------------------------------------

POPE = ("random", "popular", "adversarial")


def load_pope(paths: list[Path], style: str | None) -> list[Question]:
    """coco_pope_{random,popular,adversarial}.json, JSON lines, and the images of COCO val2014."""
    files = {name: find(paths, f"coco_pope_{name}.json") for name in POPE}
    if not any(files.values()):
        return []
    if missing := [f"coco_pope_{name}.json" for name, file in files.items() if file is None]:
        raise InputError(f"{next(filter(None, files.values()))}: without {', '.join(missing)}; POPE's F1 is the mean of three")
    images, questions = {path.name: path for path in paths if path.name.startswith("COCO_val2014_")}, []
    for name, file in files.items():
        if not read_text(file).strip():
            raise InputError(f"{file}: is empty; POPE's F1 is the mean of three files")
        for entry in read_lines(file, question_id=(str, int), image=str, text=str, label=str):
            if entry["label"] not in ("yes", "no"):
                raise InputError(f"{file}: question {entry['question_id']}: label is {entry['label']!r}, want yes or no")
            questions.append(Question(f"{name}/{entry['question_id']}", images.get(entry["image"], file.parent / entry["image"]),
                                      entry["text"] + SHORT, [entry["label"].capitalize()], "pope", file, name))
    return questions


def parse_pope(answer: str, question: Question) -> str:
    """LLaVA's eval_pope.py: no if a word of the first sentence is No, not or no, else yes, whatever it is."""
    return "no" if {"No", "not", "no"} & set(answer.split(".")[0].replace(",", "").split(" ")) else "yes"


def pope_totals(questions: list[Question], scores: np.ndarray) -> dict:
    """F1, accuracy, precision, recall (yes is positive) and the share of yes, in percent: the mean of the files, and each's."""
    by_file = {}
    for name in dict.fromkeys(q.group for q in questions):
        label, right = (np.array([value for value, q in zip(values, questions) if q.group == name], bool) for values in (
            [q.answers == ["Yes"] for q in questions], scores))
        said = label == right                           # yes, rightly or wrongly
        hits = (label & said).sum()
        by_file[name] = {"F1": 200 * hits / max(label.sum() + said.sum(), 1), "accuracy": 100 * right.mean(),
                         "precision": 100 * hits / max(said.sum(), 1), "recall": 100 * hits / max(label.sum(), 1),
                         "yes": 100 * said.mean()}
    means = {key: np.mean([found[key] for found in by_file.values()]) for key in ("F1", "accuracy", "precision", "recall", "yes")}
    return {key: float(value) for key, value in means.items()} | {
        f"{key} {name}": float(value) for name, found in by_file.items() for key, value in found.items()}


# ---- a file of your own -----------------------------------------------------------------------------------------

def load_jsonl(file: Path) -> list[Question]:
    """A question a line: id, image (a path from the file's folder), question (the whole prompt), answers, metric.

    metric: vqa (ten answers, soft accuracy), exact (GQA's equality), yesno (MME's rule), choice (ScienceQA's, answers a letter).
    """
    questions = []
    for entry in read_lines(file, id=(str, int), image=str, question=str, answers=list, metric=str):
        about, answers, metric = f"{file}: question {entry['id']}", entry["answers"], entry["metric"]
        if metric not in OWN:
            raise InputError(f"{about}: metric is {metric!r}, want one of {', '.join(OWN)}")
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise InputError(f"{about}: answers are {answers}, want a list of strings, none empty")
        if len(answers) != {"vqa": 10, "exact": len(answers)}.get(metric, 1):
            raise InputError(f"{about}: {len(answers)} answers, want ten for metric vqa, one for yesno and choice")
        if metric == "choice" and answers[0] not in LETTERS or metric == "yesno" and answers[0].lower() not in ("yes", "no"):
            raise InputError(f"{about}: the answer is {answers[0]!r}, want yes or no for metric yesno, a letter for choice")
        question = Question(str(entry["id"]), file.parent / entry["image"], entry["question"], answers, metric, file)
        questions.append(question)
    return questions


def parse_exact(answer: str, question: Question) -> str:
    """GQA's rule: lower case, a final full stop dropped."""
    return answer.lower().removesuffix(".")


# ---- scores -----------------------------------------------------------------------------------------------------

METRICS = {"vqa": normalise, "exact": parse_exact, "yesno": parse_yes_no, "choice": parse_choice, "pope": parse_pope}
OWN = ("vqa", "exact", "yesno", "choice")
BENCHMARKS = {"mme": load_mme, "textvqa": load_textvqa, "scienceqa": load_scienceqa, "pope": load_pope}
TOTALS = {"mme": mme_totals, "pope": pope_totals}       # what their papers report beside the share of right answers
COLUMNS = {"mme": ("perception", "cognition", "sum"), "pope": ("F1", "precision", "recall", "yes")}     # what tables show of it


def score(answer: str, question: Question) -> tuple[str | None, float]:
    """What the metric reads in an answer, None if nothing, and its score, 0 to 1.

    vqa: 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 and more of ten annotators agreeing; the others: right or wrong.
    """
    parse = METRICS[question.metric]
    parsed = parse(answer, question)
    agreeing = 0 if parsed is None else sum(parse(gold, question) == parsed for gold in question.answers)
    return parsed, min(1.0, round(0.3 * agreeing, 1)) if question.metric == "vqa" else float(agreeing > 0)


# ---- answers made elsewhere -------------------------------------------------------------------------------------

def join_answers(file: Path, data: dict[str, list[Question]], paths: list[Path]) -> dict[str, list[tuple[Question, dict]]]:
    """By benchmark, the questions that a file answers and the answers, {cell: answer}, joined by id, never by order.

    The file: an answers.jsonl of a run; or JSON lines with an id (or question_id) and an answer (or text), as LLaVA's scripts
    write them. Raises InputError for an answer to no question, or a second one.
    """
    asked, given, only = defaultdict(list), {name: {} for name in data}, next(iter(data)) if len(data) == 1 else None
    for name, questions in data.items():
        for question, keys in zip(questions, llava_keys(name, questions, paths)):
            for key in {question.id, *keys}:
                asked[name, key].append(question)
    for i, line in enumerate(read_lines(file), 1):
        name = line.get("benchmark", only)
        if not isinstance(name, str) or name not in (*data, *BENCHMARKS):
            raise InputError(f"{file}: line {i} is of benchmark {name!r}; want --bench with the one it answers")
        if name not in data:                            # a run's answers may be of more benchmarks than are asked about
            continue
        id, prompt = str(line.get("id", line.get("question_id"))), str(line.get("prompt", ""))
        answers = line.get("answers", {"answers": line.get("answer", line.get("text"))})
        if not isinstance(answers, dict) or not answers or not all(isinstance(answer, str) for answer in answers.values()):
            raise InputError(f"{file}: line {i} {json.dumps(line)[:100]}: want id (or question_id) and answer (or text)")
        if given[name] and answers.keys() != (cells := next(iter(given[name].values())).keys()):
            raise InputError(f"{file}: line {i} has answers of {', '.join(answers)}, the lines before of {', '.join(cells)}")
        known = asked[name, llava_key(name, id, prompt)] or asked[name, id]
        if not known:
            raise InputError(f"{file}: line {i} answers question {id!r}, which {name} does not have; its ids are like "
                             f"{data[name][0].id!r}" + ", LLaVA's own need llava_pope_test.jsonl in --data" * (name == "pope"))
        question = next((q for q in known if q.id not in given[name]), None)
        if question is None:
            raise InputError(f"{file}: line {i} answers question {id!r} of {name} again")
        given[name][question.id] = answers
    if not any(given.values()):
        raise InputError(f"{file}: no answers to {', '.join(data)}")
    joined = {name: [(q, given[name][q.id]) for q in questions if q.id in given[name]] for name, questions in data.items()}
    images = Counter(question.image for question, _ in joined.get("mme", []))
    if alone := [image for image, answered in images.items() if answered == 1]:
        raise InputError(f"{file}: one question about {alone[0]} is answered, the other is not; want pairs")
    return {name: pairs for name, pairs in joined.items() if pairs}


def llava_key(benchmark: str, id: str, prompt: str) -> str:
    """What an answer of LLaVA's is known by. Its ids of MME ("OCR/0001.jpg") and TextVQA (the image's) repeat, so the question
    is a part of it, read off the prompt as its convert_answer_to_mme.py and eval_textvqa.py do."""
    text = next(line for line in prompt.split("\n") + [""] if not line.startswith(OCR.strip()))
    text = text.strip().removesuffix(YES_OR_NO).strip().lower()
    return f"{id.split('/')[0]}/{Path(id).stem}: {text}" if benchmark == "mme" else f"{id}: {text}"


def llava_keys(benchmark: str, questions: list[Question], paths: list[Path]) -> list[list[str]]:
    """For each question what LLaVA's answers may know it by; its ids of POPE are explained by llava_pope_test.jsonl alone."""
    if benchmark == "mme":
        return [[llava_key(benchmark, f"{q.group}/{q.image.name}", q.prompt)] for q in questions]
    if benchmark == "textvqa":
        return [[llava_key(benchmark, q.image.stem, q.prompt)] for q in questions]
    ids = defaultdict(list)
    if benchmark == "pope" and (file := find(paths, "llava_pope_test.jsonl")):
        for entry in read_lines(file, question_id=(str, int), image=str, text=str, category=str):
            ids[entry["category"], entry["image"], entry["text"].split("\n")[0]].append(str(entry["question_id"]))
    return [ids[q.group, q.image.name, q.prompt.split("\n")[0]] for q in questions]


# ---- files ------------------------------------------------------------------------------------------------------

def load_benchmark(name: str, data: Path, style: str | None = None) -> list[Question]:
    """All questions of a benchmark found in a folder, or of a .jsonl file. Raises InputError."""
    if name.endswith(".jsonl"):
        questions, paths = load_jsonl(Path(name)), []
    else:
        paths = paths_under(data)
        questions = BENCHMARKS[name](paths, style)
    if not questions:
        raise InputError((f"--data {data}: no {name} found in it" if paths else f"{name}: no questions in it") + unpacked(paths))
    first = {}
    for question in questions:
        twin = first.setdefault(question.id, question)
        if twin is not question:
            raise InputError(f"{name}: question {question.id} is there twice, in {twin.source} and in {question.source}")
        if re.search("[\ud800-\udfff]", question.prompt):
            raise InputError(f"{question.source}: question {question.id} holds half a character: {ascii(question.prompt)[:100]}")
        if not os.path.isfile(question.image):
            raise InputError(f"{question.image}: not found; question {question.id} of {name} is about it" + unpacked(paths))
    return questions


def paths_under(root: Path) -> list[Path]:
    """Every file and folder, sorted, links followed; hidden ones and macOS's copies left out."""
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder")
    def unreadable(error):
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")
    found, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        inner[:] = [] if real in seen else [name for name in inner if not name.startswith((".", "__MACOSX"))]
        seen.add(real)
        found += [Path(folder, name) for name in inner + names if not name.startswith(".")]
    return sorted(found)


def find(paths: list[Path], name: str) -> Path | None:
    found = [path for path in paths if path.name == name]
    if len(found) > 1:
        raise InputError(f"--data: {name} is there {len(found)} times, as {found[0]} and {found[1]}; want one")
    return found[0] if found else None


def unpacked(paths: list[Path]) -> str:
    zips = [str(path) for path in paths if path.suffix == ".zip"]
    return f"; not unpacked: {', '.join(zips)}" if zips else ""


def read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: not UTF-8 ({e.reason} at byte {e.start})")
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})")


def read_json(file: Path) -> dict:
    try:
        found = json.loads(read_text(file))
    except (ValueError, RecursionError) as e:           # not JSON, a number of thousands of digits, too deep
        raise InputError(f"{file}: not valid JSON ({e})")
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}, want a JSON object")
    return found


def read_lines(file: Path, **fields) -> list[dict]:
    """The objects of a file of JSON lines, each with the fields given, of the types given."""
    found = []
    for i, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                found.append(require(json.loads(line), file, f"line {i}", **fields))
            except InputError:
                raise
            except (ValueError, RecursionError) as e:
                raise InputError(f"{file}: line {i} is not valid JSON ({e})")
    return found


def require(entry, file: Path, where: str = "", **fields) -> dict:
    """The entry, if it is an object with these fields of these types; true and false are no numbers."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) and not isinstance(entry[name], bool)
                                              for name, kind in fields.items()):
        raise InputError(f"{file}: {where} {json.dumps(entry)[:100]}: want {', '.join(fields) or 'an object'}")
    return entry
