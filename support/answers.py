"""Answers made elsewhere: joined to their questions by id, never by order, and scored officially.

A file is an answers.jsonl of a run, or JSON lines with an id (or question_id) and an answer (or
text), as LLaVA's scripts write them. No image is needed, and no model runs.
"""
import json
from pathlib import Path

import numpy as np

from support.benchmarks import (BENCHMARKS, COGNITION, COLUMNS, OCR, PERCEPTION, POPE, TOTALS,
                                YES_OR_NO, Question, find, images_of, score)
from support.files import read_lines
from support.report import number, part_of, print_heads, print_row, total
from support.statistics import standard_error
from tokprune import InputError


def score_answers(file: Path, data: dict[str, list[Question]], paths: list[Path]) -> dict:
    """Print a table for each benchmark that the file answers -> {benchmark: {cell: row}}.

    A cell is one of several answers a line may hold. Raises InputError.
    """
    scored = {}
    for benchmark, answered in join_answers(file, data, paths).items():
        with_image = [pair for pair in answered if pair[0].group != "text"]
        if not with_image:
            raise InputError(f"{file}: answers no question of {benchmark} that has an image")
        known = sum(question.group != "text" for question in data[benchmark])
        cells = answered[0][1]
        rows = {cell: score_cell(benchmark, with_image, known, cell) for cell in cells}
        print(f"\n{benchmark}: {part_of(len(with_image), known)} answered\n")
        print_rows(benchmark, rows)
        print_missing(benchmark, {question.group for question, _ in with_image})
        if len(answered) > len(with_image):
            score_without_image(benchmark, answered, len(data[benchmark]), rows)
        scored[benchmark] = rows
    return scored


def print_rows(benchmark: str, rows: dict[str, dict]):
    totals = COLUMNS.get(benchmark, ())
    print_heads([benchmark, "score", "±", *totals, "empty", "unparsed"])
    for cell, row in rows.items():
        print_row([cell, number(row["score"]), number(row["standard_error"])]
                  + [total(row["totals"][name]) for name in totals]
                  + [str(row["empty"]), str(row["unparsed"])])
    print()


def score_cell(benchmark: str, answered: list, known: int, cell: str) -> dict:
    """The row of a cell: score, error, totals, odd answers."""
    questions = [question for question, _ in answered]
    answers = [given[cell] for _, given in answered]
    parsed = []
    points = []
    for question, answer in zip(questions, answers):
        read, value = score(answer, question)
        parsed.append(read)
        points.append(value)
    percent = 100 * np.array(points)
    totals = {}
    if benchmark in TOTALS:
        totals = TOTALS[benchmark](questions, np.array(points))
        totals["complete"] = totals["complete"] and len(questions) == known
    return {"score": float(percent.mean()),
            "standard_error": standard_error(percent, images_of(questions)), "totals": totals,
            "answered": len(questions), "questions": known,
            "empty": sum(not answer.strip() for answer in answers),
            "unparsed": parsed.count(None)}


def print_missing(benchmark: str, groups: set[str]):
    """A sum or a mean over a part of the subtasks or files says so."""
    if benchmark == "mme" and len(groups) < len(PERCEPTION + COGNITION):
        print(f"mme: the sums are of {len(groups)} of its {len(PERCEPTION + COGNITION)} subtasks\n")
    missing = [f"coco_pope_{name}.json" for name in POPE if name not in groups]
    if benchmark == "pope" and missing:
        print(f"pope: no mean of three files: no answers to {' and '.join(missing)}\n")


def score_without_image(benchmark: str, answered: list, known: int, rows: dict):
    """ScienceQA's questions without an image do not count in the score. The official accuracy over
    all test questions is printed too; an unanswered one is wrong."""
    others = sum(question.group == "text" for question, _ in answered)
    unanswered = known - len(answered)
    print(f"{benchmark}: {others} answered questions have no image and are left out above")
    for cell, row in rows.items():
        right = sum(score(given[cell], question)[1] for question, given in answered)
        percent = 100 * right / known
        row["totals"] |= {"all questions": percent, "all questions answered": len(answered),
                          "all questions known": known}
        print(f"{benchmark}, {cell}: {right:.0f} of all {known} test questions right, "
              f"{percent:.2f} %; {unanswered} not answered, counted as wrong")
    print()


def join_answers(file: Path, data: dict[str, list[Question]], paths: list[Path]) -> dict:
    """By benchmark, [(question, {cell: answer})] in the order of the questions.

    Raises InputError for an answer to no question, or a second one.
    """
    asked = known_as(data, paths)
    given = {name: {} for name in data}
    for answer_number, line in enumerate(read_lines(file), 1):
        about = f"{file}: answer {answer_number}"
        benchmark = benchmark_of(line, data, about)
        if benchmark not in data:           # a run may answer more benchmarks than are asked about
            continue
        answers = answers_of(line, about)
        others = given[benchmark]
        if others:
            cells = next(iter(others.values()))
            if answers.keys() != cells.keys():
                raise InputError(f"{about} is of {', '.join(answers)}, the ones before of "
                                 f"{', '.join(cells)}")
        question = question_of(line, benchmark, data, asked, others, about)
        others[question.id] = answers
    if not any(given.values()):
        raise InputError(f"{file}: no answers to {', '.join(data)}")
    joined = {}
    for benchmark, questions in data.items():
        answers = given[benchmark]
        if answers:
            joined[benchmark] = [(q, answers[q.id]) for q in questions if q.id in answers]
    check_pairs(joined.get("mme", []), file)
    return joined


def benchmark_of(line: dict, data: dict, about: str) -> str:
    """Raises InputError if it is not said which."""
    only = next(iter(data)) if len(data) == 1 else None
    benchmark = line.get("benchmark", only)
    if not isinstance(benchmark, str) or benchmark not in (*data, *BENCHMARKS):
        raise InputError(f"{about} is of benchmark {benchmark!r}; want --bench with the one it "
                         "answers")
    return benchmark


def answers_of(line: dict, about: str) -> dict[str, str]:
    """{cell: answer} of a line. Raises InputError."""
    answers = line.get("answers", {"answers": line.get("answer", line.get("text"))})
    fits = isinstance(answers, dict) and len(answers) > 0
    if not fits or not all(isinstance(answer, str) for answer in answers.values()):
        raise InputError(f"{about} {json.dumps(line)[:100]}: want id (or question_id) and answer "
                         "(or text)")
    return answers


def question_of(line: dict, benchmark: str, data: dict, asked: dict, others: dict,
                about: str) -> Question:
    """The question that a line answers, by its id, or by what LLaVA's scripts know it by."""
    id = str(line.get("id", line.get("question_id")))
    key = llava_key(benchmark, id, str(line.get("prompt", "")))
    known = asked.get((benchmark, key)) or asked.get((benchmark, id))
    if not known:
        hint = ""
        if benchmark in ("mme", "textvqa") and "prompt" not in line:
            hint = "; it has no prompt, which tells the questions of LLaVA's ids apart"
        elif benchmark == "pope":
            hint = ", LLaVA's own need llava_pope_test.jsonl in --data"
        raise InputError(f"{about} answers question {id!r}, which {benchmark} does not have; its "
                         f"ids are like {data[benchmark][0].id!r}{hint}")
    for question in known:
        if question.id not in others:
            return question
    raise InputError(f"{about} answers question {id!r} of {benchmark} again")


def check_pairs(answered: list, file: Path):
    """MME's acc+ needs both questions of an image."""
    images = {}
    for question, _ in answered:
        images[question.image] = images.get(question.image, 0) + 1
    for image, count in images.items():
        if count == 1:
            raise InputError(f"{file}: one question about {image} is answered, the other is not; "
                             "want pairs")


# ---- what LLaVA's answers know a question by -----------------------------------------------------

def known_as(data: dict, paths: list[Path]) -> dict[tuple, list[Question]]:
    """(benchmark, id or key) -> the questions known as that."""
    asked = {}
    for benchmark, questions in data.items():
        pope_ids = llava_pope_ids(paths) if benchmark == "pope" else {}
        for question in questions:
            keys = {question.id}
            if benchmark == "mme":
                keys.add(llava_key("mme", f"{question.group}/{question.image.name}",
                                   question.prompt))
            elif benchmark == "textvqa":
                keys.add(llava_key("textvqa", question.image.stem, question.prompt))
            elif benchmark == "pope":
                place = question.group, question.image.name, first_line(question.prompt)
                keys |= set(pope_ids.get(place, []))
            for key in keys:
                asked.setdefault((benchmark, key), []).append(question)
    return asked


def llava_key(benchmark: str, id: str, prompt: str) -> str:
    """LLaVA's ids of MME ("OCR/0001.jpg") and TextVQA (the image's) repeat, so the question is a
    part of the key, read off the prompt as convert_answer_to_mme.py and eval_textvqa.py do."""
    lines = [line for line in prompt.split("\n") if not line.startswith(OCR.strip())]
    text = lines[0] if lines else ""
    text = text.strip().removesuffix(YES_OR_NO).strip().lower()
    if benchmark == "mme":
        return f"{id.split('/')[0]}/{Path(id).stem}: {text}"
    return f"{id}: {text}"


def llava_pope_ids(paths: list[Path]) -> dict[tuple, list[str]]:
    """LLaVA's ids by category, image and question, which llava_pope_test.jsonl alone explains."""
    file = find(paths, "llava_pope_test.jsonl")
    ids = {}
    if file:
        for entry in read_lines(file, question_id=(str, int), image=str, text=str, category=str):
            place = entry["category"], entry["image"], first_line(entry["text"])
            ids.setdefault(place, []).append(str(entry["question_id"]))
    return ids


def first_line(text: str) -> str:
    """The question itself. Older label files spell "image" as "imange" in 246 of them."""
    return text.split("\n")[0].replace("imange", "image")
