"""How cheap scores, and the model's own answer, agree with exact information."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import ONE_OF_EACH, load
from samples import QUESTIONS, images

import information
import tokprune
from information import token_information
from support.statistics import agreement_by_layer, rank_correlation

ARGS = SimpleNamespace(window=2, max_batch_tokens=10 ** 6, answers="gold", max_new_tokens=4,
                       repetition_penalty=1.0)


@pytest.mark.parametrize("a, b, want", [
    ([1, 2, 3], [10, 20, 90], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ([1, 1, 2], [5, 5, 9], 1), ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833), ([1, 1], [1, 2], None)])
def test_rank_correlation_worked_by_hand(a, b, want):
    """0.8 = 1 - 6 * 2 / (4 * 15); equal values share the mean of their ranks."""
    assert rank_correlation(np.array(a), np.array(b)) == (want and pytest.approx(want))


def test_agreement_is_averaged_where_there_is_a_correlation():
    questions = [{"x": [0.5, None]}, {"x": [0.1, None]}, {"x": [None, None]}]
    [(mean, error), nothing] = agreement_by_layer(questions, np.arange(3))["x"]
    assert mean == pytest.approx(0.3) and error == pytest.approx(0.2)
    assert nothing == (None, None)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_scores_are_ranked_against_the_information_of_single_tokens(name, monkeypatch):
    """Each of its own layer: one that is the exact one agrees wholly, its negative not at all."""
    model = load(name)
    start = model.begin(images()["whole"], QUESTIONS[1])
    question = SimpleNamespace(gold_normalized="Y", gold_written="ab")
    exact = token_information(model, start, "ab", [1, 2], 1, target="answer").flatten(1)
    monkeypatch.setattr(model, "eos", set())
    monkeypatch.setattr(tokprune, "saliency_of", lambda _: -exact[0])
    monkeypatch.setattr(information, "attention_of_raters",
                        lambda view: 2 * exact[view.layer - 1])
    found = information.agreement_of_scores(model, start, question, [1, 2], ARGS)
    assert found["attention of SparseVLM's raters"] == pytest.approx([1, 1])
    assert found["saliency of the tower"][0] == pytest.approx(-1)
    assert -1 < found["saliency of the tower"][1] < 1
    view = tokprune.view_of(model, model.run(start, stop=2), 0, 0, None)
    first, N = start.visual
    last = view.attention(torch.tensor([len(view.x) - 1]))[:, 0, first:first + N].mean(0)
    alone = token_information(model, start, "Y", [1, 2], 1).flatten(1)
    left_out = token_information(model, start, "ab", [1, 2], 1, "leave-one-out", "answer")
    seen = information.attention_of_answer(model, start, question, [2], ARGS)[2].sum(1)
    norms = view.keys[first:first + N].abs().sum(1)
    for name, score in (("attention of the last prompt row", last),
                        ("norm of keys, as DART", norms),
                        ("attention of the own answer, as hindsight", seen),
                        ("information of the first token", alone[1]),
                        ("leave-one-out information", left_out[1].flatten())):
        want = rank_correlation(score.numpy(), exact[1].numpy())
        assert found[name][1] == pytest.approx(want), name


def test_agreement_is_a_table_and_own_answers_are_compared_with_gold(run, tmp_path, monkeypatch):
    monkeypatch.setattr(information, "own_answer", lambda *_: "No")
    printed, result = run(information.main, "--agreement", "--answers", "own", "--layer", "20,22",
                          "--window", 4, "--limit", 1, "--bench", "mme", out=tmp_path)
    found = result["benchmarks"]["mme"]
    assert all(len(of_layers) == 2 for of_layers in found["agreement"].values())
    assert "| mme, at layer | 20 | 22 |" in printed
    assert len(re.findall(r" ± [\d-]", printed)) == 2 * len(found["agreement"])
    assert len(found["own_and_gold"]) == 1              # of Yes and No
    assert "answer differs from the gold one in 1 of 2 questions" in printed
