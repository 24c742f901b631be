"""information.py as a program, and the horizon that eval.py asks it for."""
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import information
from support import records, runs
from support.benchmarks import Question, load_benchmark
from support.records import read_records
from tokprune import InputError

ROOT = runs.ROOT
TINY = ROOT / "tiny"
FLAGS = ["--layer", "1,12,23", "--limit", "1"]
LAYERS = [1, 12, 23]
BENCHMARKS = ["mme", "textvqa"]


# ---- calibration ---------------------------------------------------------------------------------

class Model:
    """As much of a model as `calibrate` asks for."""
    num_layers = 4


def settings(**changes):
    values = {"calibrate": 2, "seed": 0, "tolerance": 0.01, "threshold": 0.002, "rule": "score"}
    return SimpleNamespace(**(values | changes))


def calibrate(monkeypatch, tmp_path, args, works_from=2, failing=()):
    """Six questions of as many images, all lost when everything is dropped before that layer."""
    questions = [Question(str(i), ROOT / f"{i}.jpg", "?", ["x"], "exact") for i in range(6)]

    def measure_horizon(model, benchmark, chosen, args, folder):
        found = []
        for question in chosen:
            scores = {str(layer): float(layer >= works_from) for layer in range(4)}
            nats = [4.0, 1.0, 0.1, 0.001]
            record = {"scores": scores | {"unpruned": 1.0}, "divergence": nats}
            found.append(None if question.id in failing else record)
        return found
    monkeypatch.setattr(information, "measure_horizon", measure_horizon)
    return information.calibrate(Model, "mine", questions, args, tmp_path)


def test_questions_that_the_horizon_is_measured_on_are_not_scored(monkeypatch, tmp_path, capsys):
    layer, others, failed = calibrate(monkeypatch, tmp_path, settings())
    assert (layer, len(others), failed) == (2, 4, 0)
    assert ("mine: horizon at layer 2, measured on 2 questions; 4 others remain to be scored"
            in capsys.readouterr().out)
    _, by_other_seed, _ = calibrate(monkeypatch, tmp_path, settings(seed=5))
    assert {question.id for question in others} != {question.id for question in by_other_seed}


def test_the_rule_and_its_threshold_decide(monkeypatch, tmp_path):
    args = settings(rule="divergence")
    assert calibrate(monkeypatch, tmp_path, args)[0] == 3
    args = settings(rule="divergence", threshold=0.1)
    assert calibrate(monkeypatch, tmp_path, args)[0] == 2
    args = settings(tolerance=1.0)
    assert calibrate(monkeypatch, tmp_path, args)[0] == 0


def test_a_horizon_that_cannot_be_had_is_said(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--calibrate: 6, and mine has 6 questions"):
        calibrate(monkeypatch, tmp_path, settings(calibrate=6))
    with pytest.raises(InputError, match="--layer horizon: mine has none"):
        calibrate(monkeypatch, tmp_path, settings(), works_from=4)


def test_questions_that_memory_was_too_small_for_are_counted(monkeypatch, tmp_path):
    chosen = {str(i) for i in range(6)}
    _, others, _ = calibrate(monkeypatch, tmp_path, settings())
    lost = min(chosen - {question.id for question in others})
    layer, _, failed = calibrate(monkeypatch, tmp_path, settings(), failing=[lost])
    assert (layer, failed) == (2, 1)


# ---- the program ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    """(what it printed, its result, its folder)."""
    out = tmp_path_factory.mktemp("information")
    printed, result = run(information.main, *FLAGS, "--json", out=out)
    return printed, result, out


def maps_of(out):
    maps = dict(np.load(out / "information.npz"))
    assert maps.pop("layers").tolist() == LAYERS
    return maps


def drawn(benchmark):
    return runs.sample(load_benchmark(benchmark, TINY), 1, 0)


def test_maps_of_every_question_are_stored_and_averaged_in_the_table(measured):
    printed, result, out = measured
    maps = maps_of(out)
    asked = {f"{name}/{question.id}" for name in BENCHMARKS for question in drawn(name)}
    assert maps.keys() == asked
    assert all(values.shape == (3, 4, 4) for values in maps.values())
    for benchmark in BENCHMARKS:
        rows = result["benchmarks"][benchmark]["information"]
        assert [row["layer"] for row in rows] == LAYERS
        values = np.array([maps[f"{benchmark}/{q.id}"].reshape(3, -1) for q in drawn(benchmark)])
        means = values.mean((0, 2))
        assert [row["mean"] for row in rows] == pytest.approx(means, abs=1e-6)
        spreads = values.std(2).mean(0)
        assert [row["spread"] for row in rows] == pytest.approx(spreads, abs=1e-6)
        mean = re.escape(f"{means[1]:+.4f}")
        assert re.search(rf"^\| 12 \| .* \| {mean} \| ", printed, re.M)
    assert Image.open(out / "information.png").size[0] > 1000
    assert f"maps in {out / 'information.npz'}, picture in {out / 'information.png'}" in printed


def test_both_horizons_are_read_off_the_records(measured):
    printed, result, out = measured
    for benchmark in BENCHMARKS:
        asked = [record for record in read_records(out / "answers.jsonl")
                 if record["benchmark"] == benchmark]
        horizons = result["benchmarks"][benchmark]["horizons"]
        scores = {key: np.mean([record["scores"][key] for record in asked])
                  for key in asked[0]["scores"]}
        full = scores.pop("unpruned")
        curve = [scores[str(layer)] for layer in range(24)]
        assert horizons["score"]["layer"] == information.horizon(curve, full)
        assert horizons["score"]["scores"] == pytest.approx([100 * value for value in curve])
        divergence = np.mean([record["divergence"] for record in asked], 0)
        layer = information.divergence_horizon(divergence)
        assert horizons["divergence"]["layer"] == layer
        assert horizons["divergence"]["nats"] == pytest.approx(divergence.tolist())
        assert f"{benchmark}: without gold answers, horizon at layer {layer} [" in printed
    assert re.search(r"^textvqa's horizon lies [+-]\d+ \[.*\] layers from mme's$", printed, re.M)


def test_the_result_is_the_last_line_with_json_and_has_no_draws_in_it(measured):
    printed, result, out = measured
    *_, path, last = printed.splitlines()
    assert path == f"result: {out / 'result.json'}" and json.loads(last) == result
    assert "draws" not in last and result["failed"] == 0
    for found in result["benchmarks"].values():
        assert found["gflops"][1] > 4 * found["gflops"][0]      # of three layers; more of all
        assert found["right"] <= found["asked"] and found["noise"] < 1e-5


def test_only_questions_with_a_gold_answer_can_be_right(run, tmp_path):
    image = next(iter(load_benchmark("mme", information.runs.ROOT / "tiny"))).image
    questions = [{"id": "1", "image": str(image), "question": "Is it day?", "answers": ["maybe"],
                  "metric": "exact"},
                 {"id": "2", "image": str(image), "question": "What is it?"}]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    printed, result = run(information.main, "--bench", file, "--answers", "own", "--layer", 20,
                          "--window", 8, out=tmp_path / "out")
    assert result["benchmarks"]["mine.jsonl"]["right"] == 0
    assert "gives the gold answer to 0 of 1 questions" in printed


def test_the_picture_shows_an_image_whose_answers_begin_with_different_letters():
    """The information of a first token is that of every word with this letter."""
    def about(image, answer):
        return Question("", image, "?", [answer] if answer else [], "exact")
    same = [about("a", "vex"), about("a", "Vat"), about("b", "sun")]
    different = [about("c", "dva"), about("c", "hsn")]
    assert information.question_to_show(same + different) == 3
    assert information.question_to_show(same) == 0
    assert information.question_to_show([about("a", ""), about("a", "")]) == 0


def test_an_interrupted_run_measures_the_other_questions_alone(run, measured, tmp_path,
                                                               monkeypatch):
    """Stopped at the third question: the two before are stored, and not measured again."""
    _, want, folder = measured
    original = information.answers_without_image
    calls = []

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(information, "answers_without_image", stops)
    with pytest.raises(KeyboardInterrupt):
        information.main([*FLAGS, "--out", str(tmp_path)])
    assert len(read_records(tmp_path / "answers.jsonl")) == 2
    _, result = run(information.main, *FLAGS, out=tmp_path)
    asked = sum(len(drawn(benchmark)) for benchmark in BENCHMARKS)
    assert len(calls) == 3 + asked - 2
    assert result["benchmarks"] == want["benchmarks"]
    again = maps_of(tmp_path)
    assert all(np.array_equal(values, again[key]) for key, values in maps_of(folder).items())


def test_of_several_processes_the_first_alone_writes_what_all_have_measured(
        measured, tmp_path, monkeypatch, capsys):
    """As a second process, when every question is answered. test_runs.py has torchrun."""
    _, _, folder = measured
    for name in ("settings.json", "answers.jsonl"):
        shutil.copy(folder / name, tmp_path)
    for module in (information, records, runs):
        monkeypatch.setattr(module, "RANK", 1)
    assert information.main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert "result:" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "answers.jsonl"}


def test_arrays_survive_as_json():
    values = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    stored = json.loads(json.dumps(information.to_json(values)))
    assert np.array_equal(information.from_json(stored), values)


# ---- eval.py --layer horizon ---------------------------------------------------------------------

def test_layer_horizon_is_measured_on_questions_drawn_by_seed_and_scores_others(run, tmp_path):
    """A bug once: questions drawn by seed 0, whatever --seed said. Both rules, on one benchmark."""
    flags = ["--layer", "horizon", "--ratio", 1, "--method", "random", "--limit", 2, "--bench",
             "mme", "--calibrate", 4, "--seed", 3, "--threshold", 0.0002]
    known = load_benchmark("mme", TINY)
    drawn = {question.id for question in runs.sample(known, 4, 3)}
    assert drawn != {question.id for question in runs.sample(known, 4, 0)}
    image_of = {question.id: question.image for question in known}
    layers = {}
    for rule in ("divergence", "score"):
        out = tmp_path / rule
        printed, result = run(evaluation.main, *flags, "--rule", rule, out=out)
        layers[rule] = result["horizon"]["mme"]
        assert f"mme: horizon at layer {layers[rule]}, measured on 4 questions; 396 others" in (
            printed)
        assert result["benchmarks"]["mme"][-1]["layer"] == layers[rule]
        calibration = read_records(out / "calibration" / "answers.jsonl")
        assert {record["id"] for record in calibration} == drawn
        images = {image_of[record["id"]] for record in calibration}
        assert not images & {image_of[record["id"]] for record in read_records(
            out / "answers.jsonl")}
    divergence = np.mean([record["divergence"] for record in calibration], 0)
    assert layers["divergence"] == information.divergence_horizon(divergence, 0.0002)
    scores = [[record["scores"][key] for key in ("unpruned", *map(str, range(24)))]
              for record in calibration]
    full, *curve = np.mean(scores, 0)
    assert layers["score"] == information.horizon(curve, full, 0.01)
    assert layers["score"] != layers["divergence"]


def test_horizon_in_a_schedule_stands_for_the_measured_layer():
    args = evaluation.parse_arguments(["--schedule", "divprune@0=9 random@horizon=0"])
    assert evaluation.asks_for_horizon(args)
    cells = evaluation.parse_cells(args, 24, horizon_layer=17)
    assert cells[2].name == "divprune@0=9 random@17=0"
    args = evaluation.parse_arguments(["--budget", "1/3"])
    assert evaluation.asks_for_horizon(args)
    assert evaluation.parse_cells(args, 24, 17, N=64)[-1].schedule[-1] == (17, "random", 1.0)
