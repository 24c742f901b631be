"""Answers are read and scored as officially; official files are read as they are; wrong ones are named; answers made elsewhere."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import official_files

from benchmarks import (BENCHMARKS, COGNITION, LETTER, OCR, PERCEPTION, SHORT, Question, load_benchmark, load_jsonl, mme_totals, normalise,
                        parse_choice, parse_pope, parse_yes_no, paths_under, pope_totals, score)
from eval import main
from tokprune import InputError

ROOT = Path(__file__).parents[1]
OFFICIAL = json.loads((ROOT / "tests" / "golden" / "scorers.json").read_text())     # recorded from the official code


def about(answers, metric, **more):
    return Question("0", Path(), "", answers, metric, **more)


# ---- scorers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, want", OFFICIAL["textvqa_normalised"])
def test_textvqa_answers_are_normalised_as_officially(answer, want):
    assert normalise(answer) == want


@pytest.mark.parametrize("case", OFFICIAL["textvqa_soft_accuracy"])
def test_textvqa_soft_accuracy_is_the_official_one(case):
    assert score(case["prediction"], about(case["answers"], "vqa")) == (normalise(case["prediction"]), case["score"])


@pytest.mark.parametrize("answer, want", OFFICIAL["mme_parsed"])
def test_mme_answers_are_parsed_as_officially(answer, want):
    assert (parse_yes_no(answer, None) or "other") == want
    assert score(answer, about(["Yes"], "yesno"))[1] == (want == "yes") and score(answer, about(["No"], "yesno"))[1] == (want == "no")


@pytest.mark.parametrize("answer, want", OFFICIAL["pope_parsed"])
def test_pope_answers_are_parsed_as_officially(answer, want):
    assert parse_pope(answer, None) == want and score(answer, about(["No"], "pope")) == (want, float(want == "no"))


@pytest.mark.parametrize("answer, want", OFFICIAL["scienceqa_parsed"])
def test_scienceqa_answers_are_parsed_as_officially(answer, want):
    """A letter that is none of the question's choices, the official F and, of two choices, C, is no answer."""
    assert (parse_choice(answer, about(["A"], "choice")) or "FAILED") == (want if want in "ABCDE" else "FAILED")
    assert parse_choice(answer, about(["A"], "choice", choices=2)) == (want if want in "AB" else None)


def test_gold_answer_is_the_one_most_annotators_gave():
    assert about(["Acme"] * 3 + ["The acme"] + ["x"] * 3 + ["y"] * 3, "vqa").gold == "acme"
    assert about(["Yes"], "yesno").gold == "Yes" and about(["no"], "yesno").gold == "No" and about(["B"], "choice").gold == "B"


@pytest.mark.parametrize("answer, points", [("A Dog.", 1), ("a dog", 1), ("dog", 0), ("a dog..", 0), ("", 0)])
def test_exact_is_equality_but_for_case_and_a_full_stop(answer, points):
    assert score(answer, about(["a cat", "a dog"], "exact"))[1] == points


def mme(right):
    questions = [Question(f"{g}/{i}/{j}", Path(f"{g}{i}"), "", ["Yes", "No"][j:j + 1], "yesno", group=g)
                 for g in PERCEPTION + COGNITION for i in range(4) for j in range(2)]
    return mme_totals(questions, np.array([right(q) for q in questions], float))


def test_mme_totals_of_a_perfect_and_of_a_constant_model():
    perfect, constant = mme(lambda q: 1), mme(lambda q: q.answers == ["Yes"])
    assert (perfect["perception"], perfect["cognition"], perfect["sum"]) == (2000, 800, 2800)
    assert (constant["perception"], constant["cognition"], constant["sum"]) == (500, 200, 700)
    assert mme(lambda q: q.image.name.endswith(("0", "1")) or q.answers == ["Yes"])["OCR"] == 75 + 50


def pope(said):
    """Two files of ten questions, three of them yes in the first and five in the second."""
    questions = [Question(f"{name}/{i}", Path(), "", ["Yes" if i < yes else "No"], "pope", group=name)
                 for name, yes in (("random", 3), ("popular", 5)) for i in range(10)]
    return pope_totals(questions, np.array([score(said(q), q)[1] for q in questions]))


def test_pope_totals_worked_by_hand():
    """Yes to the first four of each: 3 of 3 found with 4 said, 4 of 5 found with 4 said."""
    found = pope(lambda q: "Yes" if int(q.id[-1]) < 4 else "No")
    assert found["precision random"] == 75 and found["recall random"] == 100 and found["F1 random"] == pytest.approx(100 * 6 / 7)
    assert found["precision popular"] == 100 and found["recall popular"] == 80 and found["F1 popular"] == pytest.approx(100 * 8 / 9)
    assert found["F1"] == pytest.approx(100 * (6 / 7 + 8 / 9) / 2) and found["accuracy"] == 90 and found["yes"] == 40


def test_pope_of_a_model_that_only_says_no_is_nothing_and_no_error():
    found = pope(lambda q: "No")
    assert found["F1"] == found["precision"] == found["recall"] == found["yes"] == 0 and found["accuracy"] == 60
    assert pope(lambda q: "Yes")["recall"] == 100


# ---- official files ---------------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path):
    return official_files(tmp_path / "data")


def prompts(data, name, style=None):
    return [q.prompt for q in load_benchmark(name, data, style)]


def test_official_files_are_found_and_asked_as_llavas_scripts_ask(data):
    assert prompts(data, "mme") == ["Is it?" + SHORT, "Is it not?" + SHORT, "A cat?" + SHORT, "A dog?" + SHORT]
    assert [q.id for q in load_benchmark("mme", data)] == ["OCR/0001/0", "OCR/0001/1", "artwork/10002/0", "artwork/10002/1"]
    assert prompts(data, "textvqa") == ["What?" + SHORT]
    assert prompts(data, "scienceqa") == ["Context: Look.\nWhich?\nA. this\nB. that" + LETTER]
    assert [(q.answers, q.choices) for q in load_benchmark("scienceqa", data)] == [(["B"], 2)]
    assert prompts(data, "pope") == ["Is there a cat in the image?" + SHORT, "Is there a dog in the image?" + SHORT] * 3
    assert [q.id for q in load_benchmark("pope", data)][:3] == ["random/1", "random/2", "popular/1"]
    assert all(q.image.exists() for name in BENCHMARKS for q in load_benchmark(name, data))


def test_prompt_styles_differ_where_the_tools_do(data):
    assert prompts(data, "textvqa", "llava") == ["What?\nReference OCR token: Acme, 5" + SHORT]
    assert prompts(data, "textvqa", "lmms-eval") == ["What?" + SHORT]
    assert prompts(data, "mme", "lmms-eval")[0] == "Is it? Please answer yes or no." + SHORT
    (data / "vqa" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(InputError, match="there is neither TextVQA_Rosetta_OCR_v0.2_val.json nor llava_textvqa_val_v051_ocr.jsonl"):
        prompts(data, "textvqa", "llava")
    line = {"question_id": "1", "image": "1.jpg", "text": "What?" + OCR + "ACME" + SHORT}
    (data / "llava_textvqa_val_v051_ocr.jsonl").write_text(json.dumps(line) + "\n")
    assert prompts(data, "textvqa", "llava") == ["What?\nReference OCR token: ACME" + SHORT]


def test_linked_folders_are_walked_and_loops_are_not(data, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "MME").symlink_to(data / "MME")
    (tmp_path / "links" / "loop").symlink_to(tmp_path / "links")
    assert len(load_benchmark("mme", tmp_path / "links")) == 4
    assert len([path for path in paths_under(tmp_path / "links") if path.name == "0001.txt"]) == 1


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


OWN = {"id": "x", "image": "1.jpg", "question": "What?", "answers": ["Yes"], "metric": "yesno"}


@pytest.mark.parametrize("change, message", [
    (lambda d: (d / "MME/OCR/0001.jpg").unlink(), "0001.txt: no image 0001.jpg"),
    (lambda d: (d / "MME/OCR/0001.txt").unlink(), "OCR: no .txt with questions in it"),
    (lambda d: (d / "MME/posters").mkdir(), "posters: no .txt with questions in it"),
    (lambda d: (d / "MME/OCR/0001.txt").write_text("Is it? Yes\nIs it not?\tNo\n"), "0001.txt: holds ['Is it? Yes', "),
    (lambda d: (d / "MME/OCR/0001.txt").write_text("Is it?\tYes\n"), "want two lines"),
    (lambda d: (d / "MME/OCR/0001.txt").write_bytes(b"Is it \xe9?\tYes\nIs it not?\tNo\n"), "0001.txt: not UTF-8"),
    (lambda d: shutil.copytree(d / "MME/OCR", d / "copy" / "OCR"), "question OCR/0001/0 is there twice"),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text('{"data": 5}'), 'the whole {"data": 5}: want data'),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text('{"data": ["x"]}'), 'data[0] "x": want question, question_id, image_id, answers'),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text('[]'), "holds a list, want a JSON object"),
    (lambda d: (d / "vqa/train_images/1.jpg").unlink(), "1.jpg: not found; question 0 of textvqa"),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [
        {"question": "?", "question_id": 7, "image_id": "1", "answers": ["a"]}]})), "question 7: answers are ['a'], want a list of ten"),
    (lambda d: shutil.copy(d / "vqa/TextVQA_0.5.1_val.json", d), "TextVQA_0.5.1_val.json is there 2 times"),
    (lambda d: (shutil.rmtree(d / "vqa/train_images"), (d / "vqa/train_val_images.zip").touch()), "not unpacked: "),
    (lambda d: (shutil.rmtree(d / "pope"), (d / "pope.zip").touch()), "no pope found in it; not unpacked: "),
    (lambda d: (d / "pope/coco_pope_popular.json").unlink(), "without coco_pope_popular.json; POPE's F1 is the mean of three"),
    (lambda d: (d / "pope/coco_pope_popular.json").write_text('{"question_id": 1}'), "coco_pope_popular.json: line 1"),
    (lambda d: (d / "pope/coco_pope_popular.json").write_text("{\n"), "coco_pope_popular.json: line 1 is not valid JSON"),
    (lambda d: (d / "coco/val2014/COCO_val2014_000000000042.jpg").unlink(), "COCO_val2014_000000000042.jpg: not found"),
    (lambda d: (d / "pope/coco_pope_random.json").write_text((d / "pope/coco_pope_random.json").read_text() * 2), "random/1 is there twice"),
    (lambda d: (d / "sqa/images/test/7/image.png").unlink(), "image.png: not found; question 7 of scienceqa"),
    (lambda d: (d / "sqa/pid_splits.json").write_text('{"test": ["70"]}'), "problems.json: question 70 null: want question, choices"),
    (lambda d: (d / "sqa/pid_splits.json").unlink(), "problems.json: is here, pid_splits.json is not"),
    (lambda d: (d / "sqa/problems.json").write_text(json.dumps({"7": {"question": "?", "choices": ["x", None], "answer": 0, "image": "i"},
                                                              "8": {"question": "?", "choices": ["x"], "answer": 0}})), "want strings"),
    (lambda d: (d / "sqa/problems.json").write_text(json.dumps({"7": {"question": "?", "choices": ["x", "y"], "answer": True, "image": "i"}})),
     "question 7 {"),
    (lambda d: (d / "MME/OCR/0002.jpg").write_bytes(b"x"), "0002.jpg: want one 0002.txt for one image 0002; beside it is nothing"),
    (lambda d: shutil.copy(d / "MME/OCR/0001.jpg", d / "MME/OCR/0001.png"), "want one 0001.txt for one image 0001; beside it is"),
    (lambda d: (d / "pope/coco_pope_popular.json").write_text("\n"), "coco_pope_popular.json: is empty"),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [
        {"question": "?", "question_id": None, "image_id": "1", "answers": ["a"] * 10}]})), "data[0]"),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [
        {"question": "\ud83d?", "question_id": 1, "image_id": "1", "answers": ["a"] * 10}]})), "holds half a character"),
    (lambda d: (d / "vqa/TextVQA_0.5.1_val.json").write_text('{"data": ' + "[" * 100000), "not valid JSON"),
    (lambda d: (d / "sqa/pid_splits.json").write_text('{"test": 3}'), 'pid_splits.json: the whole {"test": 3}: want test'),
    (lambda d: (d / "sqa/problems.json").write_text(json.dumps({"7": {"question": "?", "choices": ["x"], "answer": 1, "image": "image.png"},
                                                              "8": {"question": "?", "choices": ["x"], "answer": 0}})),
     "question 7: answer is 1 of 1 choices")])
def test_wrong_data_is_named(change, message, data):
    change(data)
    with pytest.raises(InputError, match=re.escape(message)) as e:
        for name in BENCHMARKS:
            load_benchmark(name, data)
    assert "\n" not in str(e.value)


def test_a_file_of_ones_own_is_read_and_scored(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "1.jpg")
    (tmp_path / "own.jsonl").write_text(lines(
        OWN, OWN | {"id": 2, "answers": ["a"] * 9 + ["red"], "metric": "vqa"}, OWN | {"id": "3", "answers": ["B"], "metric": "choice"},
        OWN | {"id": "4", "answers": ["a cat"], "metric": "exact"}))
    questions = load_benchmark(str(tmp_path / "own.jsonl"), tmp_path)
    assert [q.id for q in questions] == ["x", "2", "3", "4"] and all(q.prompt == "What?" for q in questions)
    assert [score(answer, q)[1] for answer, q in zip(["yes!", "Red", "B. x", "A cat."], questions)] == [1, 0.3, 1, 1]


@pytest.mark.parametrize("change, message", [
    ({"metric": "rouge"}, "metric is 'rouge', want one of vqa, exact, yesno, choice"), ({"image": "2.jpg"}, "2.jpg: not found"),
    ({"answers": []}, "answers are []"), ({"answers": "Yes"}, "want id, image, question, answers, metric"), ({"answers": [5]}, "answers are [5]"),
    ({"metric": "vqa"}, "1 answers, want ten"), ({"answers": ["maybe"]}, "the answer is 'maybe', want yes or no"), ({"id": "y"}, "y is there twice"),
    ({"answers": ["yes", "no"]}, "2 answers, want ten for metric vqa, one for yesno"), ({"answers": [""], "metric": "exact"}, "none empty"),
    ({"answers": ["The answer is B."], "metric": "choice"}, "a letter for choice"), ({"image": "x" * 5000}, ": not found"), ({"image": "."}, ": not found"),
    ({"id": True}, "want id, image, question")])
def test_wrong_lines_of_ones_own_file_are_named(change, message, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "1.jpg")
    (tmp_path / "own.jsonl").write_text(lines(OWN, OWN | {"id": "y"}, OWN | {"id": "z"} | change))
    with pytest.raises(InputError, match=re.escape(message)):
        load_benchmark(str(tmp_path / "own.jsonl"), tmp_path)


# ---- answers made elsewhere -------------------------------------------------------------------------------------

def score_file(capsys, tmp_path, data, bench, *entries):
    (tmp_path / "given.jsonl").write_text(lines(*entries))
    main(["--score", str(tmp_path / "given.jsonl"), "--data", str(data), "--bench", bench])
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])["benchmarks"][bench]["answers"]


def test_answers_are_joined_by_id_whatever_their_order(capsys, tmp_path, data):
    printed, row = score_file(capsys, tmp_path, data, "mme", {"id": "artwork/10002/1", "answer": "Yes"}, {"id": "OCR/0001/0", "answer": "Yes"},
                              {"id": "OCR/0001/1", "answer": "No"}, {"id": "artwork/10002/0", "answer": ""})
    assert row["score"] == 75 and row["totals"]["OCR"] == 200 and row["totals"]["artwork"] == 50 and row["totals"]["sum"] == 250
    assert (row["empty"], row["unparsed"]) == (1, 1) and "mme: all 4 questions answered" in printed
    printed, row = score_file(capsys, tmp_path, data, "scienceqa", {"question_id": "7", "text": "The answer is B."})
    assert row["score"] == 100


def test_llavas_own_answers_are_told_apart_by_their_prompts(capsys, tmp_path, data):
    """Its ids repeat: one for both questions of an MME image, an image's for every question of TextVQA."""
    answer = lambda id, prompt, text: {"question_id": id, "prompt": prompt + SHORT, "text": text, "answer_id": "x", "model_id": "llava"}
    _, row = score_file(capsys, tmp_path, data, "mme", answer("OCR/0001.jpg", "Is it not?", "No"), answer("OCR/0001.jpg", "Is it?", "No"))
    assert row["score"] == 50 and row["totals"]["OCR"] == 50
    vqa = json.loads((data / "vqa/TextVQA_0.5.1_val.json").read_text())
    vqa["data"].append(vqa["data"][0] | {"question": "Who?", "question_id": 1, "answers": ["b"] * 10})
    (data / "vqa/TextVQA_0.5.1_val.json").write_text(json.dumps(vqa))
    for form in ("{}" + OCR + "Acme, 5", "Reference OCR token: Acme, 5\n{}", "{}"):
        printed, row = score_file(capsys, tmp_path, data, "textvqa", answer("1", form.format("Who?"), "B"), answer("1", form.format("What?"), "x"))
        assert row["score"] == 50 and "all 2 questions" in printed, form
    own = [{"question_id": i, "image": "COCO_val2014_000000000042.jpg", "category": name, "text": f"Is there a {thing} in the image?" + SHORT}
           for i, (name, thing) in enumerate([("popular", "dog"), ("random", "cat"), ("random", "dog")])]
    (data / "llava_pope_test.jsonl").write_text(lines(*own))
    printed, row = score_file(capsys, tmp_path, data, "pope", answer(0, "Is there a dog in the image?", "No"), answer(1, "?", "Yes"), answer(2, "?", "Yes"))
    assert row["totals"]["accuracy popular"] == 100 and row["totals"]["accuracy random"] == 50 and "partial, 3 of its 6" in printed


def test_a_runs_own_answers_score_as_the_run_did(capsys, tmp_path):
    main(["--limit", "6", "--method", "random", "--seeds", "2", "--out", str(tmp_path / "run")])
    want = json.loads(capsys.readouterr().out.splitlines()[-1])["benchmarks"]
    main(["--score", str(tmp_path / "run" / "answers.jsonl")])
    got = json.loads(capsys.readouterr().out.splitlines()[-1])["benchmarks"]
    for benchmark, rows in want.items():
        by = {row["schedule"]: row for row in rows}
        assert list(got[benchmark]) == ["unpruned", "random@0=0 seed 0", "random@20:0.9 seed 0", "random@20:0.9 seed 1"]
        assert got[benchmark]["unpruned"]["score"] == by[""]["score"] and got[benchmark]["unpruned"]["totals"] == by[""]["totals"]
        seeds = [got[benchmark][f"random@20:0.9 seed {seed}"]["score"] for seed in range(2)]
        assert np.mean(seeds) == pytest.approx(by["random@20:0.9"]["score"])


@pytest.mark.parametrize("bench, entries, message", [
    ("mme", [{"id": "OCR/0001/0", "answer": "Yes"}], "want pairs"),
    ("mme", [{"id": "OCR/0009/0", "answer": "Yes"}], "line 1 answers question 'OCR/0009/0', which mme does not have"),
    ("pope", [{"question_id": 17, "text": "Yes"}], "LLaVA's own need llava_pope_test.jsonl"),
    ("mme", [{"id": "OCR/0001/0", "answer": "Yes"}] * 2, "line 2 answers question 'OCR/0001/0' of mme again"),
    ("mme", [{"id": "OCR/0001/0", "answer": 5}], "want id (or question_id) and answer (or text)"),
    ("mme", [5], "line 1 5: want an object"), ("mme,pope", [{"id": "OCR/0001/0", "answer": "Yes"}], "line 1 is of benchmark None; want --bench"), ("mme", [], "no answers"),
    ("mme", [{"benchmark": "MME", "id": "OCR/0001/0", "answer": "Yes"}], "line 1 is of benchmark 'MME'"), ("mme", [{"benchmark": ["x"]}], "line 1"),
    ("mme", [{"id": "OCR/0001/0", "answers": {}}], "want id (or question_id) and answer"),
    ("mme", [{"id": "OCR/0001/0", "answer": "Yes"}, {"id": "OCR/0001/1", "answers": {"mine": "No"}}],
     "line 2 has answers of mine, the lines before of answers")])
def test_answers_that_do_not_match_are_named(bench, entries, message, tmp_path, data):
    (tmp_path / "given.jsonl").write_text(lines(*entries))
    with pytest.raises(InputError, match=re.escape(message)) as e:
        main(["--score", str(tmp_path / "given.jsonl"), "--data", str(data), "--bench", bench])
    assert "\n" not in str(e.value)
