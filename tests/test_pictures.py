"""What the pictures show, read from their elements: curves, bands, tokens, marks, text."""
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from support import pictures
from support.pictures import MARKS, SIDE, draw_signed, overlay, plot, plot_information, style_of
from tokprune import METHODS, InputError, Method, uniform

WHITE = Image.new("RGB", (64, 64), "white")


def read(path, name, **attributes):
    """The elements of a picture with these attributes, in the order they are drawn in."""
    wanted = {key.replace("_", "-"): value for key, value in attributes.items()}
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}" + name)
    return [one for one in found if wanted.items() <= one.attrib.items()]


def points(one) -> np.ndarray:
    numbers = re.findall(r"-?[\d.]+", one.get("points") or one.get("transform").split(")")[0])
    return np.array(numbers, float).reshape(-1, 2)


def curve(method, scores, error=0.0):
    return [{"method": method, "layer": layer, "score": score, "standard_error": error}
            for layer, score in enumerate(scores)]


def reference(method, score):
    return {"method": method, "layer": None, "score": score, "standard_error": 1.0}


def information(means, error=None, **horizon):
    rows = [{"layer": layer, "mean": mean, "spread": 0.3,
             "standard_errors": {"mean": error, "spread": error}}
            for layer, mean in enumerate(means)]
    found = {"layer": 2, "low": None, "high": None, "scores": [0.0, 50.0, 100.0], "unpruned": 100.0}
    return {"x": {"information": rows, "horizon": found | horizon}}


def example(question="What?\nIn a word.", answer="this"):
    return {"x": (WHITE, np.zeros((3, 2, 2)), question, answer)}


def test_methods_that_coincide_are_all_seen_by_markers_at_places_of_their_own(tmp_path):
    names = list(METHODS)[2:6]
    plot({"x": [row for name in names for row in curve(name, [50.0] * 12)]}, tmp_path / "a.svg")
    places = [{tuple(points(one)[0]) for one in read(tmp_path / "a.svg", "path",
                                                     fill=METHODS[name].color)} for name in names]
    assert min(map(len, places)) > 2 and len(set.union(*places)) == sum(map(len, places))


def test_no_two_curves_look_alike_even_without_their_color():
    styles = [style_of(name) for name in ("unpruned", "no image", *METHODS)]
    assert len({(style.pattern, style.marker, style.width) for style in styles}) == len(styles)


def test_only_a_method_that_draws_has_a_band_which_is_its_95_percent(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "coin", Method(uniform, "#aa00aa", draws=True))
    plot({"x": curve("coin", [50.0] * 12, 10.0) + curve("dart", [50.0] * 12, 10.0)},
         tmp_path / "a.svg")
    [band] = read(tmp_path / "a.svg", "polygon")
    assert band.get("fill") == "#aa00aa"
    assert np.ptp(points(band)[:, 1]) == pytest.approx(39.2 * 400 / 106, abs=0.1)


def test_nothing_kept_lies_over_random_over_methods_over_dashed_references(tmp_path):
    """A curve runs from layer to layer, whatever the order of rows."""
    names = ("none", "random", "dart")
    rows = [row for name in names for row in curve(name, range(0, 96, 8))[::-1]]
    plot({"x": [reference("unpruned", 50.0), *rows]}, tmp_path / "a.svg")
    first, *drawn = read(tmp_path / "a.svg", "polyline")[-4:]
    assert first.get("stroke-dasharray") == "16 7" and np.ptp(points(first)[:, 0]) == 652
    assert [one.get("stroke") for one in drawn] == [METHODS[name].color for name in names[::-1]]
    assert all((np.diff(points(one)[:, 0]) > 0).all() for one in drawn)


def test_one_layer_is_enough_and_panels_share_the_layers_of_all_benchmarks(tmp_path):
    rows = curve("none", [50.0] * 12)
    plot({"x": rows[3:4], "y": rows[8:9], "z": [reference("unpruned", 9.0)]}, tmp_path / "a.svg")
    _, *marks = read(tmp_path / "a.svg", "path", fill=METHODS["none"].color)       # the legend's
    left, right = [points(one)[0, 0] for one in marks]
    assert left < 300 and right > 760 + 600
    assert read(tmp_path / "a.svg", "svg", width="1520")                # the third goes below


@pytest.mark.parametrize("error, low, high, text", [(0.1, 1.0, 2.0, "horizon: layer 2 [1, 2]"),
                                                    (None, None, None, "horizon: layer 2")])
def test_information_below_zero_is_drawn_there_and_intervals_where_there_are_any(
        tmp_path, error, low, high, text):
    """Cut off at 0, the third point would stand as high as the second."""
    report = information([0.2, 0.0, -0.2], error, low=low, high=high)
    plot_information(report, example(), tmp_path / "a.svg")
    ink = pictures.STYLES["mean"].ink
    [mean] = [points(one) for one in read(tmp_path / "a.svg", "polyline", stroke=ink)
              if len(points(one)) == 3]
    first, second, third = mean[:, 1]
    assert third - second == pytest.approx(second - first, abs=0.1) and second - first > 50
    assert text in [one.text for one in read(tmp_path / "a.svg", "text")]
    for band in read(tmp_path / "a.svg", "polygon"):
        high, low = points(band)[[0, -1], 1]
        assert low - high > 50 if error else low == high
    assert len(read(tmp_path / "a.svg", "rect")) == (3 if error else 1)
    dashed = read(tmp_path / "a.svg", "polyline", stroke_dasharray="9 6")
    assert [points(one)[0, 0] for one in dashed] == [mean[2, 0]] * 2    # at the horizon


def test_windows_that_help_are_red_that_mislead_blue_and_little_can_be_seen(tmp_path):
    sheet = pictures.Sheet(9, 9)
    draw_signed(sheet, (0, 0, 9, 9), np.array([[1.0, -1.0], [0.01, 0.0]]))
    sheet.save(tmp_path / "a.svg")
    found = [(one.get("fill"), one.get("fill-opacity"), one.get("d"))
             for one in read(tmp_path / "a.svg", "path")]
    assert found[:3] == [(pictures.HELPS, "0.85", "M0 0h1v1h-1z"),
                         (pictures.MISLEADS, "0.85", "M1 0h1v1h-1z"),
                         (pictures.HELPS, "0.09", "M0 1h1v1h-1z")]


def test_no_information_and_no_horizon_can_be_drawn(tmp_path):
    report = information([0.0] * 3, layer=3, low=3.0, high=3.0, scores=[0.0] * 3, unpruned=0.0)
    plot_information(report, example(), tmp_path / "a.svg")
    assert "no horizon" in [one.text for one in read(tmp_path / "a.svg", "text")]
    assert [one.get("width") for one in read(tmp_path / "a.svg", "rect")][1:] == ["0.0", "0.0"]


@pytest.mark.parametrize("text", ["<b> & \"c\" 'd'", "\x00\x1b\ud800\ufffe]]>", "有什么？" * 99])
def test_any_text_makes_a_picture_that_stands_alone(tmp_path, text):
    """No link, script or font; what XML cannot hold is replaced, what is too long is cut."""
    overlay(WHITE, [("dart", text, [1])], (2, 2), tmp_path / "a.svg", text)
    plot_information(information([0.1] * 3), example(text, text), tmp_path / "b.svg")
    for name in "ab":
        shown = [one.text or "" for one in read(tmp_path / f"{name}.svg", "text")]
        assert len(text) < 20 or max(map(len, shown)) < 60
        assert "<" not in text or text in shown
        written = (tmp_path / f"{name}.svg").read_text()
        assert set(re.findall(r'(?:href="|url\()(#|data:|.{9})', written)) == {"#", "data:"}
    assert pictures.shortened("many\n words", 100, 20) == "many w ..."


def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path):
    path = tmp_path / "no" / "folder.svg"
    with pytest.raises(InputError, match=f"^{path}: cannot be written .*$"):
        plot({"x": curve("dart", [50.0] * 12)}, path)


# ---- the tokens kept of an image -----------------------------------------------------------------

def test_kept_tokens_are_shown_unfaded_and_outlined_the_rest_is_faded(tmp_path):
    """The method's color lies on white: it is seen on an image of that very color. Thick lines
    between tokens would hide an image of 24 x 24 of them. A wide image keeps its shape."""
    canvas = Image.new("RGB", (128, 64))
    overlay(canvas, [("dart", "a", [5, 7])], (2, 4), tmp_path / "a.svg", "What?")
    assert read(tmp_path / "a.svg", "image", width=str(SIDE), height=str(SIDE // 2))
    faded, rim, around, kept, between = read(tmp_path / "a.svg", "use")
    assert faded.get("opacity") == "0.25" and not kept.get("opacity")
    [clip] = read(tmp_path / "a.svg", "clipPath")
    assert kept.get("clip-path") == f"url(#{clip.get('id')})"
    assert clip[0].get("d") == "M1 1h1v1h-1zM3 1h1v1h-1z"
    assert clip[0].get("transform") == f"scale({SIDE / 4} {SIDE / 4})"
    lines = [rim, around, between]
    assert {one.get("href") for one in lines} == {f"#{clip[0].get('id')}"}
    assert [one.get("stroke") for one in lines] == ["white", *[METHODS["dart"].color] * 2]
    thick = [float(one.get("stroke-width")) for one in lines]
    assert thick[0] > thick[1] > 4 * thick[2]


@pytest.mark.parametrize("right", [[True], [False], None])
def test_an_image_kept_as_a_whole_is_not_faded_and_its_answer_marked_if_known(tmp_path, right):
    overlay(WHITE, [("unpruned", " cat", [0])], (1, 1), tmp_path / "a.svg", "What?", right)
    assert [one.get("opacity") for one in read(tmp_path / "a.svg", "use")] == ["1"]
    [path] = read(tmp_path / "a.svg", "path")
    answer = read(tmp_path / "a.svg", "text")[-1]
    ink, mark = MARKS[right[0] if right else None]
    assert (path.get("d"), answer.text, answer.get("fill")) == (mark, "cat", ink)


def test_every_panel_is_there_and_the_image_only_once(tmp_path):
    names = list(METHODS)[:7]
    overlay(WHITE, [(name, "", [3]) for name in names], (4, 4), tmp_path / "a.svg", "What?")
    text = [one.text for one in read(tmp_path / "a.svg", "text")]
    assert text == ["What?"] + [part for name in names for part in (name, "1 kept", "(nothing)")]
    assert len(read(tmp_path / "a.svg", "image")) == 1
    assert len({one.get("x") for one in read(tmp_path / "a.svg", "rect")}) == 5     # page, 4 panels
