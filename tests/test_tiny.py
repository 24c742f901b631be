"""The built-in benchmarks are what tiny/make.py makes, and its training computes what it should."""
import json
import random
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import ONE_OF_EACH, load
from samples import QUESTIONS, images

import tokprune
from information import token_information
from support import checkpoint
from support.benchmarks import load_benchmark
from tiny import agreement, make, promise, training
from tiny.batches import CHATML, VICUNA, Batches
from tiny.scenes import draw_scene

TINY = Path(__file__).parents[1] / "tiny"


# ---- benchmarks ----------------------------------------------------------------------------------

def test_builtin_benchmarks_have_the_official_layout_and_size():
    mme = load_benchmark("mme", TINY)
    text = load_benchmark("textvqa", TINY)
    for subtask in ("existence", "count", "position", "color", "OCR"):
        pairs = [question for question in mme if question.group == subtask]
        assert len({question.image for question in pairs}) == 40 and len(pairs) == 80
        assert sum(question.gold == ["Yes"] for question in pairs) == 40
    assert len(text) == 235
    assert all(3 <= len(question.gold_normalized) <= 6 for question in text)
    assert all(len(question.gold) == 10 for question in text)


def test_builtin_benchmarks_are_byte_for_byte_what_make_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make.py", "--data"])
    make.main()
    for benchmark in ("mme", "textvqa"):
        made, want = ({file.relative_to(folder): file.read_bytes()
                       for file in (folder / benchmark).rglob("*") if file.is_file()}
                      for folder in (tmp_path, TINY))
        assert made == want


def test_no_test_image_can_be_a_training_image():
    """Every image holds a word, and a word is for one of the two by its checksum."""
    for test in (True, False):
        rng = random.Random(test)
        words = []
        for _ in range(50):
            words += [word.text for word in draw_scene(rng, test).words]
        assert len(words) >= 50
        assert {zlib.crc32(word.encode()) % 8 == 0 for word in words} == {test}
    for question in load_benchmark("textvqa", TINY):
        assert zlib.crc32(question.gold_normalized.encode()) % 8 == 0


# ---- training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, stage, chat", [("llava", make.LLAVA_STAGES[-1], VICUNA),
                                               ("qwen", make.QWEN_STAGES[-1], CHATML)])
def test_a_built_in_model_answers_what_it_was_trained_on(name, stage, chat):
    """Prompt, pixels, positions and targets of a batch are those that the models were trained with:
    targets one row off would cost about 8."""
    model = checkpoint.load_model(TINY / name)
    grid, *data = Batches(replace(stage, images=1), chat)[0]
    assert training.answer_loss(model, training.masked_layer, grid.tolist(), *data) < 0.2


def test_training_steps_change_the_weights_and_are_not_taken_again(tmp_path, monkeypatch):
    """Another seed sees other images, and begins a checkpoint of its own."""
    monkeypatch.setattr(training, "WORK", tmp_path)
    monkeypatch.setattr(training.torch.utils.data, "DataLoader",
                        lambda batches, sampler, **_: map(batches.__getitem__, sampler))
    model = make.make_llava(1, VICUNA.tokenizer())
    stage = replace(make.LLAVA_STAGES[-1], name="short", steps=2, images=1)
    seen = []

    def loss(grid, pixels, *rows):
        seen.append(pixels)
        return training.answer_loss(model, training.masked_layer, grid, pixels, *rows)

    def train(seed):
        training.train(model, loss, Batches(stage, VICUNA, seed), torch.device("cpu"))
        return {name: p.clone() for name, p in model.state_dict().items()}
    before = {name: p.clone() for name, p in model.state_dict().items()}
    after = train(seed=0)
    assert not any(p.equal(before[name]) for name, p in after.items())
    again = train(seed=0)
    assert len(seen) == 2 and all(p.equal(after[name]) for name, p in again.items())
    train(seed=1)
    assert len(seen) == 4 and not seen[2].equal(seen[0])
    assert {file.name for file in tmp_path.iterdir()} == {"log.txt", "short.pt", "short-1.pt"}


@pytest.mark.parametrize("name, export", [("llava", make.export_llava), ("qwen", make.export_qwen)])
def test_a_built_in_model_is_exported_as_it_lies_there(name, export, tmp_path):
    """A config's fields in any order."""
    export(checkpoint.load_model(TINY / name), tmp_path)
    there = {file.name: file.read_bytes() for file in (TINY / name).iterdir()}
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made.keys() == there.keys()
    for file in made:
        read = json.loads if file.endswith(".json") else bytes
        assert read(made[file]) == read(there[file])


# ---- agreement -----------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b, want", [
    ([1, 2, 3], [10, 20, 90], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ([1, 1, 2], [5, 5, 9], 1), ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833), ([1, 1], [1, 2], np.nan)])
def test_rank_correlation_worked_by_hand(a, b, want):
    """0.8 = 1 - 6 * 2 / (4 * 15); equal values share the mean of their ranks."""
    got = agreement.rank_correlation(torch.tensor(a), torch.tensor(b))
    assert got == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_scores_are_ranked_against_the_information_of_single_tokens(name, monkeypatch):
    """Each of its own layer: a score that is the exact one agrees wholly, its negative not at all.
    The model's own answer counts only where it is wrong."""
    model = load(name)
    stream = model.begin(images()["whole"], QUESTIONS[1])
    exact = token_information(model, stream, "ab", [1, 2], 1, target="answer").flatten(1)
    monkeypatch.setattr(agreement, "LAYERS", [1, 2])
    monkeypatch.setattr(agreement, "read_image", lambda picture: images()[picture])
    monkeypatch.setattr(agreement, "attention_of_raters", lambda view: 2 * exact[view.layer - 1])
    monkeypatch.setattr(tokprune, "saliency_of", lambda _: -exact[:1])
    found = {}
    for own in ("ab", "No"):
        monkeypatch.setattr(model, "decode", lambda stream: [own])
        question = SimpleNamespace(image="whole", prompt=QUESTIONS[1], gold_normalized="Y",
                                   gold_written="ab", points=lambda answer: answer == "ab")
        found[own] = agreement.correlations(model, question)
    assert found["No"].keys() - found["ab"].keys() == {
        "information of the own answer, where it is wrong"}
    found = found["ab"]
    assert found["attention of SparseVLM's raters"] == pytest.approx([1, 1])
    assert found["saliency of the tower"][0] == pytest.approx(-1)
    assert -1 < found["saliency of the tower"][1] < 1
    first = token_information(model, stream, "Y", [1, 2], 1).flatten(1)
    want = agreement.rank_correlation(first[1], exact[1])
    assert found["information of the first token"][1] == pytest.approx(want)
    each = token_information(model, stream, "ab", [1, 2], 1, target="each").flatten(1, 2)
    for name, part in (("last token", -2), ("answer's end", -1)):
        want = agreement.rank_correlation(each[1, :, part], exact[1])
        assert found[f"information of the {name}"][1] == pytest.approx(want)


def test_agreement_is_averaged_where_there_is_a_correlation(monkeypatch, capsys):
    monkeypatch.setattr(agreement, "LAYERS", [6, 10])
    found = [{"x": [0.5, np.nan]}, {"x": [0.1, np.nan], "y": [0.2, 0.3]}, {"x": [np.nan, np.nan]}]
    agreement.print_table("mme", found, np.arange(3))
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| x | 2 | 0.30 ± 0.20 | - |", "| y | 1 | 0.20 | 0.30 |"]


# ---- the promise of plans ------------------------------------------------------------------------

@pytest.mark.parametrize("changed, is_sample, broken", [
    (10, False, False), (11, False, True), (11, True, False), (15, True, False), (16, True, True),
    (0, True, False)])
def test_a_promise_is_broken_where_more_than_the_loss_change(changed, is_sample, broken):
    """Of 100 questions at a loss of 10 %. Of a sample 16 or more have a probability of 0.040, 15 or
    more one of 0.073."""
    others = np.zeros((100, 2), bool)
    others[:changed, 1] = True
    cost = np.array([0.9, 0.4])
    assert promise.judge(1, others, cost, 0.1, is_sample) == (broken, 0.4)
    assert promise.judge(None, others, cost, 0.1, is_sample) == (False, 1.0)


def test_luck_is_the_cheapest_that_seems_to_keep_the_loss():
    share = np.array([0.0, 0.05, 0.1, 0.2])
    cost = np.array([0.9, 0.5, 0.4, 0.1])
    assert promise.cheapest(share, cost, 0.1) == 2
    assert promise.cheapest(share + 0.3, cost, 0.1) is None
