"""The built-in models and benchmarks run end to end; runs survive what ends them; bad input is one line."""
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import official_files

import eval as evaluation
from benchmarks import Question, load_benchmark
from eval import main
from tokprune import METHODS, InputError, prefill

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tiny"
BENCHMARKS = ["mme", "textvqa"]                         # those of tiny/


# ---- statistics -------------------------------------------------------------------------------------------------

def test_standard_error_counts_images_not_questions():
    scores, alone, pairs = np.array([0., 0, 1, 1, 1, 1]), np.arange(6), np.array([0, 0, 1, 1, 2, 2])
    assert evaluation.standard_error(scores, alone) == pytest.approx(scores.std(ddof=1) / 6 ** 0.5)
    assert evaluation.standard_error(scores, pairs) == pytest.approx(np.std([0, 1, 1], ddof=1) / 3 ** 0.5)


def test_paired_interval_holds_the_mean_and_is_nothing_for_equal_scores():
    rng = np.random.default_rng(1)
    a, b = rng.random(200), rng.random(200)
    mean, low, high = evaluation.paired_difference(a, b, np.arange(200))
    spread = 1.96 * (a - b).std() / 200 ** 0.5
    assert mean == pytest.approx((a - b).mean()) and high - low == pytest.approx(2 * spread, rel=0.1) and low < mean < high
    assert evaluation.paired_difference(a, a, np.arange(200)) == (0, 0, 0)


# ---- the built-in model and benchmarks --------------------------------------------------------------------------

def test_builtin_benchmarks_have_the_official_layout_and_size():
    mme, text = (load_benchmark(name, TINY) for name in BENCHMARKS)
    for subtask in ("existence", "count", "position", "color", "OCR"):
        pairs = [q for q in mme if q.group == subtask]
        assert len({q.image for q in pairs}) >= 40 and len(pairs) == 2 * len({q.image for q in pairs})
        assert sum(q.answers == ["Yes"] for q in pairs) == len(pairs) / 2
    assert len(text) >= 200 and all(3 <= len(q.gold) <= 6 and len(q.answers) == 10 for q in text)


def test_no_test_image_can_be_a_training_image(monkeypatch):
    """Every image holds a word, and a word is for one of the two by its checksum."""
    monkeypatch.syspath_prepend(TINY)
    import make
    for test in (True, False):
        rng = random.Random(test)
        words = [text for _ in range(100) for text, _, _ in make.draw_scene(rng, test).words]
        assert len(words) >= 100 and {zlib.crc32(word.encode()) % 8 == 0 for word in words} == {test}
    assert all(zlib.crc32(q.gold.encode()) % 8 == 0 for q in load_benchmark("textvqa", TINY))


def run(capsys, *argv):
    main([str(a) for a in argv])
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def unpruned(tmp_path_factory):
    """Both built-in models, side by side, on both benchmarks, with all of the image and with none: {model: (report, lines)}."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    runs = [subprocess.Popen([sys.executable, ROOT / "eval.py", "--model", TINY / name, "--schedule", "random@0=0", "--out", out],
                             stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) for name, out in folders.items()]
    assert [run.wait() for run in runs] == [0, 0]
    return {name: (json.loads((out / "result.json").read_text()), evaluation.read_answers(out / "answers.jsonl"))
            for name, out in folders.items()}


MODELS = {"llava": (90, 92, 85), "qwen": (95, 95, 90)}      # bars in percent: tiny TextVQA, tiny MME, each subtask of it


@pytest.mark.parametrize("name", MODELS)
def test_builtin_model_reaches_its_bars_and_needs_the_image(unpruned, name):
    """Without image: a coin's share of yes and no, and no word read."""
    (text_bar, mme_bar, subtask_bar), (report, done) = MODELS[name], unpruned[name]
    (full, blind, *_), (text, blind_text, *_) = report["benchmarks"]["mme"], report["benchmarks"]["textvqa"]
    assert text["score"] >= text_bar and blind_text["score"] < 2
    assert full["score"] >= mme_bar and blind["score"] < 60
    for subtask in ("existence", "count", "position", "color", "OCR"):
        scores = [line["scores"]["unpruned"] for line in done if line["id"].startswith(f"{subtask}/")]
        assert len(scores) == 80 and 100 * np.mean(scores) >= subtask_bar, subtask


def test_qwen_is_the_stronger_of_the_two_and_sees_images_in_their_own_shape(unpruned):
    for benchmark in BENCHMARKS:
        llava, qwen = (unpruned[name][0]["benchmarks"][benchmark][0] for name in ("llava", "qwen"))
        assert qwen["score"] > llava["score"], benchmark
    tokens = [{line["visual_tokens"]["unpruned"][0][1] for line in unpruned[name][1]} for name in ("llava", "qwen")]
    assert tokens == [{64}, {60, 63, 64, 66, 72}]               # of mme; words are shown on square images


@pytest.mark.parametrize("name", MODELS)
def test_main_command_prints_every_method_and_ends_with_json(capsys, tmp_path, name):
    printed, report = run(capsys, "--model", TINY / name, "--layer", 20, "--ratio", 0.9, "--limit", 6, "--out", tmp_path)
    L = evaluation.load_model(evaluation.parse_arguments(["--model", str(TINY / name)]))[0]
    for benchmark in BENCHMARKS:
        rows = {row["method"]: row for row in report["benchmarks"][benchmark]}
        assert list(rows) == ["unpruned", "no image", *METHODS]
        lines = [line["visual_tokens"] for line in evaluation.read_answers(tmp_path / "answers.jsonl") if line["benchmark"] == benchmark]
        N = np.array([tokens["unpruned"][0][1] for tokens in lines])
        assert all(tokens["dart@20:0.9 seed 0"] == [[0, v], [20, round(0.1 * v)]] for tokens, v in zip(lines, N))
        n = np.array([round(0.1 * v) for v in N])
        for method in METHODS:
            assert rows[method]["kept"] == pytest.approx(n.mean())
            assert rows[method]["mean_visual_tokens"] == pytest.approx(((20 * N + (L - 20) * n) / L).mean())
            assert re.search(rf"^\| {method} \| +{rows[method]['score']:.1f} \|", printed, re.M)
        assert rows["unpruned"]["gflops"] > rows["random"]["gflops"] > rows["no image"]["gflops"]
        assert rows["divprune"]["minus_random"][0] == pytest.approx(rows["divprune"]["score"] - rows["random"]["score"])
    assert "repetition penalty 1;" in printed and report["repetition_penalty"] == 1


def test_repetition_penalty_reaches_the_model(capsys, tmp_path):
    """A heavy one lets no character be said twice."""
    flags = ["--model", TINY / "qwen", "--bench", "textvqa", "--limit", 4, "--method", "random"]
    _, without = run(capsys, *flags, "--out", tmp_path / "1")
    _, heavy = run(capsys, *flags, "--repetition-penalty", 1e6, "--out", tmp_path / "2")
    answers = [[line["answers"]["unpruned"] for line in evaluation.read_answers(tmp_path / n / "answers.jsonl")] for n in "12"]
    assert answers[0] != answers[1] and heavy["repetition_penalty"] == 1e6 and without["min_pixels"] > 0
    assert all(len(set(answer)) == len(answer) for answer in answers[1])            # no character twice


def test_a_run_goes_on_where_it_stood_and_refuses_other_settings(capsys, tmp_path, monkeypatch):
    flags = ["--bench", "textvqa", "--method", "random", "--limit", 5, "--out", tmp_path / "a"]
    _, want = run(capsys, *flags)
    file = tmp_path / "a" / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:40])                     # killed in the middle of the third
    asked = []
    original = evaluation.answer_cells
    monkeypatch.setattr(evaluation, "answer_cells", lambda model, q, *rest: asked.append(q.id) or original(model, q, *rest))
    _, got = run(capsys, *flags)
    untimed = lambda lines: [json.loads(line) | {"ms": 0, "oracle_ms": 0} for line in lines]
    assert untimed(file.read_bytes().splitlines()) == untimed(lines) and len(asked) == len(lines) - 2
    timeless = [[row | {"prefill_ms": 0} for row in report["benchmarks"]["textvqa"]] for report in (want, got)]
    assert timeless[0] == timeless[1]
    with pytest.raises(InputError, match="other settings: positions is 'keep', this run's is 'compact'"):
        main([str(f) for f in flags] + ["--positions", "compact"])
    (tmp_path / "a" / "settings.json").unlink()
    with pytest.raises(InputError, match="settings.json: cannot be read"):
        main([str(f) for f in flags])


def test_another_method_under_the_same_name_is_not_taken_for_the_old_one(tmp_path, monkeypatch):
    """The default folder of a run depends on the code, the checkpoint and the questions."""
    args = evaluation.parse_arguments([])
    before = evaluation.fingerprint(args, {})
    shutil.copy(ROOT / "tokprune.py", tmp_path)                                 # the rest of the code is not there
    monkeypatch.setattr(evaluation, "HERE", tmp_path)
    assert evaluation.fingerprint(args, {})["code"] != before["code"]
    assert evaluation.fingerprint(args, {})["checkpoint"] == before["checkpoint"]


def test_a_sweep_gives_each_cell_what_it_gets_alone(capsys, tmp_path):
    flags = ["--ratio", 0.8, "--limit", 6, "--seeds", 1, "--method", "random,divprune,info"]
    printed, sweep = run(capsys, "--layer", "3,20", *flags, "--out", tmp_path / "sweep", "--plot", tmp_path / "plot.png")
    for layer in (3, 20):
        _, alone = run(capsys, "--layer", layer, *flags, "--out", tmp_path / str(layer))
        for benchmark in BENCHMARKS:
            scores = lambda report: {r["method"]: r["score"] for r in report["benchmarks"][benchmark] if r["layer"] in (layer, None)}
            assert scores(sweep) == {k: v for k, v in scores(alone).items() if k != "no image"}
    assert "| mme, layer | random | divprune | info |" in printed
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


def test_the_one_loop_answers_as_each_schedule_does_on_its_own(tmp_path):
    """Shared prefixes and batches of variants change no answer."""
    args = evaluation.parse_arguments(["--schedule", "divprune@0:0.5 random@12=5", "--schedule", "fastv@6=7"])
    num_layers, _, load = evaluation.load_model(args)
    model, cells = load(), evaluation.parse_cells(args, num_layers)
    assert [cell.key.rpartition(" seed ")[0] or cell.key for cell in cells] == [
        "unpruned", "random@0=0", *["divprune@0:0.5 random@12=5"] * 3, *["random@0:0.5 random@12=5"] * 3, "fastv@6=7", *["random@6=7"] * 3]
    for question in evaluation.draw(load_benchmark("textvqa", TINY), 4, 0):
        image = evaluation.read_image(question.image)
        got = evaluation.answer_cells(model, question, image, cells, args)
        for cell in cells:
            alone = prefill(model, model.begin(image, question.prompt), cell.schedule, cell.seed + question.seed)
            assert got["answers"][cell.key] == model.decode(alone)[0]


def test_removing_nothing_is_not_taken_for_keeping_nothing(capsys, tmp_path):
    """0 and 0.0, 1 and 1.0 are equal keys; a ratio and a count are not."""
    schedules = ["random@0:0", "random@20=1", "random@20:1.0"]
    flags = [flag for schedule in schedules for flag in ("--schedule", schedule)]
    _, report = run(capsys, *flags, "--bench", "mme", "--limit", 2, "--out", tmp_path)
    rows = {row["schedule"]: row for row in report["benchmarks"]["mme"]}
    assert {spec: (row["kept"], row["seeds"]) for spec, row in rows.items()} == {
        "": (64, 1), "random@0=0": (0, 1), "random@0:0.0": (64, 1), "random@20=1": (1, 3), "random@20:1.0": (0, 1)}


def test_one_picture_is_answered_with_and_without_pruning(capsys, tmp_path):
    picture = next(iter(sorted((TINY / "textvqa" / "train_images").glob("*.jpg"))))
    printed, report = run(capsys, "--image", picture, "--question", "How many shapes are in this image?", "--method", "divprune",
                          "--out", tmp_path)
    assert list(report["answers"]) == ["unpruned", "random@0=0 seed 0", "random@20:0.9 seed 0", "divprune@20:0.9 seed 0"]
    assert "64 visual tokens" in printed and " 6 visual tokens" in printed
    overlay = np.asarray(Image.open(tmp_path / "overlay.png").convert("RGB"))
    unpruned, blind = overlay[24:248, 4:228], overlay[24:248, 236:460]
    assert blind.mean() > unpruned.mean() + 5                                  # dimmed towards white


# ---- information and horizon ------------------------------------------------------------------------------------

INFORMATION = ["--information", "--limit", 4, "--layer", "1,12,23"]


def test_information_is_printed_stored_and_drawn_and_an_interrupted_run_goes_on(capsys, tmp_path, monkeypatch):
    printed, want = run(capsys, *INFORMATION, "--out", tmp_path)
    maps = dict(np.load(tmp_path / "information.npz"))
    assert maps.pop("layers").tolist() == [1, 12, 23]
    questions = [q for name in BENCHMARKS for q in evaluation.draw(load_benchmark(name, TINY), 4, 0)]
    assert sorted(key.partition("/")[2] for key in maps) == sorted(q.id for q in questions)
    assert all(found.shape[0] == 3 and found.dtype == np.float32 for found in maps.values())
    for benchmark in BENCHMARKS:
        rows = want["benchmarks"][benchmark]["information"]
        values = [found.reshape(3, -1) for key, found in maps.items() if key.startswith(benchmark)]
        assert [row["std"] for row in rows] == pytest.approx(np.mean([v.std(1) for v in values], 0), rel=1e-5)
        assert re.search(rf"^\| 12 \| .* \| {rows[1]['mean']:.4f} \| {rows[1]['std']:.4f} ± ", printed, re.M)
    assert Image.open(tmp_path / "information.png").size[0] > 1000
    key = sorted(maps)[0]
    np.savez(tmp_path / "information.npz", layers=[1, 12, 23], **{k: v for k, v in maps.items() if k != key})
    calls, original = [], evaluation.token_information
    monkeypatch.setattr(evaluation, "token_information", lambda *a, **k: calls.append(1) or original(*a, **k))
    assert run(capsys, *INFORMATION, "--out", tmp_path)[1] == want and len(calls) == 1
    (tmp_path / "information.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="information.npz: cannot be read"):
        main([str(flag) for flag in [*INFORMATION, "--out", tmp_path]])


def test_what_is_measured_survives_an_interruption(tmp_path, monkeypatch):
    calls, original = [], evaluation.token_information

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)
    monkeypatch.setattr(evaluation, "token_information", stops)
    with pytest.raises(KeyboardInterrupt):
        main([str(flag) for flag in [*INFORMATION, "--out", tmp_path]])
    assert len(np.load(tmp_path / "information.npz").files) == 2 + 1                # and the layers


@pytest.mark.parametrize("values, want", [([1, 1, 1, 1], 0), ([0, 0, 0, -1], 0.75), ([0, 0], 0), ([1, 3], 0.25)])
def test_gini_worked_by_hand(values, want):
    assert evaluation.gini(np.array(values, float)) == pytest.approx(want)


@pytest.mark.parametrize("means, want", [
    ([9, 1, 0.5, 0.001, 0.0], 3), ([9, 1, 0.5, -0.2, 0.0], 4), ([9, 1, 0.5, 0.001, 0.02], None), ([9, -1, 0.5, 0, 0], None)])
def test_information_is_gone_where_it_stays_under_a_hundredth_of_layer_1(means, want):
    assert evaluation.layer_information_is_gone([{"layer": i, "mean": mean} for i, mean in enumerate(means)]) == want


def test_horizon_of_a_benchmark_has_an_interval_over_images():
    """Ten images of two questions; from layer 2 on one image is lost, from layer 3 on none: half of the draws miss that image."""
    cells = evaluation.drop_all(evaluation.parse_arguments([]), 4)
    questions = [Question(f"{i}/{j}", Path(f"{i}"), "", ["x"], "exact") for i in range(10) for j in range(2)]
    right = lambda q, layer: layer is None or layer >= 3 or (layer == 2 and q.image.name != "0")
    done = [{"scores": {cell.key: float(right(q, cell.schedule[0][0] if cell.schedule else None)) for cell in cells}} for q in questions]
    found = evaluation.measure_horizon(questions, done, cells, 0.01)
    assert (found["layer"], found["low"], found["high"], found["unpruned"]) == (3, 2, 3, 100) and found["scores"] == [0, 0, 90, 100]
    assert np.mean(np.array(found["draws"]) == 2) == pytest.approx(0.9 ** 10, abs=0.05)
    assert evaluation.measure_horizon(questions, done, cells, 0.1)["layer"] == 2


def test_layer_from_which_no_method_beats_random_asks_for_a_whole_interval():
    row = lambda method, layer, low: {"method": method, "layer": layer, "minus_random": None if method == "random" else (low + 1, low, low + 2)}
    rows = [row(*x) for x in [("random", 1, 0), ("dart", 1, 1), ("random", 2, 0), ("dart", 2, 0.5), ("random", 3, 0), ("dart", 3, -0.5),
                              ("random", 4, 0), ("dart", 4, -1), ("info", 4, 9)]]
    assert evaluation.layer_no_method_beats_random(rows) == 3
    assert evaluation.layer_no_method_beats_random(rows + [row("dart", 4, 2)]) == 5


def test_an_oracle_beats_or_is_beaten_by_whole_intervals():
    row = lambda method, layer, low: {"method": method, "layer": layer, "minus_oracles": {"info": (low + 1, low, low + 2)}}
    rows = [row("random", 1, -9), row("dart", 1, -3), row("random", 2, -9), row("dart", 2, -1), row("random", 3, -9), row("dart", 3, 0.5),
            row("info-answer", 1, 7)]
    assert evaluation.layers_of_oracle(rows, "info") == ([1], [3])


def test_layer_horizon_prunes_at_the_measured_one_and_scores_other_questions(capsys, tmp_path):
    printed, report = run(capsys, "--layer", "horizon", "--ratio", 1.0, "--method", "random", "--limit", 4, "--calibrate", 6, "--out", tmp_path)
    for benchmark in BENCHMARKS:
        at = report["horizon"][benchmark]
        assert f"{benchmark}: horizon at layer {at}, measured on" in printed
        assert report["benchmarks"][benchmark][-1]["schedule"] == f"random@{at}:1.0"
        images = {q.id: q.image for q in load_benchmark(benchmark, TINY)}
        seen = [{images[line["id"]] for line in evaluation.read_answers(file) if line["benchmark"] == benchmark}
                for file in (tmp_path / "answers.jsonl", tmp_path / "calibration" / "answers.jsonl")]
        assert all(seen) and not seen[0] & seen[1]
    _, other = run(capsys, "--schedule", "divprune@0=9 random@horizon=0", "--bench", "mme", "--limit", 2, "--calibrate", 6, "--out", tmp_path / "b")
    assert other["benchmarks"]["mme"][2]["schedule"] == f"divprune@0=9 random@{report['horizon']['mme']}=0"


def test_one_picture_is_pruned_at_the_horizon_of_the_first_benchmark(capsys, tmp_path):
    picture = next(iter(sorted((TINY / "textvqa" / "train_images").glob("*.jpg"))))
    printed, report = run(capsys, "--image", picture, "--question", "Is there a star?", "--layer", "horizon", "--method", "random",
                          "--bench", "mme", "--calibrate", 10, "--out", tmp_path)
    at = re.search(r"mme: horizon at layer (\d+), measured on 10 questions", printed)[1]
    assert f"random@{at}:0.9 seed 0" in report["answers"]


def test_the_first_of_several_schedules_is_compared_with_the_others(capsys, tmp_path):
    printed, report = run(capsys, "--schedule", "divprune@2=20", "--schedule", "divprune@2=29 random@16=0", "--limit", 6, "--out", tmp_path)
    for benchmark in BENCHMARKS:
        rows = {row["schedule"]: row for row in report["benchmarks"][benchmark]}
        first, second = rows["divprune@2=20"], rows["divprune@2=29 random@16=0"]
        assert first["minus_first"] is None and second["minus_first"][0] == pytest.approx(second["score"] - first["score"])
    assert "- first |" in printed


def test_a_budget_is_spent_alone_with_random_and_with_nothing_past_the_horizon(capsys, tmp_path):
    printed, report = run(capsys, "--budget", "1/3,1/9", "--layer", 17, "--limit", 4, "--out", tmp_path)
    for benchmark in BENCHMARKS:
        rows = {row["schedule"]: row for row in report["benchmarks"][benchmark]}
        assert len(rows) == 2 + 4 * 4 and "- first |" in printed
        for alone, others in (("dart@2:0.7188", ["dart@2:0.625 random@17:0.9375", "dart@2:0.5938 random@17:1.0"]),
                              ("divprune@0:0.875", ["divprune@0:0.8438 random@17:0.9688", "divprune@0:0.8281 random@17:1.0"])):
            assert rows[alone]["minus_first"] is None and rows[alone]["minus_random"]
            for spec in others:
                assert 0.9 * rows[alone]["mean_visual_tokens"] < rows[spec]["mean_visual_tokens"] <= rows[alone]["mean_visual_tokens"]
                assert rows[spec]["minus_first"][0] == pytest.approx(rows[spec]["score"] - rows[alone]["score"])


def test_a_sweep_says_what_the_paper_asks_of_it(capsys):
    """Two layers: at 1 dart is 20 above random and 30 below the oracle, at 2 all are equal."""
    def row(method, layer, score, minus_random=None, **oracles):
        return {"method": method, "layer": layer, "score": score, "minus_random": minus_random, "minus_oracles": oracles}
    same = (0.0, -1.0, 2.0)
    evaluation.print_sweep("mme", [row("unpruned", None, 95), row("no image", 0, 50), row("random", 1, 40), row("random", 2, 90),
                                   row("dart", 1, 60, (20, 10, 30), info=(-30, -40, -20)), row("dart", 2, 90, same, info=same),
                                   row("info", 1, 90), row("info", 2, 90)])
    printed = capsys.readouterr().out
    assert "| mme, layer | random | dart | info |\n|---:|---:|---:|---:|\n| unpruned | 95.0 | 95.0 | 95.0 |\n| no image | 50.0 |" in printed
    assert "| 1 | 40.0 | 60.0 | 90.0 |" in printed and "no method beats random from layer 2 on" in printed
    assert "the most over random is +20.0 [+10.0, +30.0], dart at layer 1" in printed
    assert "from layer 2 on every method is within [-1.0, +2.0] of random" in printed
    assert ("info beats every method at layers 1; some method beats it at none; it leads most at 1, +30.0 [+20.0, +40.0] over the "
            "best there, dart") in printed


# ---- bad input --------------------------------------------------------------------------------------------------

def truncated(tmp_path):
    file = tmp_path / "half.jpg"
    whole = next((TINY / "textvqa" / "train_images").glob("*.jpg")).read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    return file


@pytest.mark.parametrize("argv, message", [
    ("--layer 24", "layer 24 is out of range; this model has layers 0 to 23"), ("--layer -1", "layer -1 is out of range"),
    ("--layer x", "--layer x"), ("--layer 1.5", "--layer 1.5"), ("--ratio 1.1", "--ratio: 1.1, want 0 to 1"),
    ("--ratio nan", "--ratio: nan"), ("--seed 1000000000000", "--seed: 1000000000000"), ("--device meta", "--device meta"),
    ("--schedule ", "--schedule: empty"), ("--layer 3 --schedule random@3=1", "want it or them"),
    ("--image tiny/layers.png --question x --method info", "info needs a gold answer"), ("--plot curve.gif", "--plot curve.gif"),
    ("--plot no/where.png", "--plot no/where.png"), ("--ratio x", "--ratio x"), ("--method magic", "unknown method 'magic'; want one of random, fastv"),
    ("--bench vqa", "unknown benchmark 'vqa'; want one of mme, textvqa, scienceqa, pope or a .jsonl"), ("--device tpu", "--device tpu"),
    ("--device cuda:99", "--device cuda:99"), ("--model nowhere", "--model nowhere: no such folder"), ("--data nowhere", "--data nowhere"),
    ("--model tests", "config.json: cannot be read (No such file or directory)"), ("--schedule dart@2", "does not parse"), ("--schedule fastv@0:0.5", "cannot act at layer 0"),
    ("--schedule random@99=1", "layer 99 is out of range"), ("--method fastv --layer 0", "fastv reads the layer before"),
    ("--limit 0", "--limit: 0, want 1 or more"), ("--seeds 0", "--seeds: 0"), ("--max-new-tokens 0", "--max-new-tokens: 0"),
    ("--image nowhere.png --question x", "nowhere.png"), ("--image README.md --question x", "cannot be read as an image"),
    ("--image TRUNCATED --question x", "half.jpg: cannot be read as an image"), ("--question x", "--image and --question go together"),
    ("--information --ratio 0.5", "--information: takes --layer"), ("--information both", "--information"),
    ("--information --layer 1,99", "layer 99 is out of range"),
    ("--layer horizon --calibrate 5000", "--calibrate: 5000"), ("--tolerance 2", "--tolerance: 2"), ("--window 0", "--window: 0"),
    ("--budget 1/0", "--budget 1/0"), ("--budget 2", "--budget 2: want more than 0"), ("--budget 1/3 --ratio 0.5", "--budget: takes"),
    ("--budget 1/3 --layer 2,3", "--budget: takes"), ("--budget 1/3 --method magic", "unknown method"), ("--budget 1/3 --layer 24", "out of range"),
    ("--budget 1/3 --layer 2", "layer 2: random cannot follow dart, which starts at layer 2"), ("--budget 1/500 --layer 20", "budget 0.002 does not fit"),
    ("--budget 1/2 --method divprune --layer 5", "budget 0.5 does not fit divprune"), ("--bench mme,mme", "two of one name"),
    ("--score x.jsonl --limit 2", "--score: takes --data and --bench alone"), ("--speed --information", "--speed: takes"),
    ("--schedule dart@horizon3:0.5", "does not parse"), ("--plot /proc/x.png --layer 20,21 --limit 2 --method random", "/proc/x.png: cannot be written"),
    ("--max-batch-tokens 0", "--max-batch-tokens: 0"), ("--repetition-penalty 0", "--repetition-penalty: 0"),
    ("--min-pixels 5000", "these are for Qwen2.5-VL"), ("--model tests/golden/qwen_tied --layer 1 --positions compact", "--positions compact"),
    ("--model tests/golden/qwen_tied --layer 1 --min-pixels 5000 --max-pixels 4000", "min_pixels is 5000, max_pixels 4000"),
    ("--workers 0", "--workers: 0"), ("--bench nowhere.jsonl", "nowhere.jsonl: cannot be read"),
    ("--prompt-style other", "--prompt-style"), ("--prompt-style llava", "there is neither TextVQA_Rosetta_OCR"),
    ("--score nowhere.jsonl", "nowhere.jsonl: cannot be read"), ("--out /proc/nowhere", "--out /proc/nowhere: cannot be written"),
    ("--dtype int3", "--dtype"), ("--nonsense", "--nonsense"), ("--out README.md", "--out README.md: cannot be written")])
def test_bad_input_is_one_line_that_names_it(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = argv.replace("TRUNCATED", str(truncated(tmp_path)))
    flags = shlex.split(argv) if argv != "--schedule " else ["--schedule", ""]
    with pytest.raises(InputError, match=re.escape(message)) as e:
        main(flags + ([] if "--out" in argv or "--score" in argv else ["--out", str(tmp_path)]))
    assert "\n" not in str(e.value)


def test_error_leaves_with_code_2_and_no_traceback():
    done = subprocess.run([sys.executable, "eval.py", "--layer", "99"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "eval.py: error: layer 99 is out of range; this model has layers 0 to 23\n"


# ---- README -----------------------------------------------------------------------------------------------------

COMMANDS = re.findall(r"^(python eval\.py [^#\n]*)", (ROOT / "README.md").read_text(), re.M)
assert len(COMMANDS) >= 4, f"README.md shows {len(COMMANDS)} commands, want the sweep, a schedule, a picture and a real checkpoint"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_runs(command, capsys, tmp_path, monkeypatch):
    """On two questions; those on the real checkpoints and benchmarks, which are not here, on built-in and made-up ones."""
    monkeypatch.chdir(tmp_path)
    for name, there in (("tiny", TINY), ("llava-1.5-7b-hf", TINY / "llava"), ("Qwen2.5-VL-7B-Instruct", TINY / "qwen")):
        Path(name).symlink_to(there)
    official_files(Path("benchmarks"))
    Path("answers.jsonl").write_text('{"question_id": "1", "prompt": "What?\\nAnswer the question.", "text": "a"}\n')
    Path("mine.jsonl").write_text('{"id": 5, "image": "tiny/mme/count/0001.jpg", "question": "?", "answers": ["x"], "metric": "exact"}\n')
    flags = shlex.split(command)[2:]
    if "--plot" in flags:
        flags[flags.index("--plot") + 1] = "plot.png"
    if "--calibrate" in flags:
        flags[flags.index("--calibrate") + 1] = "4"
    if "--score" not in flags:
        flags += ["--out", "out", "--seeds", "1"] + ["--limit", "1"] * ("--image" not in flags)
        flags += ["--method", "random,divprune"] if "all" in flags else []
    _, report = run(capsys, *flags)
    assert report["command"].startswith("eval.py")


def test_the_readme_program_runs(capsys, tmp_path, monkeypatch):
    """The one that loads a checkpoint, on the built-in model and a drawing."""
    [program] = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "import" in block]
    monkeypatch.chdir(tmp_path)
    Path("llava-1.5-7b-hf").symlink_to(TINY / "llava")
    Image.new("RGB", (90, 60), "orange").save("cat.jpg")
    exec(program, {})
    assert re.fullmatch(r"\['.+'\]\n", capsys.readouterr().out)
