"""Answers made elsewhere are joined by id and scored officially; no image is needed."""
import json
import re

import pytest
from official import COCO, lines, official_files

from support.answers import score_answers
from support.benchmarks import OCR, POPE, SHORT, load_benchmark, paths_under
from tokprune import InputError


@pytest.fixture
def data(tmp_path):
    """Without a single image."""
    return official_files(tmp_path / "data", images=False)


def scored(data, benchmark, *entries):
    file = data.parent / "given.jsonl"
    file.write_text(lines(*entries))
    questions = {name: load_benchmark(name, data, images=False) for name in benchmark.split(",")}
    return score_answers(file, questions, paths_under(data))[benchmark]["answers"]


def llava(id, prompt, text):
    return {"question_id": id, "prompt": prompt + SHORT, "text": text, "answer_id": "x"}


def test_answers_are_joined_by_id_whatever_their_order(data, capsys):
    row = scored(data, "mme", {"id": "artwork/10002/1", "answer": "Yes"},
                 {"id": "OCR/0001/0", "answer": "Yes"}, {"id": "OCR/0001/1", "answer": "No"},
                 {"id": "artwork/10002/0", "answer": ""})
    assert row["score"] == 75 and row["totals"]["OCR"] == 200 and row["totals"]["artwork"] == 50
    assert (row["empty"], row["unparsed"], row["answered"], row["questions"]) == (1, 1, 4, 4)
    assert "mme: all 4 questions answered" in capsys.readouterr().out


def test_a_part_never_looks_like_the_whole(data, capsys):
    row = scored(data, "mme", {"id": "OCR/0001/0", "answer": "Yes"},
                 {"id": "OCR/0001/1", "answer": "No"})
    assert (row["answered"], row["questions"], row["totals"]["complete"]) == (2, 4, False)
    assert row["standard_error"] is None
    printed = capsys.readouterr().out
    assert "partial, 2 of its 4" in printed and "| answers | 100.0 | - |" in printed
    assert "the sums are of 1 of its 14 subtasks" in printed


def test_three_files_of_pope_partly_answered_are_not_complete(data):
    row = scored(data, "pope", *[{"id": f"{name}/1", "answer": "Yes"} for name in POPE])
    assert (row["answered"], row["questions"], row["totals"]["complete"]) == (3, 6, False)
    both = [{"id": f"{name}/{i}", "answer": "Yes"} for name in POPE for i in (1, 2)]
    assert scored(data, "pope", *both)["totals"]["complete"]


def test_llavas_answers_about_one_image_are_told_apart_by_their_prompts(data):
    row = scored(data, "mme", llava("OCR/0001.jpg", "Is it not?", "No"),
                 llava("OCR/0001.jpg", "Is it?", "No"))
    assert row["score"] == 50 and row["totals"]["OCR"] == 50
    file = data / "vqa/TextVQA_0.5.1_val.json"
    vqa = json.loads(file.read_text())
    other = {"question": "Who?", "question_id": 1, "answers": ["b"] * 10}
    vqa["data"].append(vqa["data"][0] | other)
    file.write_text(json.dumps(vqa))
    for form in ("{}" + OCR + "Acme, 5", "Reference OCR token: Acme, 5\n{}", "{}"):
        row = scored(data, "textvqa", llava("1", form.format("Who?"), "B"),
                     llava("1", form.format("What?"), "x"))
        assert row["score"] == 50 and row["answered"] == 2, form


def test_scienceqa_reports_the_questions_with_an_image_and_all_of_them(data, capsys):
    row = scored(data, "scienceqa", {"question_id": "7", "text": "The answer is B."},
                 {"question_id": "8", "text": "A"})
    assert row["score"] == 100 and (row["answered"], row["questions"]) == (1, 1)
    assert row["totals"]["all questions"] == 50
    assert row["totals"]["all questions answered"] == row["totals"]["all questions known"] == 2
    printed = capsys.readouterr().out
    assert "1 answered questions have no image and are left out above" in printed
    assert "1 of all 2 test questions right, 50.00 %; 0 not answered" in printed


def test_over_all_of_scienceqa_an_unanswered_question_counts_as_wrong(data, capsys):
    """As in LLaVA's script, but said."""
    problems = json.loads((data / "sqa/problems.json").read_text())
    (data / "sqa/problems.json").write_text(json.dumps(problems | {"10": problems["8"]}))
    (data / "sqa/pid_splits.json").write_text(json.dumps({"test": ["7", "8", "10"]}))
    row = scored(data, "scienceqa", {"id": "7", "text": "B"}, {"id": "8", "text": "B"})
    assert row["totals"]["all questions"] == pytest.approx(200 / 3)
    assert "2 of all 3 test questions right, 66.67 %; 1 not answered" in capsys.readouterr().out


def test_llavas_pope_ids_join_where_a_label_file_has_another_spelling(data, capsys):
    """The made-up label files spell imange, as the older official ones do."""
    ids = []
    for i, (name, thing) in enumerate([("popular", "dog"), ("random", "cat"), ("random", "dog")]):
        ids.append({"question_id": i, "image": COCO, "category": name,
                    "text": f"Is there a {thing} in the image?" + SHORT})
    (data / "llava_pope_test.jsonl").write_text(lines(*ids))
    row = scored(data, "pope", llava(0, "Is there a dog in the image?", "No"), llava(1, "?", "Yes"),
                 llava(2, "?", "Yes"))
    assert row["totals"]["accuracy popular"] == 100 and row["totals"]["accuracy random"] == 50
    assert row["totals"]["F1"] is None and (row["answered"], row["questions"]) == (3, 6)
    printed = capsys.readouterr().out
    assert "no mean of three files: no answers to coco_pope_adversarial.json" in printed


@pytest.mark.parametrize("bench, entries, message", [
    ("mme", [{"id": "OCR/0001/0", "answer": "Yes"}], "want pairs"),
    ("mme", [{"id": "OCR/0009/0", "answer": "Yes"}], "answers question 'OCR/0009/0', which mme"),
    ("mme", [{"question_id": "OCR/0001.jpg", "text": "Yes"}], "it has no prompt"),
    ("textvqa", [{"question_id": "1", "text": "Yes"}], "it has no prompt"),
    ("pope", [{"question_id": 17, "text": "Yes"}], "LLaVA's own need llava_pope_test.jsonl"),
    ("mme", [{"id": "OCR/0001/0", "answer": "Yes"}] * 2, "answers question 'OCR/0001/0' of mme ag"),
    ("mme", [{"id": "OCR/0001/0", "answer": 5}], "want id (or question_id) and answer (or text)"),
    ("mme", [5], "line 1 5: want an object"),
    ("mme,pope", [{"id": "OCR/0001/0", "answer": "Yes"}], "answer 1 is of benchmark None; want"),
    ("mme", [], "no answers"),
    ("scienceqa", [{"id": "8", "text": "A"}], "answers no question of scienceqa that has an image"),
    ("mme", [{"benchmark": "MME", "id": "OCR/0001/0"}], "answer 1 is of benchmark 'MME'"),
    ("mme", [{"id": "OCR/0001/0", "answers": {}}], "want id (or question_id) and answer"),
    ("mme", [{"id": "OCR/0001/0", "answer": "Yes"}, {"id": "OCR/0001/1", "answers": {"a": "No"}}],
     "answer 2 is of a, the ones before of answers")])
def test_answers_that_do_not_match_are_named(bench, entries, message, data):
    with pytest.raises(InputError, match=re.escape(message)) as e:
        scored(data, bench, *entries)
    assert "\n" not in str(e.value)
