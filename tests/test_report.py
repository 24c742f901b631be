"""Tables say what the numbers are; sentences say what the intervals carry, and no more."""
from dataclasses import replace

import pytest
from PIL import Image

from support import report
from support.benchmarks import Question
from tokprune import METHODS

SAME = (0.0, -1.0, 2.0)


def row(method, layer, score, minus_random=None, minus_none=None, minus_unpruned=None):
    return {"method": method, "layer": layer, "score": score, "minus_random": minus_random,
            "minus_none": minus_none, "minus_unpruned": minus_unpruned, "minus_first": None,
            "standard_error": 1.25, "totals": {}, "kept": 6.0, "mean_visual_tokens": 54.33,
            "gflops": 0.7324, "schedule": f"{method}@{layer}:0.9", "empty": 0, "unparsed": 0,
            "overlong": 0}


@pytest.mark.parametrize("value, want", [
    (0.84842, "0.848"), (6, "6"), (99.97, "100"), (999.7, "1000"), (8104.46, "8104")])
def test_a_count_has_three_digits_or_all_before_its_point(value, want):
    """A 7B model's prefill took 8.1e+03 GFLOPs, an image of 1,024 tokens 1.02e+03."""
    assert report.significant(value) == want


def test_names_are_listed_with_commas_and_and():
    assert report.listed([]) == "" and report.listed([3]) == "3"
    assert report.listed(["a", "b"]) == "a and b" and report.listed([1, 2, 3]) == "1, 2 and 3"


def test_numbers_and_differences_are_short_and_what_is_not_known_is_a_dash():
    """A difference that rounds to zero has no sign of its own."""
    assert report.number(93.24) == "93.2" and report.number(0.25, ".3f") == "0.250"
    assert report.number(None) == report.difference(None) == "-"
    assert report.difference((1.04, -0.5, 2.46)) == "+1.0 [-0.5, +2.5]"
    assert report.difference((1.04, None, None)) == "+1.0"
    assert report.difference((-0.0, -1, 1)) == "+0.0 [-1.0, +1.0]"
    assert report.difference((-1e-15, -0.04, 0.04)) == "+0.0 [+0.0, +0.0]"


def test_the_head_says_how_much_is_asked_and_shows_the_prompt(capsys, tmp_path):
    """Three pictures, twice each."""
    known = []
    for i in range(6):
        picture = tmp_path / f"{i // 2}.png"
        Image.new("L", (2, 2)).save(picture)
        known.append(Question(str(i), picture, f"q{i}", ["Yes"], "yesno", group="count"))
    prompt = report.print_asked("mme", known[:4], known, "USER: {question}\nASSISTANT:")
    assert prompt == "USER: q0\nASSISTANT:"
    own = [replace(question, group="") for question in known]
    report.print_asked("own.jsonl", own, own, "{question}")
    printed = capsys.readouterr().out
    assert ("mme: partial, 4 of its 6 questions, 2 images, 1 of 14 subtasks; the first prompt: "
            '"USER: q0\\nASSISTANT:"') in printed
    assert "own.jsonl: all 6 questions, 3 images; " in printed


# ---- a table -------------------------------------------------------------------------------------

def test_a_table_has_a_row_for_each_schedule_and_its_comparisons(capsys):
    rows = [row("unpruned", None, 95.0), row("dart", 20, 61.234, SAME, (-7.0, -9.0, -5.0))]
    report.print_table("textvqa", rows)
    printed = capsys.readouterr().out
    assert printed == (
        "| textvqa | score | ± | - unpruned | - random | - none | kept | mean tokens | GFLOPs |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| unpruned | 95.0 | 1.2 | - | - | - | 6 | 54.3 | 0.732 |\n"
        "| dart | 61.2 | 1.2 | - | +0.0 [-1.0, +2.0] | -7.0 [-9.0, -5.0] | 6 | 54.3 | 0.732 |\n\n")


def test_official_totals_and_the_first_schedule_get_columns_where_there_are_any(capsys):
    rows = [row("a", 2, 50.0), row("b", 2, 40.0)]
    for one in rows:
        one["totals"] = {"perception": 928.75, "cognition": 0, "sum": 928.75}
    rows[1]["minus_first"] = (-10.0, -12.0, -8.0)
    report.print_table("mme", rows)
    head, _, _, second = capsys.readouterr().out.splitlines()[:4]
    assert "| ± | perception | cognition | sum | - unpruned |" in head
    assert "| - none | - first | kept |" in head
    assert "| 928.75 | 0 | 928.75 |" in second and "| -10.0 [-12.0, -8.0] | 6 |" in second


def test_odd_answers_and_first_tokens_that_are_spaces_are_said_where_there_are_any(capsys):
    rows = [row("unpruned", None, 95.0) | {"schedule": ""}, row("dart", 20, 61.0)]
    report.print_odd("mme", rows)
    report.print_space("textvqa", 0, 40)
    assert capsys.readouterr().out == ""
    rows[1] |= {"empty": 1, "overlong": 4}
    report.print_odd("mme", rows)
    assert capsys.readouterr().out == (
        "mme, empty answers: dart@20:0.9 1\n\n"
        "mme, answers that begin with a right one and go on: dart@20:0.9 4\n\n")
    report.print_space("textvqa", 3, 40)
    assert "the first token of 3 of 40 answers is only a space" in capsys.readouterr().out


# ---- the verdict of a table ----------------------------------------------------------------------

ABOVE = (15.0, 9.0, 20.0)
BELOW = (-8.0, -12.0, -3.0)


def verdict(capsys, *rows, images=100):
    report.print_verdict("mme", list(rows), images)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("rows, said", [
    # nothing differs but an oracle
    ([row("none", 20, 90.0, minus_unpruned=SAME), row("dart", 20, 90.0, SAME, SAME),
      row("info", 20, 90.0, ABOVE, ABOVE),
      row("fastv", 20, 89.5, (-0.5, -2.0, 1.0), (0.5, -1.0, 2.0))],
     "mme: layer 20 is past the horizon: no method differs from random; no method differs from "
     "dropping every visual token."),
    ([row("none", 20, 75.7, minus_unpruned=BELOW), row("random", 20, 52.9, None, BELOW),
      row("dart", 20, 68.5, ABOVE, BELOW), row("fastv", 20, 62.6, (9.6, 3.9, 15.1), SAME)],
     "mme: layer 20 is before the horizon: 2 of 2 methods beat random, by 9.6 to 15.0 points; 1 of "
     "2 methods loses to dropping every visual token, by 8.0 points. Prune later, or drop "
     "everything."),
    # one method is worth it: no advice to drop everything
    ([row("none", 20, 75.7, minus_unpruned=BELOW), row("dart", 20, 68.5, BELOW, ABOVE),
      row("fastv", 20, 62.6, SAME, BELOW)],
     "mme: layer 20 is before the horizon: 1 of 2 methods loses to random, by 8.0 points; 1 of 2 "
     "methods beats dropping every visual token, by 15.0 points and 1 of 2 methods loses to "
     "dropping every visual token, by 8.0 points."),
    # one method against itself
    ([row("random", 20, 52.9, None, BELOW)], ""),
    ([row("dart", 2, 60.0, ABOVE), row("dart", 9, 60.0, ABOVE)], "")])
def test_the_verdict_says_who_beats_random_and_nothing_kept(rows, said, capsys):
    assert verdict(capsys, *rows) == said


def test_a_layer_is_only_past_the_horizon_where_a_cost_would_have_been_seen(capsys):
    """An interval that reaches 5 points down, or nothing lost on 59 images, can hide a cost."""
    dart = row("dart", 20, 90.0, SAME, SAME)
    for low, images, told in ((-4.9, 60, True), (-5.0, 60, False), (0.0, 60, True),
                              (0.0, 59, False)):
        none = row("none", 20, 90.0, minus_unpruned=(0.0, low, 0.0))
        said = verdict(capsys, none, dart, images=images)
        assert said.startswith("mme: layer 20 is past the horizon: no") == told
        assert ("too few questions to tell whether layer 20" in said) == (not told)


def test_of_a_few_images_no_interval_is_read(capsys):
    """"layer 8 is before the horizon: 2 of 2 methods beat random", said of one picture."""
    none = row("none", 8, 0.0, minus_unpruned=(-100.0, None, None))
    dart = row("dart", 8, 50.0, (50.0, None, None), (50.0, None, None))
    later = row("dart", 9, 50.0, (50.0, None, None), (50.0, None, None))
    for rows in ([none, dart], [row("unpruned", None, 100), row("no image", 0, 0), none, dart,
                                later]):                # a table, and a sweep
        report.print_scores("mine", rows, images=1)
        *_, said, _ = capsys.readouterr().out.splitlines()
        assert said == ("mine: 1 image: no intervals (a bootstrap wants 10 at least), and no "
                        "verdict.")
    report.print_scores("mine", [none, dart], images=9)
    assert "mine: 9 images: no intervals" in capsys.readouterr().out


# ---- a sweep -------------------------------------------------------------------------------------

def test_a_sweep_shows_a_column_a_method_and_a_row_a_layer(capsys):
    """A dash where a method cannot act; at layer 0 none is no image."""
    report.print_sweep("mme", [
        row("unpruned", None, 95), row("no image", 0, 50), row("none", 1, 45), row("none", 2, 90),
        row("random", 0, 55), row("random", 1, 40), row("random", 2, 90), row("dart", 1, 60),
        row("dart", 2, 90), row("info", 1, 90), row("info", 2, 90)])
    assert capsys.readouterr().out.startswith(
        "| mme, layer | none | random | dart | info |\n|---:|---:|---:|---:|---:|\n"
        "| unpruned | 95.0 | 95.0 | 95.0 | 95.0 |\n| no image | 50.0 | 50.0 | 50.0 | 50.0 |\n"
        "| 0 | 50.0 | 55.0 | - | - |\n| 1 | 45.0 | 40.0 | 60.0 | 90.0 |\n")


def test_a_sweep_says_where_methods_are_worth_their_tokens(capsys):
    """At layer 1 dart is 20 above random and fastv below none; at layer 2 all are equal."""
    rows = [row("random", 1, 40), row("random", 2, 90),
            row("dart", 1, 60, (20, 10, 30), (15, 5, 25)), row("dart", 2, 90, SAME, SAME),
            row("fastv", 1, 30, SAME, (-15, -25, -5)), row("fastv", 2, 90, SAME, SAME)]
    report.print_sweep_verdict("mme", rows)
    assert capsys.readouterr().out == (
        "mme: no method beats random from layer 2 on (our rule; oracles do not count). The largest "
        "lead over random is +20.0 [+10.0, +30.0], dart at layer 1.\n"
        "mme: some method's tokens are worse than none at layer 1.\n\n")
    report.print_sweep_verdict("mme", rows[:4])
    assert "no method's tokens are shown to be worse than none at any layer" in (
        capsys.readouterr().out)


def test_methods_stop_beating_random_after_the_last_whole_interval_above_it():
    rows = [row("random", layer, 50) for layer in (1, 2, 3, 4)]
    for layer, low in ((1, 1), (2, 0.5), (3, -0.5), (4, -1)):
        rows.append(row("dart", layer, 50, (low + 1, low, low + 2)))
    rows.append(row("info", 4, 60, (10, 9, 11)))                # measured beforehand: not counted
    assert report.layer_no_method_beats_random(rows) == 3
    rows.append(row("fastv", 4, 53, (3, 2, 4)))
    assert report.layer_no_method_beats_random(rows) == 5


def test_no_method_is_known_by_name(monkeypatch, capsys):
    """A new one is in tables and sentences as soon as it is in METHODS."""
    monkeypatch.setitem(METHODS, "mine", METHODS["dart"])
    said = verdict(capsys, row("none", 3, 50.0, minus_unpruned=BELOW),
                   row("mine", 3, 60.0, ABOVE, SAME))
    assert "1 of 1 methods beats random" in said


# ---- information ---------------------------------------------------------------------------------

def test_negative_information_is_said_where_a_whole_interval_is(capsys):
    def at(layer, mean, error):
        return {"layer": layer, "mean": mean, "standard_errors": {"mean": error}}
    report.print_information_verdict(
        "mme", [at(1, 0.2, 0.01), at(14, -0.02, 0.02), at(17, -0.02, 0.01), at(20, -0.02, None)],
        vanishes=22)
    printed = capsys.readouterr().out
    assert "mean information from layer 22 on stays under 1 % of layer 1's" in printed
    assert "at layer 17 it is negative, its whole interval under 0" in printed
    report.print_information_verdict("mme", [at(1, 0.2, 0.01)], vanishes=None)
    assert capsys.readouterr().out == ("mme: mean information never stays under 1 % of layer 1's "
                                       "(our rule).\n")
    report.print_information_verdict("mme", [at(20, 0.2, 0.01)], vanishes=None)
    assert capsys.readouterr().out == ""                # layer 1 was not measured


def test_a_horizon_past_the_last_layer_is_none():
    horizon = {"layer": 22, "low": 21.0, "high": 23.5}
    rule = "dropping every visual token costs {} 1 %"
    assert report.place_of(horizon, 24, rule) == (
        "horizon at layer 22 [21, 23.5]: from there on, dropping every visual token costs at most "
        "1 % (our rule).")
    assert report.place_of(horizon | {"layer": 24}, 24, rule) == (
        "no horizon [21, 23.5]: even at layer 23, dropping every visual token costs more than 1 % "
        "(our rule).")
    few = {"layer": 22, "low": None, "high": None}
    assert report.place_of(few, 24, rule).startswith("horizon at layer 22: from there on")


def test_the_distance_of_two_horizons_is_that_of_the_same_draws(capsys):
    """Of few images there are no draws, and no sentence that reads them; nor is there a horizon
    where the unpruned model scores 0."""
    def horizon(layer, draws, images=10, unpruned=50.0):
        by_score = {"layer": layer, "draws": draws, "unpruned": unpruned}
        return {"horizons": {"score": by_score}, "images": images}
    mme = horizon(17, [16, 17])
    report.print_distance_of_horizons({"mme": mme, "textvqa": horizon(22, [22, 23])})
    printed = capsys.readouterr().out
    assert printed.startswith("textvqa's horizon lies +5 [+6, +6] layers from mme's")
    report.print_distance_of_horizons({"mme": mme})
    report.print_distance_of_horizons({"mme": mme, "textvqa": horizon(22, [], images=9)})
    report.print_distance_of_horizons({"mme": mme, "textvqa": horizon(24, [24, 24], unpruned=0.0)})
    assert capsys.readouterr().out == ""
