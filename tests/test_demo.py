"""demo.py: answers and kept tokens are those of the five moves, the horizon is the question's."""
from dataclasses import replace

import pytest
import torch

import demo
from information import information_of_tokens
from support import flags
from support.files import read_image
from support.pictures import RIGHT, WRONG
from tokprune import METHODS, Method, decode, keep, prefill, prune, take_turns

SHOWN = [name for name, method in METHODS.items() if not method.needs_gold]


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    """`python demo.py`: (what it printed, its result, its folder)."""
    out = tmp_path_factory.mktemp("demo")
    printed, result = run(demo.main, out=out)
    return printed, result, out


@pytest.fixture(scope="module")
def model():
    return flags.load_model(demo.parse_arguments([]))


def test_every_method_that_needs_no_gold_answer_has_a_row(shown):
    printed, result, _ = shown
    rows = [line.split(" | ")[0][2:] for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["method", "unpruned", *SHOWN]
    assert list(result["answers"]) == list(result["kept"]) == rows[1:]


def test_the_bundled_question_tells_methods_apart(shown):
    """The picture on the README: unpruned is right, none is wrong, some methods are right."""
    answers = shown[1]["answers"]
    methods = [name for name in SHOWN if name != "none"]
    right = [name for name in methods if answers[name] == demo.ANSWER]
    assert answers["unpruned"] == demo.ANSWER != answers["none"]
    assert 2 <= len(right) <= len(methods) - 2
    assert f"{len(right)} of {len(methods)} methods" in shown[0]


def test_answers_and_kept_tokens_are_those_of_the_five_moves(shown, model):
    """From the image on, for each method anew: nothing of one method reaches the next."""
    image = read_image(demo.PICTURE)
    for name in ("divprune", "fastv", "sparsevlm"):
        s = model.begin(image, demo.QUESTION)
        s = model.run(s, stop=8)
        s = prune(model, s, name, 6)
        s = model.run(s)
        assert shown[1]["answers"][name] == decode(model, s)[0]
        assert shown[1]["kept"][name] == s.origin[0].tolist()


def test_the_horizon_is_the_layer_from_which_on_the_answer_stays(shown, model):
    image = read_image(demo.PICTURE)
    nothing = torch.zeros(0, dtype=torch.long)
    horizon = shown[1]["horizon"]
    for layer in range(horizon - 1, model.num_layers):
        s = model.run(model.begin(image, demo.QUESTION), stop=layer)
        answer = decode(model, model.run(keep(s, nothing)))[0]
        assert (answer == demo.ANSWER) == (layer >= horizon), layer
    assert f"horizon of this question is layer {horizon} of {model.num_layers}" in shown[0]


def test_the_picture_is_where_the_output_says_and_marks_right_and_wrong(shown):
    printed, _, out = shown
    assert f"picture: {out / 'overlay.svg'}\n" in printed
    drawn = (out / "overlay.svg").read_text("utf-8")
    assert RIGHT in drawn and WRONG in drawn


@pytest.mark.parametrize("gold, wanted", [
    (None, "1 of 2 methods (b) gives the unpruned answer, 'cat'; dropping all gives 'cow'"),
    ("Dog", "1 of 2 methods (a) gives the right answer, 'Dog'; dropping all gives 'cow'"),
    ("cow", "0 of 2 methods give the right answer, 'cow'; dropping all gives it too")])
def test_the_sentence_says_who_keeps_the_answer_or_is_right(gold, wanted):
    panels = [("unpruned", "cat", []), ("none", "cow", []), ("a", "dog", []), ("b", "cat", [])]
    assert demo.sentence(panels, gold) == wanted
    assert demo.sentence(panels[:1] + panels[2:], gold) == wanted.split(";")[0]


def test_a_new_method_that_measures_has_a_row(run, model, tmp_path, monkeypatch):
    """It crashed: "'Namespace' object has no attribute 'answers'". README promises that an entry of
    METHODS is enough. It measures the unpruned answer."""
    monkeypatch.setitem(METHODS, "mine", Method(take_turns, "#123456", measure="tokens"))
    printed, result = run(demo.main, "--method", "mine,divprune", "--layer", 20, out=tmp_path)
    start = model.begin(read_image(demo.PICTURE), demo.QUESTION)
    [[values]] = information_of_tokens(model, {0: start}, [result["answers"]["unpruned"]], [20])
    want = prefill(model, start, [(20, "mine", 0.9)], info={20: {"mine": [values]}})
    assert result["kept"]["mine"] == want.origin[0].tolist() != result["kept"]["divprune"]
    assert f"| mine | 6 | {result['answers']['mine']} |" in printed


def test_where_tokens_do_not_tile_the_image_there_are_answers_and_no_picture(
        run, shown, model, tmp_path, monkeypatch):
    """As with a model that puts a row separator among its visual tokens."""
    begin = model.begin
    monkeypatch.setattr(type(model), "begin",
                        lambda self, *args: replace(begin(*args), grid=(7, 9)))
    printed, result = run(demo.main, "--method", "divprune", out=tmp_path)
    assert "no picture: the 64 visual tokens of this model do not tile the image, 7 x 9" in printed
    assert not (tmp_path / "overlay.svg").exists()
    assert result["answers"]["divprune"] == shown[1]["answers"]["divprune"]


def test_at_layer_0_the_methods_that_need_a_layer_are_left_out():
    names = demo.parse_arguments(["--layer", "0"]).method
    assert names == [name for name in SHOWN if not METHODS[name].needs_layer]
