"""information.py as a program: maps, horizons, records; resumed, and without gold answers."""
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from official import lines

import information
from support import flags, run as support_run
from support.benchmarks import Question, load_benchmark
from support.run import ROOT, read_records

ARGV = ["--layer", "1,12,23", "--bench", "mme", "--limit", "1"]         # two questions
LAYERS = [1, 12, 23]


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    """(what it printed, its result, its folder)."""
    out = tmp_path_factory.mktemp("information")
    printed, result = run(information.main, *ARGV, out=out)
    return printed, result, out


def maps_of(out):
    maps = dict(np.load(out / "information.npz"))
    assert maps.pop("layers").tolist() == LAYERS
    return maps


def test_maps_of_every_question_are_stored_and_averaged_in_the_table(measured):
    printed, result, out = measured
    maps = maps_of(out)
    asked = flags.sample(load_benchmark("mme", ROOT / "tiny"), 1, 0)
    assert maps.keys() == {f"mme/{question.id}" for question in asked}
    values = np.array(list(maps.values()))
    assert values.shape == (2, 3, 4, 4)                 # questions, layers, windows
    rows = result["benchmarks"]["mme"]["information"]
    assert [row["layer"] for row in rows] == LAYERS
    means = values.mean((0, 2, 3))
    assert [row["mean"] for row in rows] == pytest.approx(means, abs=1e-6)
    spreads = values.std((2, 3)).mean(0)
    assert [row["spread"] for row in rows] == pytest.approx(spreads, abs=1e-6)
    mean = re.escape(f"{means[1]:+.4f}")
    assert re.search(rf"^\| 12 \| .* \| {mean} \| ", printed, re.M)
    assert "<svg" in (out / "information.svg").read_text("utf-8")
    assert f"maps in {out / 'information.npz'}, picture in {out / 'information.svg'}" in printed


def test_both_horizons_are_read_off_the_records(measured):
    """Of one image there is a layer, no interval, no distance of two, and a line that says so."""
    printed, result, out = measured
    asked = list(read_records(out, "mme").values())
    horizons = result["benchmarks"]["mme"]["horizons"]
    scores = {key: np.mean([record["scores"][key] for record in asked])
              for key in asked[0]["scores"]}
    full = scores.pop("unpruned")
    curve = [scores[str(layer)] for layer in range(24)]
    assert horizons["score"]["layer"] == information.horizon(curve, full)
    assert horizons["score"]["scores"] == pytest.approx([100 * value for value in curve])
    without_end = [[sum(of_layer[:-1]) for of_layer in record["divergence"]] for record in asked]
    divergence = np.mean(without_end, 0)
    layer = information.divergence_horizon(divergence)
    assert horizons["divergence"]["layer"] == layer
    assert horizons["divergence"]["nats"] == pytest.approx(divergence.tolist())
    assert horizons["score"]["low"] is horizons["divergence"]["high"] is None
    assert f"mme: without gold answers, horizon at layer {layer}: " in printed
    assert "mme: 1 image: no intervals" in printed
    assert "draws" not in (out / "result.json").read_text()
    assert "horizon lies" not in printed


def test_of_ten_images_both_horizons_have_intervals():
    """One image is lost at layer 2, where one diverges: draws without it put the horizon there."""
    questions = [Question(str(i), Path(f"{i}.jpg"), "?", [], "") for i in range(10)]
    records = [{"scores": {"unpruned": 1, "0": 0, "1": 0, "2": float(i > 0), "3": 1},
                "divergence": [[6.0, 4.0, 9.0], [5.0, 0.0, 9.0], [0.0, 9.0 * (i == 0), 9.0],
                               [0.0, 0.0, 9.0]]}
               for i in range(10)]
    found = information.horizons_of(questions, records, tolerance=0.05, threshold=0.05)
    for rule in ("score", "divergence"):
        assert (found[rule]["layer"], found[rule]["low"], found[rule]["high"]) == (3, 2, 3), rule
        share = np.mean(np.array(found[rule]["draws"]) == 2)
        assert share == pytest.approx(0.9 ** 10, abs=0.05)      # 2,000 draws: 0.01 is common
    assert (found["score"]["half"], found["divergence"]["half"]) == (2, 1)
    assert found["score"]["unpruned"] == 100 and found["score"]["scores"] == [0, 0, 90, 100]


def test_each_token_its_end_and_each_group_have_horizons():
    """Answers of one token and of three: the first is settled at layer 1, the last of three at
    layer 3. Dropping everything at layer 1 changes the answers of group a alone."""
    questions = [Question(str(i), Path(f"{i}.jpg"), "?", [], "", group="ab"[i % 2])
                 for i in range(20)]
    short = [[6.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    long = [[6.0, 6.0, 6.0, 0.0], [0.0, 6.0, 6.0, 0.0], [0.0, 0.0, 6.0, 0.0], [0.0] * 4]
    records = []
    for i in range(20):
        divergence = long if i % 4 else short
        records.append({"scores": {"unpruned": 1, "0": 0, "1": float(i % 2), "2": 1, "3": 1},
                        "divergence": divergence,
                        "same": [[nats < 2 for nats in of_layer] for of_layer in divergence]})
    parts = information.horizons_of_parts(questions, records, 0.01, 0.01)
    found = {name: (part["score"]["layer"], part["divergence"]["layer"], part["questions"])
             for name, part in parts.items()}
    assert found == {"a": (2, 3, 10), "b": (1, 3, 10), "token 1": (1, 1, 20),
                     "token 2": (2, 2, 15), "token 3": (3, 3, 15), "last token": (3, 3, 20),
                     "the answer's end": (0, 2, 20)}
    assert (parts["a"]["score"]["low"], parts["token 3"]["divergence"]["low"]) == (2, 3)
    few = information.horizons_of_parts(questions[:19], records[:19], 0.01, 0.01)
    assert "a" in few and "b" not in few


def test_only_questions_with_a_gold_answer_can_be_right(run, tmp_path):
    """Of the other the unpruned answer scores 1."""
    image = load_benchmark("mme", ROOT / "tiny")[0].image
    file = tmp_path / "mine.jsonl"
    file.write_text(lines(
        {"id": "1", "image": str(image), "question": "Is it day?", "answers": ["maybe"],
         "metric": "exact"},
        {"id": "2", "image": str(image), "question": "What is it?"}))
    printed, result = run(information.main, "--bench", file, "--answers", "own", "--layer", 20,
                          "--window", 8, out=tmp_path / "out")
    found = result["benchmarks"]["mine.jsonl"]
    assert found["right"] == 0 and found["horizon"]["unpruned"] == 50
    assert "gives the gold answer to 0 of 1 questions" in printed


def test_first_tokens_that_are_spaces_are_counted_of_the_answers_that_are_measured():
    """In LLaMA's vocabulary a number begins with one. An empty answer has no first token."""
    ids_of = {"7": [0, 7], "cat": [1], "": []}
    tokenizer = SimpleNamespace(decode=lambda ids: " " if ids == [0] else "cat")
    model = SimpleNamespace(tokenizer=tokenizer, answer_ids=ids_of.get)
    questions = [Question("1", Path(), "?", [gold], "exact") for gold in ("7", "cat", "7")]
    records = [{"answers": {"unpruned": own}} for own in ("7", "cat", "cat")]
    assert information.count_spaces(model, questions, records, "gold") == 2
    assert information.count_spaces(model, questions, records, "own") == 1
    questions[0].gold = []
    records[0]["answers"]["unpruned"] = ""
    assert information.count_spaces(model, questions, records, "own") == 0


def test_an_interrupted_run_measures_only_the_other_questions(run, measured, tmp_path,
                                                              monkeypatch):
    """Stopped at the second question: the one before is stored, and not measured again."""
    _, want, folder = measured
    original = information.answers_without_image
    calls = []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(information, "answers_without_image", stops)
    argv = [*ARGV, "--batch", "1"]
    with pytest.raises(KeyboardInterrupt):
        information.main([*argv, "--out", str(tmp_path)])
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    _, result = run(information.main, *argv, out=tmp_path)
    assert len(calls) == 3              # two questions, and the second one again
    assert result["benchmarks"] == want["benchmarks"]
    again = maps_of(tmp_path)
    assert all(np.array_equal(values, again[key]) for key, values in maps_of(folder).items())


def test_a_process_that_is_not_the_first_writes_no_result(measured, tmp_path, monkeypatch, capsys):
    """As a second process, when every question is answered. test_runs.py has torchrun."""
    _, _, folder = measured
    for name in ("settings.json", "answers.jsonl"):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.setattr(information, "RANK", 1)
    monkeypatch.setattr(support_run, "RANK", 1)

    def gather(value):                                  # the first one has the same settings only
        return [value if "code" in (value or ()) else type(value)(), value]
    monkeypatch.setattr(support_run, "gather", gather)
    information.main([*ARGV, "--out", str(tmp_path)])
    assert "result:" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "answers.jsonl"}
