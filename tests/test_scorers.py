"""Answers are read and scored as the official scripts do (golden/scorers.json: recorded)."""
import json
from pathlib import Path

import numpy as np
import pytest

from support.benchmarks import (SUBTASKS, Question, is_overlong, mme_totals, normalize,
                                parse_choice, parse_pope, parse_yes_no, pope_totals, remarks, score)

GOLDEN = Path(__file__).parent / "golden" / "scorers.json"
OFFICIAL = json.loads(GOLDEN.read_text())


def about(gold, metric):
    return Question("0", Path(), "", gold, metric)


@pytest.mark.parametrize("recorded, read", [
    ("textvqa_normalised", normalize), ("pope_parsed", parse_pope),
    ("mme_parsed", lambda answer: parse_yes_no(answer) or "other"),
    ("scienceqa_parsed", lambda answer: parse_choice(answer) or "FAILED")])
def test_answers_are_read_as_officially(recorded, read):
    assert OFFICIAL[recorded]
    assert [(answer, read(answer), want) for answer, want in OFFICIAL[recorded]
            if read(answer) != want] == []


def test_a_contraction_without_one_of_its_apostrophes_gets_it_back():
    """The official table lists these one by one, two apostrophes short is not in it."""
    for written, want in [("dont", "don't"), ("couldnt've", "couldn't've"), ("shes", "shes"),
                          ("couldn'tve", "couldn't've"), ("'ows'at", "'ow's'at"),
                          ("'owsat", "'owsat"), ("somebody'd", "somebodyd")]:
        assert normalize(written) == want


def test_textvqa_soft_accuracy_is_the_official_one():
    for case in OFFICIAL["textvqa_soft_accuracy"]:
        got = score(case["prediction"], about(case["answers"], "vqa"))
        assert got == (normalize(case["prediction"]), case["score"]), case


@pytest.mark.parametrize("metric, gold, answer, points", [
    ("exact", ["a cat", "a dog"], "A Dog.", 1), ("exact", ["a cat", "a dog"], "a dog...", 1),
    ("exact", ["a cat", "a dog"], "dog", 0), ("exact", ["a cat", "a dog"], "", 0),
    ("yesno", ["No"], "not sure", 1), ("yesno", ["Yes"], "Not sure, yes", 0),
    ("yesno", ["Yes"], "perhaps", 0), ("pope", ["yes"], "perhaps", 1), ("pope", ["no"], "No.", 1),
    ("choice", ["A"], "A. this", 1), ("choice", ["A"], "a", 0),
    ("choice", ["A"], "The answer is Z.", 0)])
def test_an_answer_is_right_where_it_is_read_as_gold_is(metric, gold, answer, points):
    assert score(answer, about(gold, metric))[1] == points


def test_gold_is_the_best_scoring_answer_and_as_a_whole_as_it_was_written():
    """"acme" has four of ten, once an article is dropped; "x" comes first and has three."""
    answers = ["x"] * 3 + ["Acme"] * 3 + ["The acme"] + ["y"] * 3
    assert about(answers, "vqa").gold_normalized == "acme"
    assert about(answers, "vqa").gold_written == "Acme"
    thousand = about(["1,000"] * 3 + ["1000"] * 2 + ["10"] * 5, "vqa")
    assert thousand.gold_normalized == "1000" and thousand.gold_written == "10"
    assert about(["1,000"] * 6 + ["1000"] * 4, "vqa").gold_written == "1,000"
    assert about(["yes"], "yesno").gold_normalized == "Yes"
    assert about(["B"], "choice").gold_written == "B"


@pytest.mark.parametrize("metric, gold, answer, want", [
    ("vqa", "7ns", "7nsa", True), ("vqa", "7ns", "7NS", False), ("vqa", "7ns", "7n", False),
    ("vqa", "a", "b", False), ("exact", "cat", "cats.", True), ("choice", "B", "B. cat", False),
    ("yesno", "Yes", "Yes, it is", False), ("yesno", "Yes", "perhaps", False)])
def test_an_overlong_answer_begins_with_a_right_one(metric, gold, answer, want):
    question = about([gold] * (10 if metric == "vqa" else 1), metric)
    assert is_overlong(score(answer, question)[0], question) == want


def test_mme_totals_of_a_perfect_and_of_a_constant_model():
    """Of four images a subtask, asked about twice."""
    questions = [Question("", Path(f"{group}{image}"), "", [answer], "yesno", group=group)
                 for group in SUBTASKS for image in range(4) for answer in ("Yes", "No")]
    assert remarks(questions) == ["14 of 14 subtasks"]
    for scores, want in [([1, 1] * 56, (2000, 800, 2800)), ([1, 0] * 56, (500, 200, 700))]:
        found = mme_totals(questions, np.array(scores))
        assert (found["perception"], found["cognition"], found["sum"]) == want
        assert found["complete"]


# ten questions a file, of which yes is right for three, five and four
POPE = [Question(str(i), Path(), "", ["yes" if i < yes else "no"], "pope", group=name)
        for name, yes in {"random": 3, "popular": 5, "adversarial": 4}.items() for i in range(10)]


def pope(answer, questions=POPE):
    return pope_totals(questions, np.array([q.points(answer(q)) for q in questions]))


def test_pope_totals_worked_by_hand():
    """Yes to the first four of each: 3 of 3, 4 of 5 and 4 of 4 are hit, of 4 each time."""
    totals = pope(lambda q: "Yes" if int(q.id) < 4 else "No")
    assert totals["precision random"] == 75 and totals["recall random"] == 100
    assert totals["precision popular"] == 100 and totals["recall popular"] == 80
    assert totals["F1"] == pytest.approx(100 * (6 / 7 + 8 / 9 + 1) / 3)
    assert totals["accuracy"] == pytest.approx(100 * (0.9 + 0.9 + 1) / 3) and totals["yes"] == 40
    assert totals["complete"]


def test_pope_of_a_model_that_only_says_no_is_nothing_and_two_files_have_no_mean():
    totals = pope(lambda q: "No")
    assert totals["F1"] == totals["precision"] == totals["recall"] == totals["yes"] == 0
    assert totals["accuracy"] == 60
    totals = pope(lambda q: "No", POPE[:20])
    assert totals["F1"] is None and not totals["complete"] and totals["accuracy random"] == 70
