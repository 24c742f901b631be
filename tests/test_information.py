"""Token information equals the naive loop, a forward pass a window; the horizon's rules."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import ONE_OF_EACH, load
from samples import QUESTIONS, images

import information
import tokprune
from information import token_information
from support.made_up import decoder_of
from tokprune import InputError, attention, keep

IMAGE = images()["whole"]
ARGS = SimpleNamespace(window=2, max_batch_tokens=2 ** 15, answers="gold", max_new_tokens=4,
                       repetition_penalty=1.0)


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def start(model):
    return model.begin(IMAGE, QUESTIONS[1])


@pytest.fixture(scope="module")
def answer(model, start):
    """Two letters that the unpruned model likes, so that there is something to lose."""
    text = ""
    for _ in range(2):
        prompt = information.with_answer(model, start, model.answer_ids(text) if text else [])
        logits = model.logits(model.run(prompt))[0]
        text = max((text + letter for letter in "abcdefghijklmnopqrstuvwxyz"),
                   key=lambda word: logits[model.answer_ids(word)[-1]])
    return text


def naive(model, start, layer, tokens, ids):
    """P(y_t) of each token and of the answer's end: everything before it a prompt, through plain
    removal at `layer`."""
    values = []
    for t in range(len(ids) + 1):
        stream = information.with_answer(model, start, ids[:t])
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


def calls_of_layers(model, work):
    """Of every call of a layer: variants, rows, and rows in the cache."""
    calls = []

    def seen(module, args):
        past = args[2] if len(args) > 2 else None
        calls.append((*args[0].shape[:2], 0 if past is None else past.keys.shape[2]))
    hooks = [layer.register_forward_pre_hook(seen) for layer in decoder_of(model).layers]
    work()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("mode", information.MODES)
def test_information_costs_the_flops_it_says(model, start, mode):
    first, N = start.visual
    config = model.config.text
    layers = list(range(model.num_layers))
    after = start.x.shape[1] - first - N
    for window in (2, 3):
        calls = calls_of_layers(
            model, lambda: token_information(model, start, "Y", layers, window, mode))
        cost = sum(B * tokprune.flops(config, [T], past) for B, T, past in calls)
        ours, _ = information.information_flops(config, (first, after), start.grid, layers, window,
                                                mode)
        assert cost == ours


@pytest.mark.parametrize("bound", [1, 600])
def test_no_batch_of_windows_is_larger_than_asked(model, start, bound):
    for mode in information.MODES:
        calls = calls_of_layers(model, lambda: token_information(
            model, start, "Y", [0, 1, 2], 2, mode, "first", bound))
        assert all(B == 1 or B * (T + past) <= bound for B, T, past in calls)
        assert any(B > 1 for B, _, _ in calls) == (bound > 1)


def test_batches_hold_every_pair_once_and_no_more_than_the_room():
    assert information.batches(2, 3, 4) == [(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 4))]
    for layers, windows, room in ((5, 7, 3), (1, 9, 4), (3, 2, 100)):
        seen = np.zeros((layers, windows), int)
        for batch in information.batches(layers, windows, room):
            assert seen[batch].size <= room
            seen[batch] += 1
        assert (seen == 1).all()


def test_a_variant_joins_the_batch_at_its_layer(model, start):
    """Streams at layers 0 and 2, two windows each: by layer, then by window."""
    streams = information.inputs_of_layers(model, start, [2, 0])
    full = model.run(streams[-1])
    kept = torch.tensor([[0, 1], [4, 6]])
    ends = information.run_together(model, streams, full, 0, kept)
    for row, (stream, tokens) in enumerate((s, t) for s in streams for t in kept):
        want = model.run(keep(stream, tokens))
        torch.testing.assert_close(ends.x[row, -1], want.x[0, -1], rtol=0, atol=1e-4)


def test_information_is_20_times_cheaper_than_the_official_procedure_on_llava_7b():
    """All layers, 2x2 windows of 24x24 tokens; a prompt of 35 rows before the image, 30 after."""
    shape = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                            num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    ours, official = information.information_flops(shape, (35, 30), (24, 24), range(1, 32))
    assert official > 20 * ours


def test_groups_of_windows_by_hand():
    """3 x 4 tokens in windows of 2 x 2, the lower ones one row high: two groups in either mode.
    Leave-one-out does not compute again the strips of windows above the removed one."""
    wide, narrow = information.groups_of_windows((3, 4), 2, "keep-one")
    assert (wide.windows, wide.prefix) == ([0, 1], 0)
    assert wide.kept.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert (narrow.windows, narrow.prefix) == ([2, 3], 0)
    assert narrow.kept.tolist() == [[8, 9], [10, 11]]
    upper, lower = information.groups_of_windows((3, 4), 2, "leave-one-out")
    assert (upper.windows, upper.prefix) == ([0, 1], 0)
    assert upper.kept.tolist() == [[2, 3, 6, 7, 8, 9, 10, 11], [0, 1, 4, 5, 8, 9, 10, 11]]
    assert (lower.windows, lower.prefix) == ([2, 3], 8)
    assert lower.kept.tolist() == [[2, 3], [0, 1]]


def test_tokens_of_a_window_share_its_information():
    windows = torch.tensor([[1., 2.], [3., 4.]])
    tokens = information.per_token(windows, (3, 4), 2).view(3, 4).tolist()
    assert tokens == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]


def test_an_answer_without_a_token_and_tokens_without_a_grid_are_refused(model, start):
    with pytest.raises(InputError, match="the answer '' has no token"):
        token_information(model, start, "", [1])
    with pytest.raises(AssertionError, match="the stream is at layer 1, want 0"):
        token_information(model, model.run(start, stop=1), "Y", [1])
    ragged = tokprune.replace(start, N=start.N + 2)
    with pytest.raises(InputError, match=f"the {start.N + 2} visual tokens"):
        token_information(model, ragged, "Y", [1])


# ---- what methods need beforehand ----------------------------------------------------------------

def test_hindsight_is_the_attention_of_the_rows_that_write_the_answer(model, start, monkeypatch):
    """Recomputed in one teacher-forced pass over prompt and answer."""
    monkeypatch.setattr(model, "eos", set())            # or a random model says nothing
    seen = information.attention_of_answer(model, start, None, [1, 2], ARGS)
    ids = model.answer_ids(information.own_answer(model, start, ARGS))
    prompt = information.with_answer(model, start, ids[:-1])
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
        torch.testing.assert_close(seen[layer], want, rtol=0, atol=1e-5)


def test_oracles_are_given_what_they_are_said_to_need(model, start):
    question = SimpleNamespace(gold_normalized="Y", gold_written="ab")
    windows = information.information_of_windows(model, start, question, [1], ARGS)[1]
    maps = information.token_information(model, start, "Y", [1], 2)
    assert windows.equal(information.per_token(maps[0], start.grid, 2))
    tokens = information.information_of_tokens(model, start, question, [1], ARGS)[1]
    each = information.token_information(model, start, "ab", [1], 1, target="each")
    assert tokens.equal(each[0].flatten(0, 1)) and tokens.shape[0] == start.N


def test_the_models_own_answer_is_measured_if_it_gives_one(model, start, monkeypatch):
    question = SimpleNamespace(id="7", gold=["YES"], gold_normalized="YES", gold_written="YES!")
    unknown = SimpleNamespace(id="8", gold=[])

    def measured(question, target, **changes):
        args = SimpleNamespace(**vars(ARGS) | changes)
        return information.answer_to_measure(model, start, question, target, args)
    monkeypatch.setattr(model, "eos", set())
    said = model.decode(model.run(start), 4)[0]
    assert said not in ("", "YES", "YES!")
    assert measured(question, "first") == "YES" and measured(question, "answer") == "YES!"
    assert measured(question, "first", answers="own") == said
    assert measured(unknown, "answer", answers="own") == said
    assert measured(question, "first", answers="own", max_new_tokens=0) == "YES"
    with pytest.raises(InputError, match="question 8: the model's own answer is empty"):
        measured(unknown, "first", answers="own", max_new_tokens=0)


# ---- the horizon ---------------------------------------------------------------------------------

@pytest.mark.parametrize("curve, full, tolerance, want", [
    ([0, 50, 99, 100], 100, 0.01, 2), ([0, 50, 98.9, 100], 100, 0.01, 3),
    ([100, 100], 100, 0.01, 0), ([99, 0, 100, 100], 100, 0.01, 2), ([0, 10], 100, 0.01, 2),
    ([0, 50, 100], 100, 0.6, 1)])
def test_horizon_is_the_first_layer_from_which_dropping_all_is_free(curve, full, tolerance, want):
    assert information.horizon(curve, full, tolerance) == want


@pytest.mark.parametrize("curve, want", [([5, 1, 0.009, 0.001], 2), ([5, 0.001, 1, 0.001], 3),
                                         ([5, 1, 1, 1], 4), ([1, 8, 0.009, 0.001], 3),
                                         ([1, 0.003], 2),
                                         ([0, 0, 0], 0)])
def test_divergence_horizon_stays_under_a_share_of_layer_0(curve, want):
    assert information.divergence_horizon(curve, 0.002) == want


def test_answers_and_divergence_without_image_equal_a_plain_loop(model, start):
    nothing = torch.zeros(0, dtype=torch.long)
    answers = information.answers_without_image(model, start, 4)
    nats = information.divergence_without_image(model, start, "ab")
    ids = model.answer_ids("ab")
    prompt = information.with_answer(model, start, ids[:-1])
    assert answers["unpruned"] == model.decode(model.run(start), 4)[0]
    full = model.run(prompt)
    for layer in range(model.num_layers):
        dropped = model.run(keep(model.run(start, stop=layer), nothing))
        assert answers[str(layer)] == model.decode(dropped, 4)[0]
        forced = model.run(keep(model.run(prompt, stop=layer), nothing))
        want = 0.0
        for row in range(-len(ids), 0):
            p = model.logits(full, row).softmax(-1)
            q = model.logits(forced, row).softmax(-1)
            want += (p * (p.log() - q.log())).sum().item()
        assert nats[layer] == pytest.approx(want, abs=1e-4)
    assert information.divergence_without_image(model, start, "") == [0.0] * model.num_layers


def test_noise_is_measured_of_what_is_reported(model, start, monkeypatch):
    """The same windows of the same target, one by one and together."""
    asked = []

    def measure(model, stream, answer, layers, window, mode, target, bound):
        asked.append((layers, window, mode, target, bound))
        return torch.tensor([1.0 / bound, 0.5])
    monkeypatch.setattr(information, "token_information", measure)
    args = SimpleNamespace(window=2, mode="leave-one-out", target="answer", max_batch_tokens=4)
    assert information.noise_of_batches(model, start, "ab", 3, args) == 0.75
    assert asked == [([3], 2, "leave-one-out", "answer", bound) for bound in (4, 1)]


def test_a_map_survives_being_written_as_json():
    values = np.random.default_rng(0).random((2, 3, 4), np.float32)
    assert (information.from_json(information.to_json(values)) == values).all()
