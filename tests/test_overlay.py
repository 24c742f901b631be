"""The overlay shows which tokens a method keeps, and what is answered then; checked by pixels."""
import numpy as np
import pytest
from PIL import Image
from test_pictures import WHITE, ink

from support import pictures
from support.pictures import overlay
from tokprune import METHODS


def place(token, side=pictures.SIDE, cols=4):
    """The middle of a token of the first panel, and half its side."""
    row, col = divmod(token, cols)
    return (60 + (row + 0.5) * side / cols, pictures.GAP + (col + 0.5) * side / cols,
            side / cols / 2)


@pytest.mark.parametrize("color", ["white", METHODS["dart"].color])
def test_kept_tokens_are_outlined_on_any_image_and_dropped_ones_are_not(tmp_path, color):
    """In the method's color; on an image of that very color, by the white around it."""
    canvas = Image.new("RGB", (64, 64), color)
    overlay(canvas, [("dart", "a", [5, 6])], (4, 4), tmp_path / "a.png", "What?")
    outline = METHODS["dart"].color if color == "white" else "#ffffff"
    seen = ink(tmp_path / "a.png", outline, 60)
    y, x, half = place(5)
    inside = round(x - half)
    assert seen[round(y), inside:inside + 5].any()
    y, x, half = place(15)
    around = seen[round(y - half):round(y + half), round(x - half):round(x + half)]
    assert color != "white" or not around.any()


def test_the_line_between_two_kept_tokens_is_thinner_than_the_one_around_them(tmp_path):
    """Thick lines between tokens would hide an image of 24 x 24 of them."""
    overlay(WHITE, [("dart", "a", [5, 6])], (4, 4), tmp_path / "a.png", "What?")
    grey = 255 - np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(int)
    y, x, half = place(5)
    between, around = (grey[round(y), round(x + side) - 4:round(x + side) + 5].sum()
                       for side in (half, -half))
    assert 0 < between < around / 2


def test_dropped_tokens_are_faded_and_kept_ones_are_not(tmp_path):
    canvas = Image.new("RGB", (64, 64), "black")
    overlay(canvas, [("dart", "a", [5])], (4, 4), tmp_path / "a.png", "What?")
    grey = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    for token, low, high in ((5, 0, 25), (6, 170, 210)):
        y, x, _ = place(token)
        assert low <= grey[round(y), round(x)] <= high


def test_an_image_whose_tokens_are_all_kept_is_shown_as_it_is(tmp_path):
    overlay(WHITE, [("dart", "a", list(range(16)))], (4, 4), tmp_path / "a.png", "What?")
    assert not ink(tmp_path / "a.png", METHODS["dart"].color).any()


@pytest.mark.parametrize("gold, green, red", [("Cat ", 1, 0), ("dog", 0, 1), (None, 0, 0)])
def test_answers_are_marked_right_or_wrong_where_gold_is_known(tmp_path, gold, green, red):
    overlay(WHITE, [("none", "cat", [])], (4, 4), tmp_path / "a.png", "What?", gold)
    assert (ink(tmp_path / "a.png", pictures.RIGHT).sum() > 60) == green
    assert (ink(tmp_path / "a.png", pictures.WRONG).sum() > 60) == red


@pytest.mark.parametrize("panels", [2, 7, 9])
def test_every_panel_is_there(tmp_path, panels):
    names = list(METHODS)[:panels]
    drawn = [(name, "x " * 50, [3]) for name in names]
    overlay(WHITE, drawn, (4, 4), tmp_path / "a.png", "?" * 500)
    for name in names:
        assert ink(tmp_path / "a.png", METHODS[name].color).sum() > 100, name


def test_a_wide_image_keeps_its_shape_and_the_tokens_their_place(tmp_path):
    canvas = Image.new("RGB", (128, 32), "black")
    overlay(canvas, [("dart", "a", [7])], (2, 8), tmp_path / "a.png", "What?")
    rows, cols = ink(tmp_path / "a.png", METHODS["dart"].color).nonzero()
    token = pictures.SIDE / 8
    assert abs(np.ptp(cols) - token) <= 5 and abs(np.ptp(rows) - token) <= 5
    assert abs(cols.max() - pictures.GAP - pictures.SIDE) <= 4 and abs(rows.min() - 60) <= 4
    middle = round(60 + token / 2)
    row = np.asarray(Image.open(tmp_path / "a.png").convert("L"))[middle]
    assert row[round(pictures.GAP + 7.5 * token)] < 25 < 170 < row[round(pictures.GAP + token)]
