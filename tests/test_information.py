"""Token information equals the naive loop, a forward pass a window; the horizon's rules.

Tolerances are of float32: a batch sums in another order than a pass alone.
"""
import json

import numpy as np
import pytest
import torch
from checkpoints import ONE_OF_EACH, decoder_of, load
from samples import QUESTIONS, images

import information
import tokprune
from information import token_information
from support.benchmarks import Question
from tokprune import METHODS, Decoding, InputError, attention, decode, keep, together

IMAGE = images()["whole"]


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def start(model):
    return model.begin(IMAGE, QUESTIONS[1])


def with_ids(model, start, ids):
    return information.with_answer(model, start, torch.tensor([ids], dtype=torch.long))


@pytest.fixture(scope="module")
def answer(model, start):
    """Two letters that the unpruned model likes, so that there is something to lose."""
    text = ""
    for _ in range(2):
        prompt = with_ids(model, start, model.answer_ids(text) if text else [])
        logits = model.logits(model.run(prompt))[0]
        text = max((text + letter for letter in "abcdefghijklmnopqrstuvwxyz"),
                   key=lambda word: logits[model.answer_ids(word)[-1]])
    return text


def naive(model, start, layer, tokens, ids):
    """P(y_t) of each token and of the answer's end: everything before it a prompt, through plain
    removal at `layer`."""
    values = []
    for t in range(len(ids) + 1):
        stream = with_ids(model, start, ids[:t])
        kept = torch.tensor(tokens, dtype=torch.long)
        stream = model.run(keep(model.run(stream, stop=layer), kept))
        probability = model.logits(stream).softmax(-1)[0]
        if t < len(ids):
            values.append(probability[ids[t]])
        else:
            values.append(sum(probability[end] for end in model.eos))
    return torch.stack(values)


@pytest.mark.parametrize("mode", information.MODES)
@pytest.mark.parametrize("window, bound", [(2, 10 ** 6), (3, 150), (3, 1)])
def test_information_equals_the_naive_loop(model, start, answer, window, bound, mode, monkeypatch):
    """Windows at the edge of the grid are smaller for 3; a bound splits the batches. Many ids end
    an answer, for a random model to end it."""
    monkeypatch.setattr(model, "eos", set(range(40, 140)))
    rows, cols = start.grid
    ids = model.answer_ids(answer)
    layers = [2, 0]
    maps = token_information(model, start, answer, layers, window, mode, "each", bound)
    assert maps.shape == (2, -(-rows // window), -(-cols // window), len(ids) + 1)
    whole = token_information(model, start, answer, layers, window, mode, "answer", bound)
    first = token_information(model, start, answer, layers, window, mode, "first", bound)
    torch.testing.assert_close(whole, maps[..., :-1].sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(first, maps[..., 0], rtol=0, atol=1e-6)
    everything = list(range(rows * cols))
    for i, layer in enumerate(layers):
        base = naive(model, start, layer, [] if mode == "keep-one" else everything, ids)
        for r in range(maps.shape[1]):
            for c in range(maps.shape[2]):
                inside = [token for token in everything if token // cols // window == r
                          and token % cols // window == c]
                others = [token for token in everything if token not in inside]
                if mode == "keep-one":
                    want = naive(model, start, layer, inside, ids) - base
                else:
                    want = base - naive(model, start, layer, others, ids)
                torch.testing.assert_close(maps[i, r, c], want, rtol=0, atol=1e-5)


def test_modes_and_targets_differ(model, start, answer):
    """By more than the tolerance above, which could not tell them apart otherwise."""
    maps = [token_information(model, start, answer, [1], 2, mode, target)
            for mode in information.MODES for target in ("first", "answer")]
    assert all((a - b).abs().max() > 3e-5 for i, a in enumerate(maps) for b in maps[:i])


@pytest.mark.parametrize("mode", information.MODES)
@pytest.mark.parametrize("asked, bound", [(1, 1), (600, 600), (9999, 600)])
def test_no_batch_of_windows_is_larger_than_asked_or_than_a_cpu_likes(model, start, asked, bound,
                                                                      mode, monkeypatch):
    monkeypatch.setattr(information, "CPU_ROWS", 600)
    calls = []                      # of a layer: variants, rows, and rows in the cache

    def seen(module, args):
        past = args[2] if len(args) > 2 else None
        calls.append((*args[0].shape[:2], 0 if past is None else past.keys.shape[2]))
    hooks = [layer.register_forward_pre_hook(seen) for layer in decoder_of(model).layers]
    token_information(model, start, "Y", [0, 1, 2], 2, mode, "first", asked)
    for hook in hooks:
        hook.remove()
    assert all(B == 1 or B * (T + past) <= bound for B, T, past in calls)
    assert any(B > 1 for B, _, _ in calls) == (bound > 1)


def test_batches_hold_every_pair_once_and_no_more_than_the_room():
    assert information.batches(3, 2, 4) == [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(0, 2))]
    for layers, windows, room in ((5, 7, 3), (1, 9, 4), (3, 2, 100)):
        seen = np.zeros((layers, windows), int)
        for batch in information.batches(layers, windows, room):
            assert seen[batch].size <= room
            seen[batch] += 1
        assert (seen == 1).all()


def test_leave_one_out_does_not_compute_the_strips_above_the_removed_window_again():
    """3 x 4 tokens in windows of 2 x 2, the lower ones one row high: two groups in either mode."""
    for mode, prefix in (("keep-one", 0), ("leave-one-out", 8)):
        upper, lower = information.groups_of_windows((3, 4), 2, mode)
        assert (upper.windows, upper.prefix) == ([0, 1], 0)
        assert (lower.windows, lower.prefix) == ([2, 3], prefix)


def test_tokens_of_a_window_share_its_information():
    windows = torch.tensor([[1., 2.], [3., 4.]])
    tokens = information.per_token(windows, (3, 4), 2).view(3, 4).tolist()
    assert tokens == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]


@pytest.mark.parametrize("target", information.TARGETS)
def test_the_information_of_an_empty_answer_is_that_of_its_end(model, start, target, monkeypatch):
    """Of ten thousand own answers one is empty: it ended the run."""
    monkeypatch.setattr(model, "eos", {40, 90})
    rows, cols = start.grid
    values = token_information(model, start, "", [1], target=target)
    first_window = [row * cols + col for row in range(2) for col in range(2)]
    want = naive(model, start, 1, first_window, []) - naive(model, start, 1, [], [])
    torch.testing.assert_close(values[0, 0, 0].view(1), want, rtol=0, atol=1e-6)


def test_a_stream_at_another_layer_and_tokens_without_a_grid_are_refused(model, start):
    with pytest.raises(AssertionError, match="the stream is at layer 1, want 0"):
        token_information(model, model.run(start, stop=1), "Y", [1])
    ragged = tokprune.replace(start, N=start.N + 2)
    with pytest.raises(InputError, match=f"the {start.N + 2} visual tokens"):
        token_information(model, ragged, "Y", [1])


# ---- what methods need beforehand ----------------------------------------------------------------

def test_hindsight_is_the_attention_of_the_rows_that_write_the_answer(model, start):
    """Recomputed in one teacher-forced pass over prompt and answer."""
    [seen] = information.attention_of_answer(model, {0: start}, ["abc"], [1, 2])
    ids = model.answer_ids("abc")
    prompt = with_ids(model, start, ids[:-1])
    first, N = start.visual
    T = prompt.x.shape[1]
    rows = torch.arange(T - len(ids), T)
    by_layer = []
    for layer in range(model.num_layers):
        prompt = model.run(prompt, stop=layer + 1)
        probability = attention(prompt.queries[0], prompt.cache[layer].keys[0], rows)
        by_layer.append(probability[:, :, first:first + N].mean(0).T)
    assert len(ids) > 1
    for layer in (1, 2):
        want = torch.stack(by_layer[layer:]).mean(0)
        torch.testing.assert_close(seen[layer - 1], want, rtol=0, atol=1e-5)


def test_methods_are_given_what_they_are_said_to_need(model, start):
    asked = []

    def answers_for(method):
        asked.append(method)
        return [{"windows": "Y", "tokens": "ab"}[method.measure]] * 2
    other = model.begin(IMAGE.rotate(180), QUESTIONS[1])
    layers_of = {"info": {1, 2}, "info-turns": {1}, "divprune": {0}}
    info = information.measure_beforehand(model, {0: together([start, other])}, layers_of,
                                          answers_for, 300)
    assert {layer: set(of_layer) for layer, of_layer in info.items()} == {
        1: {"info", "info-turns"}, 2: {"info"}}
    assert asked == [METHODS["info"], METHODS["info-turns"]]
    maps = token_information(model, start, "Y", [1, 2], 2, max_batch_tokens=300)
    for windows, layer in zip(maps, (1, 2)):
        want = information.per_token(windows, start.grid, 2)
        torch.testing.assert_close(info[layer]["info"][0], want, rtol=0, atol=1e-5)
    for prompt, got in zip((start, other), info[1]["info-turns"], strict=True):
        [each] = token_information(model, prompt, "ab", [1], 1, target="each", max_batch_tokens=300)
        torch.testing.assert_close(got, each.flatten(0, 1), rtol=0, atol=1e-5)


def test_the_models_own_answer_is_measured_if_it_gives_one():
    """Of ten gold answers, the written one where the whole answer is the target."""
    question = Question("7", None, "?", ["1,000"] * 9 + ["1"], "vqa")
    unknown = Question("8", None, "?", [], "")
    measured = information.answer_to_measure
    assert measured(question, "gold", "first", "no") == "1000"
    assert measured(question, "gold", "answer", "no") == "1,000"
    assert measured(question, "own", "first", "no") == "no"
    assert measured(unknown, "own", "first", "no") == "no"
    assert measured(question, "own", "first", "") == "1000"
    assert measured(unknown, "own", "first", "") == ""


# ---- the horizon ---------------------------------------------------------------------------------

@pytest.mark.parametrize("curve, full, tolerance, want", [
    ([0, 50, 99, 100], 100, 0.01, 2), ([0, 50, 98.9, 100], 100, 0.01, 3),
    ([100, 100], 100, 0.01, 0), ([99, 0, 100, 100], 100, 0.01, 2), ([0, 10], 100, 0.01, 2),
    ([0, 50, 100], 100, 0.6, 1)])
def test_horizon_is_the_first_layer_from_which_dropping_all_is_free(curve, full, tolerance, want):
    assert information.horizon(curve, full, tolerance) == want


@pytest.mark.parametrize("curve, want", [
    ([5, 1, 0.009, 0.001], 2), ([5, 0.001, 1, 0.001], 3), ([5, 1, 1, 1], 4),
    ([1, 8, 0.009, 0.001], 3), ([1, 0.003], 2), ([0, 0, 0], 0)])
def test_divergence_horizon_stays_under_a_share_of_layer_0(curve, want):
    assert information.divergence_horizon(curve, 0.002) == want


def test_answers_and_divergence_without_image_equal_a_plain_loop(model, start):
    nothing = torch.zeros(0, dtype=torch.long)
    decoding = Decoding(4, 1.5)
    [answers] = information.answers_without_image(model, start, decoding)
    nats, same = information.tokens_without_image(model, start, "ab")
    ids = model.answer_ids("ab")
    prompt = with_ids(model, start, ids)
    assert answers["unpruned"] == decode(model, model.run(start), *decoding)[0]
    full = model.run(prompt)
    for layer in range(model.num_layers):
        dropped = model.run(keep(model.run(start, stop=layer), nothing))
        assert answers[str(layer)] == decode(model, dropped, *decoding)[0]
        forced = model.run(keep(model.run(prompt, stop=layer), nothing))
        want = []                                       # of each token, and of the end
        for row in range(-len(ids) - 1, 0):
            p = model.logits(full, row).softmax(-1)
            q = model.logits(forced, row).softmax(-1)
            want.append((p * (p.log() - q.log())).sum().item())
            assert same[layer][row] == (p.argmax() == q.argmax())
        assert nats[layer] == pytest.approx(want, abs=1e-4)
    of_empty, _ = information.tokens_without_image(model, start, "")
    of_first, _ = information.tokens_without_image(model, start, "a")
    assert [end for [end] in of_empty] == pytest.approx([first for first, _ in of_first], abs=1e-5)


def test_a_map_survives_being_written_as_json():
    values = np.random.default_rng(0).random((2, 3, 4), np.float32)
    stored = json.loads(json.dumps(information.to_json(values)))
    assert (information.from_json(stored) == values).all()
