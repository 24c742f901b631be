"""demo.py: answers and kept tokens are those of the five moves, the horizon is the question's."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from support import runs
from support.files import read_image
from support.pictures import RIGHT, WRONG
from tokprune import METHODS, InputError, keep, prune

SHOWN = [name for name, method in METHODS.items() if not method.needs_gold]


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    """`python demo.py`: (what it printed, its result, its folder)."""
    out = tmp_path_factory.mktemp("demo")
    printed, result = run(demo.main, out=out)
    return printed, result, out


@pytest.fixture(scope="module")
def model():
    return runs.load_model(demo.parse_arguments([]))


def test_every_method_that_needs_no_gold_answer_has_a_row(shown):
    printed, result, _ = shown
    rows = [line.split(" | ")[0][2:] for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["method", "unpruned", "none", *SHOWN]
    assert list(result["answers"]) == list(result["kept"]) == rows[1:]


def test_the_bundled_question_tells_methods_apart(shown):
    """The picture on the README: unpruned is right, none is wrong, some methods are right."""
    answers = shown[1]["answers"]
    right = [name for name in SHOWN if answers[name] == demo.ANSWER]
    assert answers["unpruned"] == demo.ANSWER != answers["none"]
    assert 2 <= len(right) <= len(SHOWN) - 2
    assert f"{len(right)} of {len(SHOWN)} methods" in shown[0]


def test_answers_and_kept_tokens_are_those_of_the_five_moves(shown, model):
    """From the image on, for each method anew: nothing of one method reaches the next."""
    image = read_image(demo.PICTURE)
    for name in ("divprune", "fastv", "sparsevlm"):
        s = model.begin(image, demo.QUESTION)
        s = model.run(s, stop=8)
        s = prune(model, s, name, 6)
        s = model.run(s)
        assert shown[1]["answers"][name] == model.decode(s, max_new_tokens=16)[0]
        assert shown[1]["kept"][name] == s.origin[0].tolist()


def test_the_horizon_is_the_layer_from_which_on_the_answer_stays(shown, model):
    image = read_image(demo.PICTURE)
    nothing = torch.zeros(0, dtype=torch.long)
    horizon = shown[1]["horizon"]
    for layer in range(horizon - 1, model.num_layers):
        s = model.run(model.begin(image, demo.QUESTION), stop=layer)
        answer = model.decode(model.run(keep(s, nothing)))[0]
        assert (answer == demo.ANSWER) == (layer >= horizon), layer
    assert f"horizon of this question is layer {horizon} of {model.num_layers}" in shown[0]


def test_the_picture_is_where_the_output_says_and_marks_right_and_wrong(shown):
    printed, _, out = shown
    assert f"picture: {out / 'overlay.png'}\n" in printed
    pixels = np.asarray(Image.open(out / "overlay.png").convert("RGB")).astype(int)
    for color in (RIGHT, WRONG):
        want = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - want).max(-1) < 24).sum() > 100


@pytest.mark.parametrize("answer, wanted", [
    (None, "1 of 2 methods (b) gives the unpruned answer, 'cat'; dropping all gives 'cow'."),
    ("Dog", "1 of 2 methods (a) gives the right answer, 'Dog'; dropping all gives 'cow'."),
    ("cow", "0 of 2 methods give the right answer, 'cow'; dropping all gives it too.")])
def test_the_sentence_says_who_keeps_the_answer_or_is_right(answer, wanted):
    flags = ["--image", "x.png", "--question", "x"]
    args = demo.parse_arguments(flags + (["--answer", answer] if answer else []))
    panels = [("unpruned", "cat", []), ("none", "cow", []), ("a", "dog", []), ("b", "cat", [])]
    found = demo.sentence(panels, 64, args)
    assert found == "With 6 of 64 visual tokens from layer 8 on, " + wanted


def test_where_tokens_do_not_tile_the_image_there_are_answers_and_no_picture(
        run, shown, model, tmp_path, monkeypatch):
    """As with a model that puts a row separator among its visual tokens."""
    begin = model.begin
    monkeypatch.setattr(type(model), "begin",
                        lambda self, *args: replace(begin(*args), grid=(7, 9)))
    printed, result = run(demo.main, "--method", "divprune", out=tmp_path)
    assert "no picture: the 64 visual tokens of this model do not tile the image, 7 x 9" in printed
    assert not (tmp_path / "overlay.png").exists()
    assert result["answers"]["divprune"] == shown[1]["answers"]["divprune"]


def test_at_layer_0_the_methods_that_need_a_layer_are_left_out():
    names = demo.parse_arguments(["--layer", "0"]).method
    assert names == [name for name in SHOWN if not METHODS[name].needs_layer]


@pytest.mark.parametrize("flags, message", [
    (["--layer", "24"], "layer 24 is out of range; this model has layers 0 to 23"),
    (["--layer", "0", "--method", "fastv"], "fastv reads the layer before"),
    (["--method", "info"], "--method info: it needs the gold answer"),
    (["--method", "best"], "unknown method 'best'; want one of random"),
    (["--image", __file__, "--question", "x"], "cannot be read as an image"),
    (["--image", "cat.jpg"], "--image: needs --question")])
def test_bad_input_is_named_in_one_line(flags, message):
    with pytest.raises(InputError) as error:
        demo.main(flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
