"""The overlay shows which tokens a method keeps, and what is answered then; read from elements."""
import re

import pytest
from PIL import Image
from test_pictures import WHITE, read

from support import pictures
from support.pictures import SIDE, overlay
from tokprune import METHODS

DART = METHODS["dart"].color


def test_kept_tokens_are_shown_unfaded_and_outlined_the_rest_is_faded(tmp_path):
    """The method's color lies on white: it is seen on an image of that very color. Thick lines
    between tokens would hide an image of 24 x 24 of them."""
    overlay(WHITE, [("dart", "a", [5, 6])], (4, 4), tmp_path / "a.svg", "What?")
    faded, kept = read(tmp_path / "a.svg", "use", href="#image")
    assert faded.get("opacity") == "0.25" and not kept.get("opacity")
    [clip] = read(tmp_path / "a.svg", "clipPath")
    assert kept.get("clip-path") == f"url(#{clip.get('id')})"
    assert clip[0].get("d") == "M59.00 59.00h59.00v59.00h-59.00zM118.00 59.00h59.00v59.00h-59.00z"
    white, _, between, around = read(tmp_path / "a.svg", "path")        # the second is the clip's
    assert [one.get("stroke") for one in (white, between, around)] == ["white", DART, DART]
    assert white.get("d") == around.get("d") and around.get("d").count("M") == 6
    assert between.get("d") == "M118.00 59.00v59.00" * 2
    thick = [float(one.get("stroke-width")) for one in (between, around, white)]
    assert 2 * thick[0] < thick[1] < thick[2]


def test_an_image_whose_tokens_are_all_kept_is_shown_as_it_is(tmp_path):
    overlay(WHITE, [("dart", "a", list(range(16)))], (4, 4), tmp_path / "a.svg", "What?")
    [shown] = read(tmp_path / "a.svg", "use")
    assert not shown.get("opacity") and not read(tmp_path / "a.svg", "path")


@pytest.mark.parametrize("right, marks", [([True], [(pictures.RIGHT, pictures.CHECK)]),
                                          ([False], [(pictures.WRONG, pictures.CROSS)]),
                                          (None, [])])
def test_answers_are_marked_right_or_wrong_where_that_is_known(tmp_path, right, marks):
    overlay(WHITE, [("all", " cat", [0])], (1, 1), tmp_path / "a.svg", "What?", right)
    found = read(tmp_path / "a.svg", "path")
    assert [(one.get("stroke"), one.get("d")) for one in found] == marks
    answer = read(tmp_path / "a.svg", "text")[-1]
    assert (answer.text, answer.get("fill")) == ("cat", marks[0][0] if marks else pictures.INK)


@pytest.mark.parametrize("panels", [2, 7, 9])
def test_every_panel_is_there_and_the_image_only_once(tmp_path, panels):
    names = list(METHODS)[:panels]
    overlay(WHITE, [(name, "", [3]) for name in names], (4, 4), tmp_path / "a.svg", "What?")
    text = [one.text for one in read(tmp_path / "a.svg", "text")]
    assert text == ["What?"] + [part for name in names for part in (name, "1 kept", "(nothing)")]
    assert len(read(tmp_path / "a.svg", "image")) == 1
    assert len({one.get("x") for one in read(tmp_path / "a.svg", "rect")}) <= 6


def test_a_wide_image_keeps_its_shape_and_the_tokens_their_place(tmp_path):
    canvas = Image.new("RGB", (128, 32), "black")
    overlay(canvas, [("dart", "a", [7])], (2, 8), tmp_path / "a.svg", "What?")
    [image] = read(tmp_path / "a.svg", "image")
    assert (image.get("width"), image.get("height")) == (str(SIDE), str(SIDE // 4))
    [clip] = read(tmp_path / "a.svg", "clipPath")
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", clip[0].get("d"))]
    assert numbers == [SIDE * 7 / 8, 0, SIDE / 8, SIDE / 8, -SIDE / 8]
