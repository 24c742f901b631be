"""Official files are read as they are and asked as officially; wrong ones are named."""
import json
import re
import shutil

import pytest
from official import COCO, PROBLEM, lines, official_files
from PIL import Image

from support.benchmarks import BENCHMARKS, LETTER, SHORT, load_benchmark, score
from tokprune import InputError


@pytest.fixture
def data(tmp_path):
    return official_files(tmp_path / "data")


def prompts(data, name, style=None):
    return [question.prompt for question in load_benchmark(name, data, style)]


def test_official_files_are_found_and_asked_as_llavas_scripts_ask(data):
    mme = load_benchmark("mme", data)
    assert [q.prompt for q in mme] == ["Is it?" + SHORT, "Is it not?" + SHORT, "A cat?" + SHORT,
                                       "A dog?" + SHORT]
    assert [q.id for q in mme] == ["OCR/0001/0", "OCR/0001/1", "artwork/10002/0", "artwork/10002/1"]
    assert [q.gold for q in mme] == [["Yes"], ["No"], ["No"], ["Yes"]]
    assert prompts(data, "textvqa") == ["What?" + SHORT]
    [science] = load_benchmark("scienceqa", data)
    assert science.prompt == "Context: Look.\nWhich?\nA. this\nB. that" + LETTER
    assert science.gold == ["B"] and science.group == ""
    pope = load_benchmark("pope", data)
    assert pope[0].prompt == "Is there a cat in the image?" + SHORT
    assert [q.id for q in pope][:3] == ["random/1", "random/2", "popular/1"]


def test_what_is_hashed_of_a_question_is_the_same_wherever_the_files_lie(data, tmp_path):
    elsewhere = official_files(tmp_path / "mnt" / "disk")
    for name in BENCHMARKS:
        assert ([q.identity for q in load_benchmark(name, data)]
                == [q.identity for q in load_benchmark(name, elsewhere)])


def test_ocr_tokens_are_shown_in_llavas_style_alone(data):
    assert prompts(data, "textvqa", "llava") == ["What?\nReference OCR token: Acme, 5" + SHORT]
    (data / "vqa" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(InputError, match="there is no TextVQA_Rosetta_OCR_v0.2_val.json"):
        prompts(data, "textvqa", "llava")


@pytest.mark.parametrize("name", ["LMUData/TextVQA_VAL.tsv", "mine.jsonl"])
def test_a_prompt_style_is_refused_where_there_are_no_ocr_tokens(name, data):
    """It was ignored: TextVQA's score without them passed for the one with them."""
    with pytest.raises(InputError, match=f"--prompt-style llava: {name} has no OCR tokens"):
        prompts(data, name, "llava")


def test_linked_folders_are_walked_and_loops_are_not(data, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "MME").symlink_to(data / "MME")
    (tmp_path / "links" / "loop").symlink_to(tmp_path / "links")
    assert len(load_benchmark("mme", tmp_path / "links")) == 4


def edit(name, content):
    """Replace a file of the data by this text, or by this object as JSON."""
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda data: (data / name).write_text(text, "latin-1")


def remove(name):
    return lambda data: (data / name).unlink()


def copy(source, target):
    return lambda data: shutil.copy(data / source, data / target)


def zipped(name):
    """Leave an archive in the place of a folder."""
    def change(data):
        shutil.rmtree(data / name)
        (data / "data.zip").touch()
    return change


TEXT = "MME/OCR/0001.txt"
VQA = "vqa/TextVQA_0.5.1_val.json"
POPULAR = "pope/coco_pope_popular.json"
ENTRY = {"question": "?", "question_id": 7, "image_id": "1", "answers": ["a"] * 10}
BAD = ": not as published: "


def test_an_empty_folder_holds_none_of_the_benchmarks(tmp_path):
    """It was said of mme that it has no questions."""
    for name in BENCHMARKS:
        with pytest.raises(InputError, match=f"^--data {tmp_path}: no {name} found in it$"):
            load_benchmark(name, tmp_path)


@pytest.mark.parametrize("change, message", [
    (remove("MME/OCR/0001.jpg"), "0001.txt: is alone; want 0001.txt and 0001.jpg"),
    (edit("MME/OCR/0002.jpg", "x"), "0002.jpg: is alone"),
    (copy("MME/OCR/0001.jpg", "MME/OCR/0001.PNG"), "0001.jpg is there 2 times, as "),
    (lambda data: shutil.copytree(data / "MME/OCR", data / "OCR"),
     "0001.txt: question OCR/0001/0 is a duplicate"),
    (remove("vqa/train_images/1.jpg"), "val.json: question 0: "),
    (copy(VQA, "TextVQA_0.5.1_val.json"), "TextVQA_0.5.1_val.json is there 2 times"),
    (copy(f"coco/val2014/{COCO}", f"pope/{COCO}"), f"image {COCO} is there twice, as "),
    (lambda data: shutil.copytree(data / "sqa/images/test", data / "old/test"),
     "image 7 is there twice, as "),
    (zipped("vqa/train_images"), "1.jpg: not found; want an image; not unpacked: "),
    (zipped("pope"), "no pope found in it; not unpacked: "),
    (remove(POPULAR), "coco_pope_popular.json: not found"),
    (remove(f"coco/val2014/{COCO}"), f"{COCO}: not found"),
    (remove("sqa/pid_splits.json"), "pid_splits.json: not found"),
    # not as published: one guard, with file, entry and what was found
    (edit(TEXT, "Is it? Yes\nIs it not?\tNo\n"), "0001.txt" + BAD + '["Is it? Yes", '),
    (edit(TEXT, "Is it?\tYes\n"), "0001.txt" + BAD),
    (edit(TEXT, "Is it?\tYes\nIs it not?\tPerhaps\n"),
     "question OCR/0001/1: answers are ['Perhaps'], metric is 'yesno'; want"),
    (edit(TEXT, "Is it \xe9?\tYes\nIs it not?\tNo\n"), "0001.txt: not UTF-8"),
    (edit(VQA, {"data": 5}), 'val.json: data is 5, want a list'),
    (edit(VQA, {"data": ["x"]}), 'val.json' + BAD + '"x" (TypeError'),
    (edit(VQA, '{"data": ' + "[" * 100000), "not valid JSON"),
    (edit(VQA, {"data": [ENTRY | {"answers": ["a"]}]}), "question 7: answers are ['a'], metric is "
     "'vqa'; want ten for vqa"),
    (edit(VQA, {"data": [ENTRY | {"answers": [5] * 10}]}), "question 7: answers are [5, "),
    (edit(VQA, {"data": [ENTRY | {"question": "\ud83d?"}]}), "holds half a character"),
    (edit(POPULAR, '{"question_id": 1}'), "coco_pope_popular.json" + BAD + '{"question_id": 1}'),
    (edit(POPULAR, "{\n"), "coco_pope_popular.json: line 1 is not valid JSON"),
    (edit("sqa/pid_splits.json", {"test": ["70"]}), "problems.json" + BAD + '"70" (KeyError'),
    (edit("sqa/problems.json", {"7": PROBLEM | {"choices": ["x"] * 6}}), BAD + '"7" (ValueError'),
    (edit("sqa/problems.json", {"7": PROBLEM | {"answer": 2}}), BAD + '"7" (IndexError')])
def test_wrong_data_is_named(change, message, data):
    change(data)
    with pytest.raises(InputError, match=re.escape(message)) as e:
        for name in BENCHMARKS:
            load_benchmark(name, data)
    assert "\n" not in str(e.value)


# ---- a file of your own --------------------------------------------------------------------------

OWN = {"id": "x", "image": "1.jpg", "question": "What?", "answers": ["Yes"], "metric": "yesno"}
BARE = {"id": "w", "image": "1.jpg", "question": "What?"}


def load(folder, *entries, gold=True):
    Image.new("RGB", (20, 20)).save(folder / "1.jpg")
    (folder / "own.jsonl").write_text(lines(*entries))
    return load_benchmark(str(folder / "own.jsonl"), folder, gold=gold)


def test_a_file_of_your_own_is_read_and_scored(tmp_path):
    """Spaces around a gold answer were kept, and answers are stripped: nobody could be right."""
    ten = ["a"] * 9 + ["red"]
    questions = load(tmp_path, OWN, OWN | {"id": 2, "answers": ten, "metric": "vqa"},
                     OWN | {"id": "3", "answers": ["B"], "metric": "choice"},
                     OWN | {"id": "4", "answers": [" a cat\u00a0\n"], "metric": "exact"})
    assert [q.id for q in questions] == ["x", "2", "3", "4"]
    assert all(q.prompt == "What?" for q in questions)
    assert [q.gold[-1] for q in questions] == ["Yes", "red", "B", "a cat"]
    answers = ["yes!", "Red", "B. x", "A cat."]
    assert [score(answer, q)[1] for answer, q in zip(answers, questions)] == [1, 0.3, 1, 1]


def test_a_question_is_another_one_if_its_image_is(tmp_path):
    """A run that resumed kept the answers about train/1.jpg for those about test/1.jpg."""
    def asked(folder, image):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(folder / image)
        [question] = load(folder, OWN | {"image": image})
        return question
    question = asked(tmp_path / "a", "1.jpg")
    here = question.identity
    assert asked(tmp_path / "b", "1.jpg").identity == here
    assert asked(tmp_path / "a", "test/1.jpg").identity != here
    question.image.write_bytes(question.image.read_bytes() + b"more")
    assert question.identity != here


def test_a_file_that_is_only_asked_needs_no_answers(tmp_path):
    first, second = load(tmp_path, BARE, OWN, gold=False)
    assert (first.gold, first.metric) == ([], "")
    assert (second.gold, second.metric) == (["Yes"], "yesno")
    with pytest.raises(InputError, match="question w has no answers and no metric, so it cannot"):
        load(tmp_path, BARE)


@pytest.mark.parametrize("change, message", [
    ({"image": "2.jpg"}, ": not found; want an image"), ({"image": "."}, ": not found"),
    ({"answers": "Yes"}, "own.jsonl: line 3: answers is \"Yes\", want a list"),
    ({"answers": None}, "answers is null"), ({"metric": 5}, "metric is 5"),
    ({"id": True}, "id is true, want text or a whole number"),
    ({"question": " "}, "question z is ' '"), ({"id": "y"}, "question y is a duplicate"),
    ({"answers": [5]}, "answers are [5], want strings"), ({"metric": ""}, "metric is ''"),
    ({"metric": "rouge"}, "metric is 'rouge'; want ten for vqa, one or more for exact"),
    ({"metric": "vqa"}, "want ten for vqa"), ({"answers": ["yes", "no"]}, "yes or no for yesno"),
    ({"answers": [], "metric": "exact"}, "answers are []"),
    ({"answers": [" "], "metric": "exact"}, "answers are ['']"),
    ({"answers": ["AB"], "metric": "choice"}, "a letter for choice"),
    ({"answers": ["\ud83d"], "metric": "exact"}, "half a character")])
def test_wrong_lines_of_your_own_file_are_named(change, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)) as e:
        load(tmp_path, OWN, OWN | {"id": "y"}, OWN | {"id": "z"} | change)
    assert str(tmp_path / "own.jsonl") in str(e.value)
