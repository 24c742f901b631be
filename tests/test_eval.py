"""eval.py end to end on the built-in models and benchmarks, a few questions at a time."""
import json

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from support import runs
from support.benchmarks import Question, images_of, load_benchmark
from support.checkpoint import read_config
from support.files import read_image
from support.records import read_records
from support.statistics import standard_error
from tokprune import METHODS, InputError, flops, prefill

TINY = runs.ROOT / "tiny"
BENCHMARKS = ["mme", "textvqa"]                         # those of tiny/
SUBTASKS = ["existence", "count", "position", "color", "OCR"]
# in percent: textvqa, mme; on all questions the models reach 93 and 95, 97 and 98
BARS = {"llava": (90, 90), "qwen": (95, 95)}


def records_of(out, benchmark=None):
    records = read_records(out / "answers.jsonl")
    return [record for record in records if benchmark in (None, record["benchmark"])]


def by_schedule(result, benchmark):
    return {row["schedule"]: row for row in result["benchmarks"][benchmark]}


def by_method(result, benchmark):
    return {row["method"]: row for row in result["benchmarks"][benchmark]}


# ---- cells ---------------------------------------------------------------------------------------

def test_odd_answers_are_counted_over_seeds():
    cells = [evaluation.Cell("random", ((1, "random", 3),), seed) for seed in (0, 1)]
    one, other = (cell.key for cell in cells)
    records = [{"answers": {one: " ", other: "yes"}, "parsed": {one: None, other: "yes"}},
               {"answers": {one: "yesno", other: ""}, "parsed": {one: "yesno", other: None}},
               None]
    questions = [Question(id, None, "", ["Yes"], "exact") for id in "123"]
    assert evaluation.odd_answers(cells, questions, records) == {
        "failed": 1, "empty": 2, "unparsed": 2, "overlong": 1}


def test_all_methods_and_layers_are_those_that_fit():
    def cells_of(*flags):
        args = evaluation.parse_arguments(list(flags))
        return {(cell.name, cell.schedule[0][0]) for cell in evaluation.parse_cells(args, 4)
                if cell.schedule}
    every = cells_of("--layer", "all")
    assert {layer for method, layer in every if method == "divprune"} == {0, 1, 2, 3}
    assert {layer for method, layer in every if method == "fastv"} == {1, 2, 3}
    assert ("fastv", 1) in cells_of("--layer", "all", "--method", "fastv")
    with pytest.raises(InputError, match="fastv reads the layer before"):
        cells_of("--layer", "0", "--method", "fastv")


def test_removing_nothing_is_not_taken_for_keeping_nothing(run, tmp_path):
    """0 and 0.0, 1 and 1.0 are equal keys; a ratio and a count are not."""
    flags = []
    for schedule in ("random@0:0", "random@20=1", "random@20:1.0"):
        flags += ["--schedule", schedule]
    _, result = run(evaluation.main, *flags, "--bench", "mme", "--limit", 2, out=tmp_path)
    rows = by_schedule(result, "mme")
    assert {name: (row["kept"], row["seeds"]) for name, row in rows.items()} == {
        "": (64, 1), "random@0=0": (0, 1), "random@0:0.0": (64, 1), "random@20=1": (1, 3),
        "random@20:1.0": (0, 1)}


def test_a_sweep_gives_each_cell_what_it_gets_alone(run, tmp_path):
    flags = ["--ratio", 0.8, "--limit", 3, "--seeds", 1, "--method", "dart,info", "--bench",
             "textvqa"]
    plot = tmp_path / "plot.png"
    printed, sweep = run(evaluation.main, "--layer", "3,20", *flags, "--plot", plot,
                         out=tmp_path / "sweep")
    _, alone = run(evaluation.main, "--layer", 20, *flags, out=tmp_path / "20")
    swept = by_schedule(sweep, "textvqa")
    for schedule, row in by_schedule(alone, "textvqa").items():
        assert swept[schedule]["score"] == row["score"]
    both = [records_of(tmp_path / name) for name in ("sweep", "20")]
    for one, other in zip(*both):
        assert other["answers"].items() <= one["answers"].items()
    assert "| textvqa, layer | none | random | dart | info |" in printed
    assert Image.open(plot).size[0] > 500


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_the_one_loop_answers_as_each_schedule_does_on_its_own(positions):
    """Shared prefixes and batches of variants change no answer."""
    args = evaluation.parse_arguments([
        "--schedule", "divprune@0:0.5 random@12=5", "--schedule", "fastv@6=7", "--schedule",
        "grid@6=40", "--seeds", "2", "--positions", positions])
    model = runs.load_model(args)
    cells = evaluation.parse_cells(args, model.num_layers)
    assert [cell.key for cell in cells] == [
        "unpruned", "random@0=0 seed 0",
        "divprune@0:0.5 random@12=5 seed 0", "divprune@0:0.5 random@12=5 seed 1",
        "random@0:0.5 random@12=5 seed 0", "random@0:0.5 random@12=5 seed 1",
        "fastv@6=7 seed 0", "random@6=7 seed 0", "random@6=7 seed 1",
        "grid@6=40 seed 0", "random@6=40 seed 0", "random@6=40 seed 1"]
    for question in load_benchmark("textvqa", TINY)[:1]:
        image = read_image(question.image)
        stream = model.begin(image, question.prompt)
        answers = evaluation.answer_cells(model, stream, question, cells, args)
        for cell in cells:
            alone = prefill(model, model.begin(image, question.prompt), cell.schedule,
                            cell.seed + question.seed, positions)
            assert answers[cell.key] == model.decode(alone)[0], cell.key


def test_the_first_of_several_schedules_is_compared_with_the_others(run, tmp_path):
    printed, result = run(evaluation.main, "--schedule", "divprune@2=20", "--schedule",
                          "divprune@2=29 random@16=0", "--bench", "textvqa", "--limit", 4,
                          "--seeds", 1, out=tmp_path)
    rows = by_schedule(result, "textvqa")
    first = rows["divprune@2=20"]
    second = rows["divprune@2=29 random@16=0"]
    assert first["minus_first"] is None and "| - first |" in printed
    assert second["minus_first"][0] == pytest.approx(second["score"] - first["score"])


def test_schedules_are_compared_by_what_they_keep():
    """To keep one (=1) is not to remove all (:1.0); random in place of the first may be asked."""
    for second in ("dart@2:1.0", "random@2=1"):
        args = evaluation.parse_arguments(["--schedule", "dart@2=1", "--schedule", second])
        cells = {cell.key: cell for cell in evaluation.parse_cells(args, 24)}
        compared = cells[f"{second} seed 0"].compared_with
        assert evaluation.format_schedule(compared) == "dart@2=1"


def test_a_budget_is_spent_alone_with_random_and_with_nothing_past_the_horizon(run, tmp_path):
    _, result = run(evaluation.main, "--budget", "1/3,1/9", "--layer", 17, "--limit", 2, "--bench",
                    "mme", "--seeds", 1, out=tmp_path)
    rows = by_schedule(result, "mme")
    assert len(rows) == 2 + 4 * 4                       # unpruned, no image; four for each budget
    for alone, others in (
            ("dart@2:0.7188", ["dart@2:0.625 random@17:0.9375", "dart@2:0.5938 random@17:1.0"]),
            ("divprune@0:0.875", ["divprune@0:0.8438 random@17:0.9688",
                                  "divprune@0:0.8281 random@17:1.0"])):
        assert rows[alone]["minus_first"] is None and rows[alone]["minus_random"]
        tokens = rows[alone]["mean_visual_tokens"]
        for schedule in others:
            row = rows[schedule]
            assert 0.9 * tokens < row["mean_visual_tokens"] <= tokens
            assert row["minus_first"][0] == pytest.approx(row["score"] - rows[alone]["score"])


def test_repetition_penalty_reaches_the_model(run, tmp_path):
    """A heavy one lets no character be said twice."""
    flags = ["--model", TINY / "qwen", "--bench", "textvqa", "--limit", 4, "--schedule",
             "random@0=0"]
    run(evaluation.main, *flags, out=tmp_path / "1")
    run(evaluation.main, *flags, "--repetition-penalty", 1e6, out=tmp_path / "2")
    without, heavy = ([record["answers"]["unpruned"] for record in records_of(tmp_path / name)]
                      for name in "12")
    assert without != heavy
    assert all(len(set(answer)) == len(answer) for answer in heavy)


# ---- the main command ----------------------------------------------------------------------------

@pytest.fixture(scope="module", params=BARS)
def main_command(request, run, tmp_path_factory):
    """The README's first command, on two images: (what it printed, result, folder)."""
    out = tmp_path_factory.mktemp("main")
    model = [] if request.param == "llava" else ["--model", TINY / request.param]
    printed, result = run(evaluation.main, *model, "--layer", 20, "--ratio", 0.9, "--limit", 2,
                          "--json", out=out)
    return printed, result, out


def test_main_command_prints_a_row_for_every_method(main_command):
    printed, result, out = main_command
    for benchmark in BENCHMARKS:
        rows = by_method(result, benchmark)
        assert list(rows) == ["unpruned", "no image", "none", *METHODS]
        assert rows["random"]["seeds"] == 3 and rows["dart"]["seeds"] == 1
        records = records_of(out, benchmark)
        N = np.array([record["visual_tokens"]["unpruned"][0][1] for record in records])
        n = np.array([round(0.1 * V) for V in N])
        text = np.array([record["text_rows"] for record in records])
        config = read_config(result["model"]).text
        L = config.num_hidden_layers
        mean_tokens = ((20 * N + (L - 20) * n) / L).mean()
        work = flops(config, [*(text + N)] * 20 + [*(text + n)] * (L - 20)) / len(N) / 1e9
        for method in METHODS:
            row = rows[method]
            assert row["kept"] == pytest.approx(n.mean())
            assert row["mean_visual_tokens"] == pytest.approx(mean_tokens)
            assert row["gflops"] == pytest.approx(work)
            assert f"\n| {method} | {row['score']:.1f} |" in printed
        assert rows["unpruned"]["gflops"] > work > rows["none"]["gflops"]
        assert rows["none"]["kept"] == 0 and rows["no image"]["mean_visual_tokens"] == 0
    assert "repetition penalty 1;" in printed


def test_differences_are_of_the_scores_in_the_table(main_command):
    _, result, _ = main_command
    for benchmark in BENCHMARKS:
        rows = by_method(result, benchmark)
        scope = rows["scope"]
        for key, other in (("minus_random", "random"), ("minus_unpruned", "unpruned"),
                           ("minus_none", "none")):
            want = scope["score"] - rows[other]["score"]
            assert scope[key][0] == pytest.approx(want), (benchmark, key)
        want = scope["score"] - rows["info"]["score"]
        assert scope["minus_oracles"]["info"][0] == pytest.approx(want)
        assert rows["random"]["minus_random"] is None and rows["none"]["minus_none"] is None


def test_errors_are_clustered_by_image(unpruned):
    result, records = unpruned["llava"]
    asked = runs.sample(load_benchmark("mme", TINY), 24, 0)
    scores = {record["id"]: record["scores"]["random@0=0 seed 0"] for record in records}
    scores = np.array([100 * scores[question.id] for question in asked])
    by_image = standard_error(scores, images_of(asked))
    assert by_image != pytest.approx(standard_error(scores, np.arange(len(asked))), rel=0.1)
    blind = by_method(result, "mme")["no image"]
    assert blind["standard_error"] == pytest.approx(by_image)


def test_a_record_says_all_of_a_question(main_command):
    _, _, out = main_command
    record = records_of(out, "textvqa")[0]
    N = record["visual_tokens"]["unpruned"][0][1]
    keys = ["unpruned", "random@0=0 seed 0", "random@20=0 seed 0", "random@20:0.9 seed 0",
            "random@20:0.9 seed 1", "random@20:0.9 seed 2"]
    for part in ("answers", "parsed", "scores", "visual_tokens"):
        assert set(keys) <= record[part].keys(), part
        assert len(record[part]) == 5 + len(METHODS)    # random counts three
    assert record["visual_tokens"]["dart@20:0.9 seed 0"] == [[0, N], [20, round(0.1 * N)]]
    assert record["visual_tokens"]["random@0=0 seed 0"] == [[0, 0]]
    assert record["ms"] > 0 and record["text_rows"] > 10 and len(record["prompt"]) == 12


def test_the_path_of_the_result_is_printed_and_json_is_the_last_line(main_command):
    printed, result, out = main_command
    *_, path, last = printed.splitlines()
    assert path == f"result: {out / 'result.json'}"
    assert json.loads(last) == result
    assert result["command"].startswith("eval.py ") and result["repetition_penalty"] == 1


# ---- the built-in models and benchmarks ----------------------------------------------------------

@pytest.fixture(scope="module")
def unpruned(run, tmp_path_factory):
    """Each built-in model on about 24 questions of each benchmark, with all of the image and with
    none: {model: (result, records)}."""
    found = {}
    for name in BARS:
        out = tmp_path_factory.mktemp(name)
        _, result = run(evaluation.main, "--model", TINY / name, "--schedule", "random@0=0",
                        "--limit", 24, out=out)
        found[name] = result, records_of(out)
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
        scores = [record["scores"]["unpruned"] for record in records
                  if record["id"].startswith(f"{subtask}/")]
        assert scores and np.mean(scores) >= 0.75, subtask


def test_qwen_sees_images_in_their_own_shape_and_llava_in_one(unpruned):
    tokens = {}
    for name in BARS:
        _, records = unpruned[name]
        tokens[name] = {record["visual_tokens"]["unpruned"][0][1] for record in records}
    assert tokens["llava"] == {64}
    assert len(tokens["qwen"]) > 2 and tokens["qwen"] <= {60, 63, 64, 66, 72}
