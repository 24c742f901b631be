"""VLMEvalKit's TSVs are read by their columns; images are read when they are needed."""
import base64
import csv
import io
import re

import numpy as np
import pytest
from PIL import Image

from support.benchmarks import LETTER, SHORT, load_benchmark, official_totals, remarks
from support.files import read_image
from tokprune import InputError


def image(color: str, side: int = 8) -> str:
    """Base64, as in a TSV, of far more than csv's usual 131,072 characters if the side is 200."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.paste(color, (0, 0, 1, 1))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


RED = image("red", 200)
BLUE = image("blue")
TEN = str(["nous les gosses", "dakota"] + ["dakota digital"] * 8)
ROW = {"image": BLUE, "question": "?"}
CHOICE = ROW | {"A": "x", "B": "y", "answer": "A"}


def load(tmp_path, name: str, *rows: dict, **options):
    """Load a file of these rows; index: a row's number, unless it has its own."""
    rows = [{"index": number} | row for number, row in enumerate(rows)]
    file = tmp_path / f"{name}.tsv"
    with file.open("w", newline="", encoding="utf-8") as f:
        columns = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(f, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return load_benchmark(str(file), tmp_path, **options)


def color_of(question) -> tuple:
    return read_image(question.image).convert("RGB").getpixel((0, 0))


def totals(questions, *answers):
    points = [question.points(answer) for question, answer in zip(questions, answers)]
    return official_totals(questions, np.array(points))


def test_mmes_pairs_share_an_image_and_get_the_official_totals(tmp_path):
    """The second row of a pair refers to the first one's image, in a cell with a space too; one
    image under two names is two pairs."""
    end = " Please answer yes or no."
    rows = [{"image": [RED, f"{i - 1} "][i % 2], "image_path": f"{i // 2}.jpg",
             "question": f"{i}? {end}", "answer": ["Yes", "No"][i % 2], "category": category}
            for i, category in enumerate(["OCR"] * 4 + ["posters"] * 2)]
    rows[4]["image"] = BLUE
    questions = load(tmp_path, "MME", *rows)
    assert [q.prompt for q in questions] == [f"{i}?{SHORT}" for i in range(6)]
    assert [color_of(q) for q in questions] == [(255, 0, 0)] * 4 + [(0, 0, 255)] * 2
    assert len({q.image for q in questions}) == 3
    found = totals(questions, "Yes", "No", "Yes", "Yes", "No", "no")
    assert (found["OCR"], found["posters"], found["perception"]) == (75 + 50, 50, 175)
    assert not found["complete"]
    assert remarks(questions) == ["2 of 14 subtasks",
                                  "asked in LLaVA's words and not VLMEvalKit's, metric yesno"]


def test_a_question_of_several_of_popes_categories_counts_in_each(tmp_path):
    rows = [("Yes", "adversarial,popular,random"), ("No", "random"), ("No", "popular"),
            ("No", "adversarial")]
    questions = load(tmp_path, "POPE", *[ROW | {"answer": answer, "category": category}
                                         for answer, category in rows])
    assert {q.metric for q in questions} == {"pope"}
    found = totals(questions, "Yes", "Yes", "No", "perhaps")
    assert found["F1 random"] == pytest.approx(200 / 3) and found["F1 popular"] == 100
    assert found["accuracy adversarial"] == 50 and found["complete"]
    assert found["F1"] == pytest.approx((200 / 3 + 100 + 200 / 3) / 3)


@pytest.mark.parametrize("path", ["7.jpg", "/elsewhere/images/TextVQA_VAL/7.jpg"])
def test_ten_answers_are_textvqas_and_images_may_lie_beside(path, tmp_path):
    row = {"index": 34602, "question": "WHAT is it?", "answer": TEN}
    folder = tmp_path / "images" / "TextVQA_VAL"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(folder / "7.jpg")
    [beside] = load(tmp_path, "TextVQA_VAL_local", row | {"image_path": path})
    [within] = load(tmp_path, "TextVQA_VAL", row | {"image": RED})
    assert beside.image.file == folder / "7.jpg" and color_of(within) == (255, 0, 0)
    for question in (beside, within):
        assert question.prompt == "What is it?" + SHORT and question.metric == "vqa"
        assert len(question.gold) == 10 and question.id == "34602"
        assert question.gold_normalized == "dakota digital"
        assert question.points("Dakota") == 0.3


def test_options_make_a_choice_asked_as_scienceqa(tmp_path):
    """An option called None is one, an empty one is none; a hint may have tabs and lines."""
    row = {"index": 5, "image": RED, "question": "Which?", "hint": "a\tb\n\"c\"", "A": "None",
           "B": "nan", "C": "", "D": "", "answer": "B", "category": "x", "split": "test"}
    first, second = load(tmp_path, "ScienceQA_TEST", row, row | {"index": 6, "hint": "",
                                                                 "image": "5", "C": "no"})
    assert first.prompt == 'Context: a\tb\n"c"\nWhich?\nA. None\nB. nan' + LETTER
    assert second.prompt == "Which?\nA. None\nB. nan\nC. no" + LETTER
    assert (first.metric, first.gold, first.group) == ("choice", ["B"], "")
    assert first.image == second.image and official_totals([first], np.ones(1)) == {}


def test_mmbench_is_right_where_every_rotation_is(tmp_path):
    row = CHOICE | {"index": 241}
    other = {"index": 1000241, "image": "241", "answer": "B", "A": "y", "B": "x"}
    questions = load(tmp_path, "MMBench_DEV_EN", row, CHOICE | {"index": 242}, row | other)
    assert totals(questions, "A", "A", "B")["circular"] == 100
    assert totals(questions, "A", "A", "A")["circular"] == 50


def test_the_rest_is_scored_as_exact_yes_or_no_included(tmp_path):
    questions = load(tmp_path, "GQA_TestDev_Balanced", *[
        ROW | {"answer": answer} for answer in ["yes", "left ", "[3, 'three']", "[x"]])
    assert {q.metric for q in questions} == {"exact"} and questions[0].prompt == "?" + SHORT
    assert [q.gold for q in questions] == [["yes"], ["left"], ["3", "three"], ["[x"]]


def test_a_row_without_an_image_is_no_question_and_unscored_ones_need_no_answer(tmp_path):
    rows = [ROW | {"image": image, "answer": ""} for image in ("", str([RED]))]
    [question] = load(tmp_path, "a", *rows, gold=False)
    assert (question.id, question.gold, question.metric) == ("1", [], "")
    assert color_of(question) == (255, 0, 0)


@pytest.mark.parametrize("answers, category, metric, group", [
    (["YES", "no"], "code_reasoning", "yesno", "code_reasoning"),
    (["Yes ", "No"], "Random, popular", "pope", "random,popular"),
    (["Yes", "red"], "", "exact", "")])
def test_spelling_changes_no_metric(answers, category, metric, group, tmp_path):
    """One capital made MME's and POPE's answers be compared as text, and hid their totals."""
    rows = [ROW | {"answer": answer, "category": category} for answer in answers]
    for question in load(tmp_path, "a", *rows):
        assert (question.metric, question.group) == (metric, group)


def test_one_row_of_nine_answers_among_tens_is_named(tmp_path):
    """The whole file was compared as text."""
    with pytest.raises(InputError, match="question 1: answers are .* want ten for vqa"):
        load(tmp_path, "a", *[ROW | {"answer": str(["a"] * n)} for n in (10, 9)])


@pytest.mark.parametrize("change, message", [
    ({"image": "7"}, "question 1: image is '7', which is no base64 and no row with an image"),
    ({"image": str([RED, BLUE])}, "question 1 has 2 images; want one"),
    ({"image": "A" * 80}, "cannot be read as an image"),
    ({"answer": "x"}, "question 1: answer is 'x', want one of A, B"),
    ({"index": 0}, "question 0 is a duplicate"),
    ({"B": "", "F": "z"}, "question 1 has options A, F; want at most A, B")])
def test_rows_that_are_not_right_are_named(change, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        for question in load(tmp_path, "a", CHOICE, CHOICE | change):
            read_image(question.image)


@pytest.mark.parametrize("content, message", [
    (b"id\tquestion\n1\t?\n", "has columns id, question; want index, question, and image"),
    (b"index\timage\tquestion\n1\t2\n", "a.tsv: the row at byte 21 has 2 cells; want 3"),
    (b"index\timage\tquestion\n1\t2\t\xff\n", "a.tsv: the row at byte 21 cannot be read"),
    # of three questions one was left, in silence
    (b'index\timage\tquestion\n1\t2\t"a"\n2\t2\t"b\n3\t2\tc\n',
     "a.tsv: the row at byte 29: a quote is never closed"),
    (b"", "no questions in it"), (None, "a.tsv: not found")])
def test_files_that_are_no_tsv_of_vlmevalkit_are_named(content, message, tmp_path):
    file = tmp_path / "a.tsv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_benchmark(str(file), tmp_path)
