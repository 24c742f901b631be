"""eval.py end to end on the built-in models and benchmarks, a few questions at a time."""
import json

import numpy as np
import pytest

import eval as evaluation
from information import information_of_tokens, measure_beforehand
from support import flags
from support.benchmarks import Question, images_of, load_benchmark
from support.checkpoint import read_config
from support.files import read_image
from support.run import ROOT, read_records
from support.statistics import paired_difference, standard_error
from tokprune import METHODS, Decoding, Method, decode, flops, prefill, take_turns

TINY = ROOT / "tiny"
BENCHMARKS = ["mme", "textvqa"]                         # those of tiny/
SUBTASKS = ["existence", "count", "position", "color", "OCR"]
# in percent: textvqa, mme; on all questions the models reach 93 and 95, 97 and 98
BARS = {"llava": (90, 90), "qwen": (95, 95)}


def records_of(out, benchmark):
    return list(read_records(out, benchmark).values())


def rows_of(result, benchmark, key="method"):
    return {row[key]: row for row in result["benchmarks"][benchmark]}


def cells_of(*argv, layers=24):
    return evaluation.parse_cells(evaluation.parse_arguments(list(argv)), layers)


# ---- cells ---------------------------------------------------------------------------------------

def test_odd_answers_are_counted_over_seeds():
    cells = [evaluation.Cell("random", ((1, "random", 3),), seed) for seed in (0, 1)]
    one, other = (cell.key for cell in cells)
    records = [{"answers": {one: " ", other: "yes"}, "parsed": {one: None, other: "yes"}},
               {"answers": {one: "yesno", other: ""}, "parsed": {one: "yesno", other: None}}]
    questions = [Question(id, None, "", ["Yes"], "exact") for id in "12"]
    assert evaluation.odd_answers(cells, questions, records) == {
        "empty": 2, "unparsed": 2, "overlong": 1}


def test_all_methods_and_layers_are_those_that_fit():
    def pairs(*argv):
        return {(cell.name, cell.schedule[0][0]) for cell in cells_of(*argv, layers=4)
                if cell.schedule}
    every = pairs("--layer", "all")
    assert {layer for method, layer in every if method == "divprune"} == {0, 1, 2, 3}
    assert {layer for method, layer in every if method == "fastv"} == {1, 2, 3}
    assert ("fastv", 1) in pairs("--layer", "all", "--method", "fastv")


def test_schedules_are_compared_by_what_they_keep():
    """To keep one (=1) is not to remove all (:1.0); random in place of the first may be asked."""
    for second in ("dart@2:1.0", "random@2=1"):
        cells = cells_of("--schedule", "dart@2=1", "--schedule", second)
        compared = {cell.key: cell.compared_with for cell in cells}[f"{second} seed 0"]
        assert evaluation.format_schedule(compared) == "dart@2=1"


def test_none_at_layer_0_is_no_image_and_runs_once():
    cells = cells_of("--layer", "0", "--method", "none", "--seeds", "1")
    assert [cell.name for cell in cells] == ["unpruned", "no image", "random"]


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_the_one_loop_answers_as_each_schedule_does_on_its_own(positions):
    """Shared prefixes and batches of variants change no answer. Random stands in the place of every
    stage but none."""
    args = evaluation.parse_arguments([
        "--schedule", "divprune@0:0.5 random@12=5", "--schedule", "fastv@6=7", "--schedule",
        "grid@6=40 none@17", "--seeds", "2"])
    model = flags.load_model(args)
    cells = evaluation.parse_cells(args, model.num_layers)
    assert [cell.key for cell in cells] == [
        "unpruned", "none@0 seed 0",
        "divprune@0:0.5 random@12=5 seed 0", "divprune@0:0.5 random@12=5 seed 1",
        "random@0:0.5 random@12=5 seed 0", "random@0:0.5 random@12=5 seed 1",
        "fastv@6=7 seed 0", "random@6=7 seed 0", "random@6=7 seed 1",
        "grid@6=40 none@17 seed 0", "random@6=40 none@17 seed 0", "random@6=40 none@17 seed 1"]
    question = load_benchmark("textvqa", TINY)[0]
    start = model.begin(read_image(question.image), question.prompt)
    [answers] = evaluation.answer_cells(model, {0: start}, cells, {}, [question.seed],
                                        Decoding(4), positions)
    for cell in cells:
        pruned = prefill(model, start, cell.schedule, cell.seed + question.seed,
                         positions=positions)
        assert answers[cell.key] == decode(model, pruned, 4)[0], cell.key


# ---- a few questions -----------------------------------------------------------------------------

def test_removing_nothing_keeping_nothing_and_none_are_told_apart(run, tmp_path):
    """0 and 0.0, 1 and 1.0 are equal keys; a ratio and a count are not. What none answers stands
    under its own name. The first schedule is compared with the others."""
    argv = ["--bench", "textvqa", "--limit", 2, "--seeds", 2]
    for schedule in ("random@0:0", "random@2=1", "random@2:1.0", "random@2=0", "none@2"):
        argv += ["--schedule", schedule]
    printed, result = run(evaluation.main, *argv, out=tmp_path)
    rows = rows_of(result, "textvqa", "schedule")
    assert {name: (row["kept"], row["seeds"]) for name, row in rows.items()} == {
        "": (64, 1), "none@0": (0, 1), "random@0:0.0": (64, 2), "random@2=1": (1, 2),
        "random@2:1.0": (0, 2), "random@2=0": (0, 2), "none@2": (0, 1)}
    first, none = rows["random@0:0.0"], rows["none@2"]
    assert first["minus_first"] is None and "| - first |" in printed
    assert none["minus_first"][0] == pytest.approx(none["score"] - first["score"])
    for record in records_of(tmp_path, "textvqa"):
        answers = record["answers"]
        assert answers["none@2 seed 0"] == answers["random@2=0 seed 0"] != answers["unpruned"]


def test_a_sweep_gives_each_cell_what_it_gets_alone(run, tmp_path):
    argv = ["--ratio", 0.8, "--limit", 2, "--seeds", 1, "--method", "dart,info", "--bench",
            "textvqa", "--max-new-tokens", 6]
    plot = tmp_path / "plot.svg"
    printed, sweep = run(evaluation.main, "--layer", "15,20", *argv, "--plot", plot,
                         out=tmp_path / "sweep")
    _, alone = run(evaluation.main, "--layer", 20, *argv, "--batch", 1, out=tmp_path / "20")
    swept = rows_of(sweep, "textvqa", "schedule")
    for schedule, row in rows_of(alone, "textvqa", "schedule").items():
        assert swept[schedule]["score"] == row["score"]
    both = [records_of(tmp_path / name, "textvqa") for name in ("sweep", "20")]
    for one, other in zip(*both):
        assert other["answers"].items() <= one["answers"].items()
    assert "| textvqa, layer | none | random | dart | info |" in printed
    assert "<svg" in plot.read_text("utf-8")


def test_repetition_penalty_reaches_the_model(run, tmp_path):
    """A heavy one lets no character be said twice."""
    argv = ["--model", TINY / "qwen", "--bench", "textvqa", "--limit", 1, "--schedule", "none@0",
            "--max-new-tokens", 8]
    run(evaluation.main, *argv, out=tmp_path / "1")
    run(evaluation.main, *argv, "--repetition-penalty", 1e6, out=tmp_path / "2")
    without, heavy = ([record["answers"]["unpruned"] for record in records_of(tmp_path / name,
                                                                              "textvqa")]
                      for name in "12")
    assert without != heavy
    assert all(len(set(answer)) == len(answer) for answer in heavy)


def test_a_new_method_without_gold_measures_the_models_own_answer(run, tmp_path, monkeypatch):
    """A fork's entry of METHODS is enough, as README promises; the gold answer is not its to see.
    An oracle measures that one. Seed 18 asks a question that the model answers wrongly."""
    monkeypatch.setitem(METHODS, "mine", Method(take_turns, "#123456", measure="tokens"))
    argv = ["--method", "mine,info-turns", "--bench", "textvqa", "--limit", "1", "--seed", "18"]
    _, result = run(evaluation.main, *argv, out=tmp_path)
    assert rows_of(result, "textvqa")["unpruned"]["score"] < 100
    args = evaluation.parse_arguments(argv)
    model = flags.load_model(args)
    known = {question.id: question for question in load_benchmark("textvqa", TINY)}
    for record in records_of(tmp_path, "textvqa"):
        question = known[record["id"]]
        start = model.begin(read_image(question.image), question.prompt)
        own = record["answers"]["unpruned"]
        for name, answer in (("mine", own), ("info-turns", question.gold_written)):
            info = {20: {name: information_of_tokens(model, {0: start}, [answer], [20])[0]}}
            want = decode(model, prefill(model, start, [(20, name, 0.9)], question.seed, info))[0]
            assert record["answers"][f"{name}@20:0.9 seed 18"] == want


def test_an_empty_own_answer_is_measured_as_it_is_but_by_an_oracle(run, tmp_path, monkeypatch):
    """hindsight saw the gold answer in its place."""
    measured = {}

    def measure(model, streams, layers_of, answers_for, max_batch_tokens):
        measured.update({name: answers_for(METHODS[name]) for name in layers_of})
        return measure_beforehand(model, streams, layers_of, answers_for, max_batch_tokens)
    monkeypatch.setattr(evaluation, "measure_beforehand", measure)
    monkeypatch.setattr(evaluation, "decode", lambda model, stream, *_: [""] * len(stream.x))
    run(evaluation.main, "--method", "hindsight,info", "--bench", "textvqa", "--limit", 1,
        "--answers", "own", out=tmp_path)
    assert set(measured["hindsight"]) == {""} and "" not in measured["info"]


# ---- the main command ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def main_command(run, tmp_path_factory):
    """The README's first command, on an image or two: (what it printed, result, folder)."""
    out = tmp_path_factory.mktemp("main")
    printed, result = run(evaluation.main, "--layer", 20, "--ratio", 0.9, "--limit", 2, "--json",
                          out=out)
    return printed, result, out


def test_main_command_prints_a_row_for_every_method_and_the_result_as_json_at_last(main_command):
    printed, result, out = main_command
    for benchmark in BENCHMARKS:
        rows = rows_of(result, benchmark)
        assert list(rows) == ["unpruned", "no image", *METHODS]
        assert rows["random"]["seeds"] == 3 and rows["dart"]["seeds"] == 1
        records = records_of(out, benchmark)
        N = np.array([record["visual_tokens"] for record in records])
        n = np.array([round(0.1 * V) for V in N])
        text = np.array([record["text_rows"] for record in records])
        config = read_config(TINY / "llava").text
        L = config.num_hidden_layers
        mean_tokens = ((20 * N + (L - 20) * n) / L).mean()
        work = flops(config, [*(text + N)] * 20 + [*(text + n)] * (L - 20)) / len(N) / 1e9
        for method in METHODS:
            row = rows[method]
            assert f"\n| {method} | {row['score']:.1f} |" in printed
            if method != "none":
                assert row["kept"] == pytest.approx(n.mean())
                assert row["mean_visual_tokens"] == pytest.approx(mean_tokens)
                assert row["gflops"] == pytest.approx(work)
        assert rows["unpruned"]["gflops"] > work > rows["none"]["gflops"]
        assert rows["none"]["kept"] == 0 and rows["no image"]["mean_visual_tokens"] == 0
    assert "repetition penalty 1;" in printed and "mme: 1 image: no intervals" in printed
    *_, path, last = printed.splitlines()
    assert path == f"result: {out / 'result.json'}"
    assert json.loads(last) == result and result["repetition_penalty"] == 1


def test_differences_are_of_the_scores_in_the_table(main_command):
    _, result, _ = main_command
    for benchmark in BENCHMARKS:
        rows = rows_of(result, benchmark)
        scope = rows["scope"]
        for other in ("random", "unpruned", "none"):
            want = scope["score"] - rows[other]["score"]
            assert scope[f"minus_{other}"][0] == pytest.approx(want), (benchmark, other)
        want = scope["score"] - rows["info"]["score"]
        assert scope["minus_oracles"]["info"][0] == pytest.approx(want)
        assert rows["random"]["minus_random"] is None and rows["none"]["minus_none"] is None


# ---- the built-in models and benchmarks ----------------------------------------------------------

@pytest.fixture(scope="module")
def unpruned(run, tmp_path_factory):
    """Each built-in model on about 20 questions of each benchmark, with all of the image and with
    none: {model: (result, records by benchmark)}. No word has more than 6 tokens."""
    found = {}
    for name in BARS:
        out = tmp_path_factory.mktemp(name)
        _, result = run(evaluation.main, "--model", TINY / name, "--schedule", "none@0", "--limit",
                        20, "--max-new-tokens", 8, out=out)
        found[name] = result, {benchmark: records_of(out, benchmark) for benchmark in BENCHMARKS}
    return found


@pytest.mark.parametrize("name", BARS)
def test_builtin_model_reaches_its_bars_and_needs_the_image(unpruned, name):
    """Without the image: a coin's share of yes and no, and no word read."""
    text_bar, mme_bar = BARS[name]
    result, records = unpruned[name]
    full, blind = result["benchmarks"]["mme"]
    text, blind_text = result["benchmarks"]["textvqa"]
    assert text["score"] >= text_bar and blind_text["score"] < 2
    assert full["score"] >= mme_bar and blind["score"] < 75     # of 20: 70 is common
    for subtask in SUBTASKS:
        scores = [record["scores"]["unpruned"] for record in records["mme"]
                  if record["id"].startswith(f"{subtask}/")]
        assert scores and np.mean(scores) >= 0.75, subtask


def test_errors_and_intervals_are_clustered_by_image(unpruned):
    result, records = unpruned["llava"]
    asked = flags.sample(load_benchmark("mme", TINY), 20, 0)
    image = images_of(asked)
    alone = np.arange(len(asked))
    full, blind = (np.array([100 * record["scores"][key] for record in records["mme"]])
                   for key in ("unpruned", "none@0 seed 0"))
    by_image = standard_error(blind, image)
    assert by_image != pytest.approx(standard_error(blind, alone), rel=0.1)
    interval = list(paired_difference(blind, full, image))
    assert interval != pytest.approx(paired_difference(blind, full, alone), rel=0.05)
    row = rows_of(result, "mme")["no image"]
    assert (row["standard_error"], row["minus_unpruned"]) == (by_image, interval)
