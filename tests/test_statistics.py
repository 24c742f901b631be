"""Errors and intervals count images, not questions, and an image counts by its questions."""
import numpy as np
import pytest

from support.statistics import (FEW, NOISE, gini, horizon_interval, information_by_layer,
                                layer_without_information, paired_difference, standard_error)


def test_standard_error_counts_images_not_questions():
    scores = np.array([0., 0, 1, 1, 1, 1])
    alone = np.arange(6)
    pairs = np.array([0, 0, 1, 1, 2, 2])
    assert standard_error(scores, alone) == pytest.approx(scores.std(ddof=1) / 6 ** 0.5)
    of_images = np.std([0, 1, 1], ddof=1) / 3 ** 0.5
    assert standard_error(scores, pairs) == pytest.approx(of_images)


def test_paired_interval_holds_the_mean_and_has_the_width_of_a_normal_one_over_images():
    """Where four questions share an image, it is twice as wide."""
    rng = np.random.default_rng(1)
    a = rng.random(200)
    b = rng.random(200)
    alone = np.arange(200)
    mean, low, high = paired_difference(a, b, alone)
    assert mean == pytest.approx((a - b).mean()) and low < mean < high
    width = 2 * 1.96 * (a - b).std() / 200 ** 0.5
    assert high - low == pytest.approx(width, rel=0.1)          # 2,000 draws: 4 % is common
    assert paired_difference(a, a, alone) == (0, 0, 0)
    of_image = rng.random(50).repeat(4)
    _, low, high = paired_difference(of_image, 0 * a, alone)
    _, lower, higher = paired_difference(of_image, 0 * a, np.arange(50).repeat(4))
    assert higher - lower == pytest.approx(2 * (high - low), rel=0.15)    # of 2,000 draws, twice


def test_under_ten_images_there_is_no_interval():
    """Two questions about one picture gave the interval [-100.0, -100.0]."""
    for images in (1, FEW - 1, FEW):
        image = np.arange(images).repeat(2)
        scores = np.ones(2 * images)
        mean, *interval = paired_difference(scores, 0 * scores, image)
        assert mean == 1 and (interval == [None, None]) == (images < FEW)
        found = horizon_interval(scores[:, None], image, len)
        assert found["layer"] == 1 and (found["low"] is None) == (images < FEW)
        assert (found["high"] is None) == (images < FEW) and (not found["draws"]) == (images < FEW)


def test_a_draw_of_images_counts_each_by_its_number_of_questions():
    """Images of nine questions lose all, images of one win all: the mean over questions is -0.8,
    the mean of the images' means 0. A bootstrap that averaged those would lie around 0. The rule of
    the horizon reads the mean off in hundredths: 90 of 100, and of no draw more than all."""
    sizes = [9] * 10 + [1] * 10
    image = np.repeat(np.arange(20), sizes)
    scores = np.repeat([0.0] * 10 + [1.0] * 10, sizes)
    mean, low, high = paired_difference(scores, 1 - scores, image)
    assert mean == pytest.approx(-0.8)
    assert -1 <= low < -0.8 < high < -0.4
    found = horizon_interval(1 - scores[:, None], image, lambda curve: round(100 * float(curve[0])))
    assert found["layer"] == 90
    assert 65 < found["low"] < 90 < found["high"] <= 100
    assert np.median(found["draws"]) == pytest.approx(90, abs=2)    # images differ in size


# ---- information ---------------------------------------------------------------------------------

@pytest.mark.parametrize("values, want", [
    ([1, 1, 1, 1], 0), ([0, 0, 0, -1], 0.75), ([0, 0], 0), ([1, 3], 0.25)])
def test_gini_worked_by_hand(values, want):
    assert gini(np.array(values, float)) == pytest.approx(want)


def test_information_by_layer_is_signed_and_averaged_over_questions():
    """Two questions, two layers, windows in one row. Less than NOISE is no share."""
    noise = [NOISE / 2, -NOISE / 2]
    maps = [np.array([[[0.3, -0.1]], [noise]]), np.array([[[0.5, 0.5]], [[-0.2, 0.0]]])]
    first, second = information_by_layer(maps, np.arange(2), [4, 9])
    assert (first["layer"], second["layer"]) == (4, 9)
    assert first["mean"] == pytest.approx((0.1 + 0.5) / 2)
    assert first["spread"] == pytest.approx((0.2 + 0.0) / 2)
    assert first["share"] == 1 and first["negative"] == 0.25
    assert second["mean"] == pytest.approx(-0.05)
    assert second["negative"] == second["share"] == 0.25
    assert first["standard_errors"]["mean"] == pytest.approx(0.2)
    same_image = information_by_layer(maps, np.zeros(2, int), [4, 9])
    assert same_image[0]["standard_errors"]["mean"] is None


@pytest.mark.parametrize("means, want", [
    ([9, 1, 0.5, 0.001, 0.0], 3),               # layer 1 counts, not layer 0
    ([9, 1, 0.5, -0.2, 0.0], 4),                # negative information is there, not gone
    ([9, 1, 0.5, 0.001, 0.02], None),           # it comes again at the end
    ([9, -1, 0.5, 0, 0], None)])                # there was none to lose
def test_information_is_gone_where_it_stays_under_a_hundredth_of_layer_1(means, want):
    rows = [{"layer": layer, "mean": mean} for layer, mean in enumerate(means)]
    assert layer_without_information(rows) == want
    assert layer_without_information(rows[2:]) is None                  # nothing to compare with
