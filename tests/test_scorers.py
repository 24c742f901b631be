"""Answers are read and scored as the official scripts do (golden/scorers.json: recorded)."""
import json
from pathlib import Path

import numpy as np
import pytest

from support.benchmarks import (COGNITION, PERCEPTION, Question, is_overlong, mme_totals, normalize,
                                parse_choice, parse_pope, parse_yes_no, pope_totals, score)

GOLDEN = Path(__file__).parent / "golden" / "scorers.json"
OFFICIAL = json.loads(GOLDEN.read_text())


def about(gold, metric, **more):
    return Question("0", Path(), "", gold, metric, **more)


def wrong(cases, read):
    """Every case that is read otherwise: (answer, what we read, what the official script does)."""
    return [(answer, read(answer), want) for answer, want in cases if read(answer) != want]


def test_textvqa_answers_are_normalized_as_officially():
    assert len(OFFICIAL["textvqa_normalised"]) > 400
    assert wrong(OFFICIAL["textvqa_normalised"], normalize) == []


@pytest.mark.parametrize("written, want", [
    ("dont", "don't"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
    ("'ows'at", "'ow's'at"), ("'owsat", "'owsat"), ("somebody'd", "somebodyd"), ("shes", "shes")])
def test_a_contraction_without_one_of_its_apostrophes_gets_it_back(written, want):
    """The official table lists these one by one, two apostrophes short is not in it."""
    assert normalize(written) == want


def test_textvqa_soft_accuracy_is_the_official_one():
    mismatches = []
    for case in OFFICIAL["textvqa_soft_accuracy"]:
        got = score(case["prediction"], about(case["answers"], "vqa"))
        if got != (normalize(case["prediction"]), case["score"]):
            mismatches.append((case, got))
    assert mismatches == []


def test_mme_answers_are_parsed_and_scored_as_officially():
    cases = OFFICIAL["mme_parsed"]
    assert wrong(cases, lambda answer: parse_yes_no(answer) or "other") == []
    for gold in ("Yes", "No"):
        question = about([gold], "yesno")
        points = [(answer, float(want == gold.lower())) for answer, want in cases]
        assert wrong(points, lambda answer: score(answer, question)[1]) == []


def test_pope_answers_are_parsed_and_scored_as_officially():
    cases = OFFICIAL["pope_parsed"]
    assert wrong(cases, parse_pope) == []
    points = [(answer, float(want == "no")) for answer, want in cases]
    assert wrong(points, lambda answer: score(answer, about(["No"], "pope"))[1]) == []


def test_scienceqa_answers_are_parsed_as_officially():
    assert wrong(OFFICIAL["scienceqa_parsed"], lambda a: parse_choice(a) or "FAILED") == []


def test_a_letter_that_is_no_choice_is_read_and_wrong():
    """The official script fails an answer without a letter; this one it reads."""
    assert score("The answer is Z.", about(["A"], "choice")) == ("Z", 0.0)


@pytest.mark.parametrize("answer, points", [("A Dog.", 1), ("a dog", 1), ("dog", 0),
                                            ("a dog...", 1), ("", 0)])
def test_exact_is_equality_but_for_case_and_final_full_stops(answer, points):
    assert score(answer, about(["a cat", "a dog"], "exact"))[1] == points


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


def mme(right):
    questions = []
    for group in PERCEPTION + COGNITION:
        for image in range(4):
            for answer in ("Yes", "No"):
                questions.append(Question(f"{group}/{image}/{answer}", Path(f"{group}{image}"), "",
                                          [answer], "yesno", group=group))
    return mme_totals(questions, np.array([right(q) for q in questions], float))


def test_mme_totals_of_a_perfect_and_of_a_constant_model():
    perfect = mme(lambda q: True)
    constant = mme(lambda q: q.gold == ["Yes"])
    half = mme(lambda q: q.image.name.endswith(("0", "1")) or q.gold == ["Yes"])
    assert (perfect["perception"], perfect["cognition"], perfect["sum"]) == (2000, 800, 2800)
    assert (constant["perception"], constant["cognition"], constant["sum"]) == (500, 200, 700)
    assert half["OCR"] == 75 + 50 and perfect["complete"]


def test_mme_totals_say_when_subtasks_are_missing():
    question = Question("OCR/1/0", Path("a"), "", ["Yes"], "yesno", group="OCR")
    assert not mme_totals([question], np.ones(1))["complete"]


def pope(answer, files=("random", "popular", "adversarial")):
    """Files of ten questions, of which yes is right for three, five and four."""
    questions = []
    for name in files:
        yes = {"random": 3, "popular": 5, "adversarial": 4}[name]
        questions += [Question(f"{name}/{i}", Path(), "", ["Yes" if i < yes else "No"], "pope",
                               group=name) for i in range(10)]
    scores = np.array([score(answer(q), q)[1] for q in questions])
    return pope_totals(questions, scores)


def test_pope_totals_worked_by_hand():
    """Yes to the first four of each: 3 of 3, 4 of 5 and 4 of 4 are hit, of 4 each time."""
    totals = pope(lambda q: "Yes" if int(q.id[-1]) < 4 else "No")
    assert totals["precision random"] == 75 and totals["recall random"] == 100
    assert totals["precision popular"] == 100 and totals["recall popular"] == 80
    assert totals["F1"] == pytest.approx(100 * (6 / 7 + 8 / 9 + 1) / 3)
    assert totals["accuracy"] == pytest.approx(100 * (0.9 + 0.9 + 1) / 3) and totals["yes"] == 40


def test_pope_of_a_model_that_only_says_no_is_nothing_and_no_error():
    totals = pope(lambda q: "No")
    assert totals["F1"] == totals["precision"] == totals["recall"] == totals["yes"] == 0
    assert totals["accuracy"] == 60 and pope(lambda q: "Yes")["recall"] == 100


def test_pope_has_no_mean_of_two_files():
    totals = pope(lambda q: "No", files=("random", "popular"))
    assert totals["F1"] is None and not totals["complete"] and totals["accuracy random"] == 70
