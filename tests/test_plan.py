"""plan.py: what it promises, how it searches, and the program on planted records."""
import json
import math
import xml.etree.ElementTree as xml
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

import plan
from support import pictures, report
from support.benchmarks import Question
from support.checkpoint import read_config
from support.files import Published
from support.run import ROOT
from support.statistics import at_most, share_interval
from tokprune import METHODS, InputError, Method, format_schedule, parse_schedule


def schedules_of(*texts):
    return [tuple(parse_schedule(text)) for text in texts]


# ---- the promise ---------------------------------------------------------------------------------

def test_p_values_and_intervals_are_those_of_a_table():
    assert at_most(0, 59, 0.05) == pytest.approx(0.95 ** 59)
    assert at_most(2, 10, 0.5) == pytest.approx(56 / 1024)
    assert at_most(10, 10, 0.3) == pytest.approx(1)
    exact = sum(math.comb(3000, i) * Fraction(1, 20) ** i * Fraction(19, 20) ** (3000 - i)
                for i in range(101))
    assert at_most(100, 3000, 0.05) == pytest.approx(float(exact))
    # Clopper and Pearson, 0 and 2 of 10
    assert share_interval(0, 10) == pytest.approx((0, 0.3085), abs=1e-4)
    assert share_interval(2, 10) == pytest.approx((0.0252, 0.5561), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((0.6915, 1), abs=1e-4)


def test_the_first_schedule_that_fails_ends_the_walk():
    assert plan.walk([0.01, 0.05, 0.06, 0.001], 0.95) == 2
    assert plan.walk([0.2, 0.0], 0.95) == 0 and plan.walk([], 0.95) == 0
    assert plan.walk([0.01, 0.02], 0.95) == 2


def test_a_promise_is_broken_in_at_most_5_percent_of_the_draws():
    """However many schedules are tried: 30 that change exactly the loss, each seen on its own."""
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(500):
        counts = rng.binomial(100, 0.1, 30)
        broken += plan.walk([at_most(int(count), 100, 0.1) for count in counts], 0.95) > 0
    assert broken / 500 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)


# ---- the search ----------------------------------------------------------------------------------

def test_more_careful_is_more_tokens_at_every_layer_by_no_other_method():
    careful = plan.more_careful(schedules_of("none@3", "dart@1:0.5 none@3", "grid@1:0.5 none@3",
                                             "dart@2:0.5 none@3", "dart@1:0.5 none@2"), 64, 4)
    assert careful.tolist() == [[True, True, True, True, True],
                                [False, True, False, False, True],
                                [False, False, True, False, False],
                                [False, True, False, True, True],
                                [False, False, False, False, True]]


def test_luck_on_the_searched_questions_is_smoothed_away_and_many_questions_decide_alone():
    """Three ever bolder schedules; the middle one changed nothing by luck."""
    careful = np.triu(np.ones((3, 3), bool))
    share = np.array([0.2, 0.0, 0.4])
    risk = plan.smooth(share, plan.NEIGHBORS, careful)
    assert risk == pytest.approx([0.2, (0 + 0.15) / 2, (0.4 + 0.3) / 2])
    assert plan.smooth(share, 10 ** 6, careful) == pytest.approx(share, abs=1e-4)
    assert plan.smooth(share, 1, np.eye(3, dtype=bool)) == pytest.approx(share)


def test_a_step_of_the_cost_is_its_safest_schedule_then_the_simpler_then_the_costlier():
    cost = np.array([0.98, 0.91, 0.85, 0.84, 0.83, 0.35, 0.31])
    risk = np.array([0.01, 0.00, 0.02, 0.02, 0.02, 0.09, 0.09])
    stages = np.array([1, 2, 2, 1, 1, 2, 2])
    assert plan.steps(cost, risk, stages, 0.05) == [1, 3, 5]


def test_a_step_over_the_loss_is_left_out_if_a_cheaper_one_is_safer():
    """It would end the walk though enough questions were searched to know it."""
    cost = np.array([0.95, 0.85, 0.75, 0.65, 0.55])
    one = np.ones(5)
    assert plan.steps(cost, np.array([0.06, 0.04, 0.02, 0.08, 0.20]), one, 0.05) == [1, 2, 3]


# ---- schedules and questions ---------------------------------------------------------------------

def test_every_method_takes_part_that_needs_nothing_beforehand(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method(lambda view, n: None, "#123456"))
    names = {schedule[0][1] for schedule in plan.coarse(24, 20)}
    assert "mine" in names and "random" in names
    assert not {"none", "info", "hindsight"} & names
    for schedule in plan.coarse(24, 20) + plan.narrow(plan.coarse(24, 20), 24):
        text = format_schedule(schedule)
        assert tuple(parse_schedule(text)) == schedule, text      # layers ascend, methods fit
    assert all(schedule[0][0] < 2 for schedule in plan.coarse(24, 2))
    assert plan.coarse(24, 24)[0] == ((0, "random", 0.25),)


def test_neighbors_differ_in_one_thing():
    schedules = [parse_schedule("dart@2:0.5 none@22"), parse_schedule("none@20")]
    assert [format_schedule(near) for near in plan.narrow(schedules, 24)] == [
        "dart@2:0.375 none@22", "dart@2:0.625 none@22", "dart@4:0.5 none@22",
        "dart@2:0.5 none@23", "dart@2:0.5"]
    at_the_edge = parse_schedule("grid@0:0.5 none@2")           # no layer before, none up to 2
    assert [format_schedule(near) for near in plan.narrow([at_the_edge], 24)] == [
        "grid@0:0.375 none@2", "grid@0:0.625 none@2", "grid@0:0.5 none@3", "grid@0:0.5 none@4"]


def test_a_picture_is_in_one_part_and_is_tested_once():
    """Two benchmarks ask about each: a published one, and a user's own."""
    data = {"a": [Question("a", Published(ROOT / f"{image}.png"), "?", [], "")
                  for image in range(50)],
            "b": [Question("b", ROOT / f"{image}.png", "?", [], "") for image in range(50)]}
    parts = plan.split(data, 0)
    images = {}
    for part, of_benchmark in parts.items():
        asked = [(name, question) for name in data for question in of_benchmark[name]]
        assert all(question.id == name for name, question in asked)
        images[part] = [str(question.image) for _, question in asked]
    assert [len(images[part]) for part in ("search", "test", "report")] == [20, 30, 20]
    assert [len(set(images[part])) for part in ("search", "test", "report")] == [10, 30, 10]
    assert len(set().union(*images.values())) == 50
    assert plan.split(data, 0) == parts != plan.split(data, 1)


# ---- a plan of planted records -------------------------------------------------------------------

MODEL = SimpleNamespace(num_layers=24, config=read_config(ROOT / "tiny" / "llava"))


def planted(share_of, sizes={"search": 40, "test": 120, "report": 40}):
    """Return `ask`: a schedule changes each answer with probability share_of(its text)."""
    asked = []

    def ask(part, schedules, stage):
        asked.append((stage, len(schedules)))
        rng = np.random.default_rng(len(part))
        changed = {format_schedule(s): rng.random(sizes[part]) < share_of(format_schedule(s), part)
                   for s in schedules}
        return [{"changed": [text for text in changed if changed[text][q]], "gold": False,
                 "scores": {"unpruned": 1.0}, "visual_tokens": 64, "text_rows": 30}
                for q in range(sizes[part])]
    ask.asked = asked
    return ask


def horizon_at_17(text, part):
    *first, last = parse_schedule(text)
    if last[1] != "none":
        return 0.5
    return 0.0 if last[0] >= 17 and not first else 0.5


def test_a_planted_best_schedule_is_found_and_promised():
    def share(text, part):
        (layer, name, _), *last = parse_schedule(text)
        good = name == "dart" and layer >= 8 and last and last[0][0] >= 17
        return 0.0 if good else horizon_at_17(text, part)
    ask = planted(share)
    found = plan.make_plan(MODEL, ask, 0.1, 0.95)
    assert found["horizon"] == 17
    good = [row["flops"] for row in found["searched"] if share(row["schedule"], "test") == 0]
    assert found["chosen"]["schedule"].startswith("dart@")
    assert found["chosen"]["flops"] < min(good) + plan.STEP and found["chosen"]["test"] == [0, 120]
    assert [stage for stage, _ in ask.asked] == ["horizon", "coarse", "narrow", "test", "report"]
    assert sum(number for _, number in ask.asked[:3]) < 200


def test_the_horizon_may_change_as_many_answers_as_the_loss():
    """Dropping everything changes two of ten answers before layer 5 and one from there on; the loss
    is 10 %."""
    def ask(part, schedules, stage):
        return [{"changed": [format_schedule(schedule) for schedule in schedules
                             if number < (2 if schedule[0][0] < 5 else 1)],
                 "visual_tokens": 64, "text_rows": 20} for number in range(10)]
    horizon, _, _ = plan.search(MODEL, ask, 0.1, "flops")
    assert horizon == 5


def test_where_only_the_horizon_is_worth_it_that_is_said(capsys):
    found = plan.make_plan(MODEL, planted(horizon_at_17), 0.1, 0.95)
    assert found["chosen"]["schedule"] == "none@17"
    found |= {"benchmarks": ["a b.tsv"]}
    flags = ["--model", "tiny/qwen"], ["--bench", "my data/a b.tsv"]
    report.print_plan(found, *flags)
    printed = capsys.readouterr().out
    assert "no method is shown to be worth it" in printed
    assert "\n\n    python bench.py --model tiny/qwen --schedule none@17\n\n" in printed
    assert "eval.py" not in printed                     # it wants gold answers
    report.print_plan(found | {"unpruned": 90.0}, *flags)
    assert ("    python eval.py --model tiny/qwen --schedule none@17 --bench 'my data/a b.tsv'\n"
            in capsys.readouterr().out)


def test_what_fits_the_searched_questions_by_luck_is_not_promised():
    """Choosing on the searched questions alone took it; 7 of 100 others changed."""
    def share(text, part):
        if text.startswith("sparsevlm"):
            return 0.0 if part == "search" else 0.2
        return horizon_at_17(text, part)
    found = plan.make_plan(MODEL, planted(share), 0.1, 0.95)
    assert found["chosen"] is None or "sparsevlm" not in found["chosen"]["schedule"]
    assert any("sparsevlm" in row["schedule"] for row in found["walk"])


def test_nothing_is_promised_where_nothing_passes_and_what_would_help_is_said(capsys):
    found = plan.make_plan(MODEL, planted(
        lambda text, part: 0.0 if part == "search" else 0.085), 0.1, 0.95)
    assert found["chosen"] is None
    report.print_plan(found | {"benchmarks": ["mme"]}, [], [])
    printed = capsys.readouterr().out
    assert "nothing is promised" in printed
    assert "What would help: " in printed
    # 6 % of more questions would pass, but what seems to change as much as the loss never does
    assert report.what_helps(found, 7, 120).startswith("about 181 questions to test on")
    assert report.what_helps(found, 12, 120) == "a larger --loss"


def test_where_every_schedule_changes_too_much_nothing_is_tested(capsys):
    found = plan.make_plan(MODEL, planted(lambda text, part: 1.0), 0.1, 0.95)
    assert found["horizon"] == 24 and found["walk"] == [] and found["chosen"] is None
    report.print_plan(found | {"benchmarks": ["mme"]}, [], [])
    assert "every schedule seems to change far more" in capsys.readouterr().out


def test_a_result_is_json_and_its_picture_marks_the_walk(tmp_path):
    found = plan.make_plan(MODEL, planted(horizon_at_17), 0.1, 0.95) | {"benchmarks": ["<mine>"]}
    assert json.loads(json.dumps(found))["chosen"] == found["chosen"]
    pictures.plot_plans([found], tmp_path / "plan.svg")
    picture = xml.parse(tmp_path / "plan.svg").getroot()
    marks = [node for node in picture.iter() if node.tag.endswith("path")]
    names = {row["schedule"].split("@")[0] for row in found["searched"]}
    assert len(marks) == len(found["searched"]) + len(found["walk"]) + len(names)
    assert len([node for node in picture.iter() if node.tag.endswith("circle")]) == 1   # the ring
    assert "&lt;mine&gt;" in (tmp_path / "plan.svg").read_text()


# ---- the program ---------------------------------------------------------------------------------

def test_an_answer_counts_as_changed_as_the_metric_reads_it():
    """"Yes." is Yes to a metric. Where there is none, or it cannot read it, it is another text."""
    def record(answers, gold, metric):
        answers = dict(zip(["unpruned", "none@3", "none@2"], answers, strict=True))
        stream = SimpleNamespace(N=4, x=np.zeros((1, 9, 1)))
        return plan.record_of(Question("1", ROOT, "?", gold, metric), answers, stream)
    found = record(["Yes", "Yes.", "no"], ["no"], "yesno")
    assert found["changed"] == ["none@2"]
    assert found["scores"] == {"unpruned": 0, "none@3": 0, "none@2": 1}
    found = record(["Yes", "Yes.", "no"], [], "")
    assert found["changed"] == ["none@3", "none@2"]
    assert not found["gold"] and found["text_rows"] == 5
    found = record(["perhaps", "perhaps", "who knows"], ["Yes"], "yesno")
    assert found["changed"] == ["none@2"]


def test_the_program_plans_resumes_and_needs_no_gold_answer(run, tmp_path, monkeypatch):
    """On questions of one's own without answers and metric; the second run asks nothing anew. Two
    layers of two methods are searched, so that it runs in seconds."""
    monkeypatch.setattr(plan, "coarse", lambda L, horizon: schedules_of(
        f"grid@8:0.5 none@{min(horizon, L - 1)}", "divprune@20:0.5"))
    monkeypatch.setattr(plan, "narrow", lambda schedules, L: [])
    images = sorted((ROOT / "tiny" / "textvqa" / "train_images").iterdir())[:8]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"id": i, "image": str(image), "question": "What is it?"})
                            + "\n" for i, image in enumerate(images)))
    flags = ["--bench", mine, "--loss", 0.6, "--max-new-tokens", 2]
    printed, result = run(plan.main, *flags, out=tmp_path / "out")
    [found] = result["plans"]
    assert found["unpruned"] is None and found["benchmarks"] == ["mine.jsonl"]
    assert found["chosen"] and found["chosen"]["test"][1] == 5
    assert "With a confidence of 95%" in printed and "python bench.py" in printed
    assert "python eval.py" not in printed
    assert (tmp_path / "out" / "plan.svg").exists()
    assert len(list(tmp_path.glob("out/*/answers.jsonl"))) == 5
    monkeypatch.setattr(plan, "answer_questions", lambda *_: pytest.fail("asked anew"))
    _, again = run(plan.main, *flags, out=tmp_path / "out")
    assert again["plans"] == result["plans"]


def test_what_cannot_be_promised_is_said_before_the_model_is_loaded(monkeypatch):
    """With how many questions it takes and what these could promise. 59 are enough for 5 %."""
    monkeypatch.setattr(plan.flags, "load_model", lambda args: pytest.fail("loaded"))
    with pytest.raises(InputError, match="--loss 0.02: wants 149 images to test on at a confidence "
                                         "of 0.95, about 249 in all; mme leaves 6; they could "
                                         "promise 0.39"):
        plan.main(["--loss", "0.02", "--bench", "mme", "--limit", "20"])
    plan.check_questions(59, ["mine"], 0.05, 0.95)
    with pytest.raises(InputError, match="wants 59 images .* leaves 58;"):
        plan.check_questions(58, ["mine"], 0.05, 0.95)
    with pytest.raises(InputError, match="--confidence: 1, want more than 0 and less than 1"):
        plan.main(["--confidence", "1"])
