"""What the pictures show, checked by pixels: colors by method, bands, signs, outlines."""
import math

import numpy as np
import pytest
from PIL import Image

from support import pictures
from support.pictures import lighter, overlay, plot, plot_information, signed, style_of
from tokprune import METHODS, InputError, Method, uniform

LAYERS = list(range(12))
WHITE = Image.new("RGB", (64, 64), "white")


def ink(path, color, tolerance: int = 24):
    """Where a picture has this color, (height, width) bool. 256 colors are kept: some are off."""
    want = [int(color[i:i + 2], 16) for i in (1, 3, 5)] if isinstance(color, str) else color
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return abs(pixels - np.array(want)).max(-1) <= tolerance


def curve(method, scores, error=0.0):
    return [{"method": method, "layer": layer, "score": score, "standard_error": error,
             "minus_random": None} for layer, score in zip(LAYERS, scores)]


def reference(method, score):
    return [{"method": method, "layer": None, "score": score, "standard_error": 1.0,
             "minus_random": None}]


@pytest.fixture
def three_methods(monkeypatch):
    """As a fork would add them."""
    colors = {"one": "#00aa00", "two": "#aa00aa", "three": "#0000ff"}
    for name, color in colors.items():
        monkeypatch.setitem(METHODS, name, Method(uniform, color))
    return colors


# ---- scores by layer -----------------------------------------------------------------------------

def test_methods_that_coincide_are_all_seen_in_their_own_colors(tmp_path, three_methods):
    rows = [row for name in three_methods for row in curve(name, [50.0] * 12)]
    plot({"x": rows}, tmp_path / "a.png")
    for name, color in three_methods.items():
        below_axes = 540                                # where the legend begins
        assert ink(tmp_path / "a.png", color)[:below_axes].sum() > 40, name


def test_no_two_curves_look_alike_even_without_their_color():
    """Every style is unlike the others by line, marker or width."""
    styles = [style_of(name) for name in ("unpruned", "no image", "none", *METHODS)]
    looks = {(style.pattern, style.marker, style.width, style.hollow) for style in styles}
    assert len(looks) == len(styles)


def test_a_method_that_draws_has_the_band_of_its_95_percent(tmp_path, monkeypatch):
    """Whatever its name; a band of one standard error is half as high."""
    monkeypatch.setitem(METHODS, "coin", Method(uniform, "#aa00aa", draws=True))
    plot({"x": curve("coin", [50.0] * 12, error=10.0)}, tmp_path / "a.png")
    column = ink(tmp_path / "a.png", lighter("#aa00aa"), 8)[:540, 404]
    percent = 400 / 106                                 # pixels; the axis is from -3 to 103
    line = 9                                            # at most that is hidden by line and marker
    assert 39.2 * percent - line <= column.sum() <= 39.2 * percent + 2


def test_a_method_that_does_not_draw_has_no_band(tmp_path):
    plot({"x": curve("dart", [50.0] * 12, error=10.0)}, tmp_path / "a.png")
    pale = ink(tmp_path / "a.png", lighter(METHODS["dart"].color), 8)
    assert pale[:540].sum() < 3000                      # rims of the line; a band has 70,000


def test_nothing_kept_lies_over_random_and_random_over_methods(tmp_path):
    """A black line that is white inside, on grey, on green."""
    same = [50.0] * 12
    rows = curve("none", same) + curve("random", same) + curve("dart", same)
    plot({"x": rows}, tmp_path / "a.png")
    plot({"x": rows[12:]}, tmp_path / "b.png")
    axes = slice(80, 470), slice(80, 740)
    dart = METHODS["dart"].color
    assert ink(tmp_path / "a.png", "#000000", 60)[axes].any(1).sum() >= 3
    assert ink(tmp_path / "b.png", METHODS["random"].color)[axes].any(0).sum() > 300
    for name in "ab":
        assert ink(tmp_path / f"{name}.png", dart)[axes].any(0).sum() < 100, "markers alone"


@pytest.mark.parametrize("method", ["unpruned", "no image"])
def test_references_are_dashed_across_all_layers(tmp_path, method):
    plot({"x": curve("dart", [10.0] * 12) + reference(method, 70.0)}, tmp_path / "a.png")
    y = round(476 - 73 / 106 * 400)
    grey = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    dark = grey[y - 2:y + 3, 110:730].min(0) < 170
    assert 0.2 < dark.mean() < 0.85
    assert dark[:60].any() and dark[-60:].any()


def test_the_horizon_is_marked_at_its_layer(tmp_path):
    rows = curve("dart", [10.0] * 12)
    plot({"x": rows}, tmp_path / "none.png")
    before = np.asarray(Image.open(tmp_path / "none.png").convert("L")).astype(int)
    for layer in (3, 8):
        plot({"x": rows}, tmp_path / "a.png", {"x": layer})
        after = np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(int)
        changed = (abs(after - before) > 60)[100:400].any(0).nonzero()[0]
        want = 76 + (layer + 0.5) / 12 * 664
        assert abs(changed - want).max() <= 3


def test_one_layer_is_enough_for_every_curve(tmp_path):
    """A line of one point has no length: what has no marker would not be there."""
    rows = [row for row in curve("none", [20.0] * 12) if row["layer"] == 5]
    plot({"x": rows + reference("unpruned", 90.0)}, tmp_path / "a.png")
    dark = ink(tmp_path / "a.png", "#000000", 60)
    for percent in (20, 90):
        y = round(476 - (percent + 3) / 106 * 400)
        assert dark[y - 4:y + 5, 100:720].any(0).sum() > 15


def test_a_curve_runs_from_layer_to_layer_whatever_the_order_of_rows(tmp_path):
    rows = curve("dart", range(0, 96, 8))
    plot({"x": rows}, tmp_path / "a.png")
    plot({"x": rows[6:] + rows[:6]}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_every_panel_has_the_layers_of_all_benchmarks(tmp_path):
    """--layer horizon prunes each benchmark at a layer of its own."""
    rows = curve("dart", [50.0] * 12)
    plot({"x": rows[3:4], "y": rows[8:9]}, tmp_path / "a.png")
    marks = ink(tmp_path / "a.png", METHODS["dart"].color, 60)[60:500]
    for left in (0, pictures.WIDTH):
        assert marks[:, left + 100:left + 740].any(), "the curve is outside its panel"


def test_benchmarks_need_not_have_the_same_rows(tmp_path):
    plot({"x": curve("dart", [10.0] * 12), "y": curve("random", [90.0] * 12),
          "z": reference("unpruned", 100.0)}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 2 * pictures.WIDTH    # the third goes below


# ---- information ---------------------------------------------------------------------------------

def information(means, horizon_layer=2, scores=(0.0, 50.0, 100.0)):
    errors = {"mean": 0.0, "spread": 0.0}
    rows = [{"layer": layer, "mean": mean, "spread": 0.3, "standard_errors": errors}
            for layer, mean in enumerate(means)]
    return {"x": {"information": rows, "horizon": {
        "layer": horizon_layer, "low": 1.0, "high": 2.0, "scores": list(scores),
        "unpruned": 100.0}}}


def example(maps):
    return {"x": (WHITE, np.array(maps, dtype=np.float32), "What?\nIn a word.", "this")}


def test_negative_information_lies_below_zero(tmp_path):
    """Cut off at 0, the third point would stand as high as the second."""
    plot_information(information([0.2, 0.0, -0.2]), example(np.zeros((3, 2, 2))),
                     tmp_path / "a.png")
    blue = ink(tmp_path / "a.png", pictures.MEAN.ink)[80:350]
    heights = []
    for layer in range(3):
        x = round(88 + (layer + 0.5) / 3 * 652)
        heights.append(blue[:, x - 3:x + 4].any(1).nonzero()[0].mean())
    assert heights[1] - heights[0] > 50
    assert abs(heights[2] - heights[1] - (heights[1] - heights[0])) < 4


def test_windows_that_help_are_red_and_windows_that_mislead_blue(tmp_path):
    maps = np.zeros((3, 2, 2))
    maps[0] = [[0.5, -0.5], [0.0, 0.0]]
    plot_information(information([0.2, 0.0, -0.2]), example(maps), tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    x, y, side = 22, 758, pictures.TILE
    red, blue, left, right = (pixels[y + round(side * down), x + round(side * across)]
                              for down, across in ((.25, .25), (.25, .75), (.75, .25), (.75, .75)))
    assert red[0] - red[2] > 60
    assert blue[2] - blue[0] > 60
    for corner in (left, right):
        assert np.ptp(corner) < 12                      # no information, no color


def test_little_information_is_seen_and_both_signs_are_equally_strong():
    grey = Image.new("RGB", (4, 1), "#999999")
    drawn = np.asarray(signed(grey, np.array([[0, 0.05, 1, -1]])))
    zero, little, lot, negative = drawn[0].astype(int)
    assert zero.tolist() == [153, 153, 153]
    assert abs(little - zero).max() > 15
    assert abs(lot - pictures.HELPS).max() < 30
    assert abs(negative - pictures.MISLEADS).max() < 30


def test_information_everywhere_zero_and_no_horizon_can_be_drawn(tmp_path):
    report = information([0.0, 0.0, 0.0], horizon_layer=3, scores=(0.0, 0.0, 0.0))
    report["x"]["horizon"]["unpruned"] = 0.0
    plot_information(report, example(np.zeros((3, 2, 2))), tmp_path / "a.png")
    assert ink(tmp_path / "a.png", pictures.MEAN.ink)[80:350].sum() > 40


# ---- all of them ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["no/folder.png", "picture.what"])
def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path, name):
    path = tmp_path / name
    draw = [lambda: plot({"x": curve("dart", [50.0] * 12)}, path),
            lambda: plot_information(information([0.1] * 3), example(np.zeros((3, 2, 2))), path),
            lambda: overlay(WHITE, [("none", "a", [])], (4, 4), path, "What?")]
    for call in draw:
        with pytest.raises(InputError, match=f"^{path}: cannot be written .*$") as error:
            call()
        assert "\n" not in str(error.value)


def test_dashes_run_on_around_corners():
    found = pictures.dashes([(0, 0), (10, 0), (10, 10)], (6, 3))
    lengths = [sum(map(math.dist, dash, dash[1:])) for dash in found]
    assert lengths == [6, 6, 2]
    assert found[1] == [(9, 0), (10, 0), (10, 5)]


def test_text_is_cut_to_the_width_that_there_is():
    font = pictures.ImageFont.load_default(20)
    assert pictures.shortened("a\n b", 100, 20) == "a b"
    for width in (30, 100, 300):
        cut = pictures.shortened("many words " * 20, width, 20)
        assert cut.endswith(" ...") and width - 30 < font.getlength(cut) <= width
