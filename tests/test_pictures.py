"""What the pictures show, read from their elements: curves, bands, signs, text."""
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from support import pictures
from support.pictures import draw_signed, overlay, plot, plot_information, style_of
from tokprune import METHODS, InputError, Method, uniform

WHITE = Image.new("RGB", (64, 64), "white")


def read(path, name, **attributes):
    """The elements of a picture with these attributes, in the order they are drawn in."""
    wanted = {key.replace("_", "-"): value for key, value in attributes.items()}
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}" + name)
    return [one for one in found if wanted.items() <= one.attrib.items()]


def points(one) -> np.ndarray:
    numbers = re.findall(r"-?[\d.]+", one.get("points") or one.get("transform"))
    return np.array(numbers, float).reshape(-1, 2)


def curve(method, scores, error=0.0):
    return [{"method": method, "layer": layer, "score": score, "standard_error": error}
            for layer, score in enumerate(scores)]


def reference(method, score):
    return [{"method": method, "layer": None, "score": score, "standard_error": 1.0}]


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
    looks = {(style.pattern, style.marker, style.width, style.hollow) for style in styles}
    assert len(looks) == len(styles)


def test_only_a_method_that_draws_has_a_band_which_is_its_95_percent(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "coin", Method(uniform, "#aa00aa", draws=True))
    plot({"x": curve("coin", [50.0] * 12, 10.0) + curve("dart", [50.0] * 12, 10.0)},
         tmp_path / "a.svg")
    [band] = read(tmp_path / "a.svg", "polygon")
    assert band.get("fill") == "#aa00aa" and read(tmp_path / "a.svg", "rect", fill="#aa00aa")
    assert np.ptp(points(band)[:, 1]) == pytest.approx(39.2 * 400 / 106, abs=0.1)


def test_nothing_kept_lies_over_random_over_methods_over_dashed_references(tmp_path):
    names = ("none", "random", "dart")
    rows = [row for name in names for row in curve(name, [50.0] * 12)]
    plot({"x": rows + reference("unpruned", 50.0)}, tmp_path / "a.svg")
    drawn = [one for one in read(tmp_path / "a.svg", "polyline") if one.get("stroke-width") != "1"]
    inks = [pictures.INK, *(METHODS[name].color for name in names[::-1]), "white"]
    assert [one.get("stroke") for one in drawn[:5]] == inks
    assert drawn[0].get("stroke-dasharray") and np.ptp(points(drawn[0])[:, 0]) == 664


def test_one_layer_is_enough_and_panels_share_the_layers_of_all_benchmarks(tmp_path):
    """A line of one point has no length: what has no marker would not be there."""
    rows = curve("none", [50.0] * 12)
    plot({"x": rows[3:4], "y": rows[8:9], "z": reference("unpruned", 9.0)}, tmp_path / "a.svg")
    left, right = [points(one) for one in read(tmp_path / "a.svg", "polyline", stroke="white")][:2]
    assert np.ptp(left[:, 0]) == pytest.approx(28, abs=0.1)
    assert left.mean(0)[0] < 300 and right.mean(0)[0] > 760 + 600
    assert read(tmp_path / "a.svg", "svg", width="1520")                # the third goes below


def test_a_curve_runs_from_layer_to_layer_whatever_the_order_of_rows(tmp_path):
    rows = curve("dart", range(0, 96, 8))
    plot({"x": rows}, tmp_path / "a.svg")
    plot({"x": rows[6:] + rows[:6]}, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("error, low, high, text", [(0.1, 1.0, 2.0, "horizon: layer 2 [1, 2]"),
                                                    (None, None, None, "horizon: layer 2")])
def test_information_below_zero_is_drawn_there_and_intervals_where_there_are_any(
        tmp_path, error, low, high, text):
    """Cut off at 0, the third point would stand as high as the second."""
    report = information([0.2, 0.0, -0.2], error, low=low, high=high)
    plot_information(report, example(), tmp_path / "a.svg")
    [mean] = [points(one) for one in read(tmp_path / "a.svg", "polyline",
                                          stroke=pictures.MEAN.ink) if len(points(one)) == 3]
    first, second, third = mean[:, 1]
    assert third - second == pytest.approx(second - first, abs=0.1) and second - first > 50
    assert text in [one.text for one in read(tmp_path / "a.svg", "text")]
    assert len(read(tmp_path / "a.svg", "polygon")) == (2 if error else 0)
    assert len(read(tmp_path / "a.svg", "rect")) == (3 if error else 1)
    dashed = read(tmp_path / "a.svg", "polyline", stroke_dasharray="9 6")
    assert [points(one)[0, 0] for one in dashed] == [mean[2, 0]] * 2    # at the horizon


def test_windows_that_help_are_red_that_mislead_blue_and_little_can_be_seen(tmp_path):
    sheet = pictures.Sheet(9, 9)
    draw_signed(sheet, (0, 0, 9, 9), np.array([[1.0, -1.0], [0.01, 0.0]]))
    sheet.save(tmp_path / "a.svg")
    found = [(one.get("fill"), one.get("fill-opacity"), one.get("d"))
             for one in read(tmp_path / "a.svg", "path")]
    assert found == [(pictures.HELPS, "0.85", "M0 0h1v1h-1z"),
                     (pictures.MISLEADS, "0.85", "M1 0h1v1h-1z"),
                     (pictures.HELPS, "0.09", "M0 1h1v1h-1z")]


def test_no_information_and_no_horizon_can_be_drawn(tmp_path):
    report = information([0.0] * 3, layer=3, low=3.0, high=3.0, scores=[0.0] * 3, unpruned=0.0)
    plot_information(report, example(), tmp_path / "a.svg")
    assert "no horizon" in [one.text for one in read(tmp_path / "a.svg", "text")]
    assert [one.get("width") for one in read(tmp_path / "a.svg", "rect")][1:] == ["0", "0"]


@pytest.mark.parametrize("text", ["<b> & \"c\" 'd'", "\x00\x1b\ud800\ufffe]]>", "有什么？" * 99])
def test_any_text_makes_a_picture_that_stands_alone(tmp_path, text):
    """No link, script or font; what XML cannot hold is replaced, what is too long is cut."""
    overlay(WHITE, [(text, text, [1])], (2, 2), tmp_path / "a.svg", text)
    plot_information(information([0.1] * 3), example(text, text), tmp_path / "b.svg")
    for name in "ab":
        shown = [one.text for one in read(tmp_path / f"{name}.svg", "text")]
        assert len(text) < 20 or max(map(len, shown)) < 60
        assert "<" not in text or text in shown
        written = (tmp_path / f"{name}.svg").read_text()
        assert set(re.findall(r'(?:href="|url\()(#|data:|.{9})', written)) == {"#", "data:"}


@pytest.mark.parametrize("text, cut", [("a\n b", "a b"), ("many words", "many w ..."), ("", "")])
def test_text_is_cut_to_the_room_that_there_is(text, cut):
    assert pictures.shortened(text, 100, 20) == cut


def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path):
    path = tmp_path / "no" / "folder.svg"
    with pytest.raises(InputError, match=f"^{path}: cannot be written .*$"):
        plot({"x": curve("dart", [50.0] * 12)}, path)
