"""Properties of pruning, for every method at once, on a small random checkpoint of either model, both with grouped queries."""
from dataclasses import replace

import pytest
import torch
from checkpoints import MODULES, decoder, load
from samples import QUESTIONS, images
from torch.utils.flop_counter import FlopCounterMode

import model_llava
import tokprune
from tokprune import METHODS, NEED_A_LAYER, ORACLES, InputError, keep, parse_schedule, prefill, prune, with_room

every_method = pytest.mark.parametrize("method", METHODS)
CHECKPOINTS = ["llava_grouped", "qwen_untied"]          # 4x4 and 4x8 visual tokens
IMAGE = images()["whole"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def start(model):
    return model.begin(IMAGE, QUESTIONS[0])


@pytest.fixture(scope="module")
def info(start):
    g = torch.Generator().manual_seed(0)
    return {oracle: torch.randn(start.visual[1], generator=g) for oracle in ORACLES}


def heads(model):
    """Query heads, key/value heads, width of each."""
    c = model.config.text
    return c.num_attention_heads, c.num_key_value_heads, c.head_dim


@every_method
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 15, "all but one", "all"])
@pytest.mark.parametrize("duplicated", [False, True])
def test_keeps_exactly_n_distinct_visual_tokens_in_order_and_all_text(model, start, info, method, n, duplicated):
    first, V = start.visual
    n = {"all but one": V - 1, "all": V}.get(n, n)
    full = model.run(start, stop=1)
    if duplicated:                                          # every visual token the same: distances and gains all tie
        full = replace(full, x=full.x.clone())
        full.x[:, first:first + V] = full.x[:, first:first + 1]
    pruned = prune(model, full, method, n, info=info)
    assert pruned.visual == (first, n)
    assert pruned.origin.shape == (1, n) and (pruned.origin.diff() > 0).all()
    assert pruned.x[:, :first].equal(full.x[:, :first]) and pruned.x[:, first + n:].equal(full.x[:, first + V:])
    assert pruned.pos[..., first:first + n].equal(full.pos[..., first + pruned.origin[0]]) and pruned.next_pos == full.next_pos
    if method == "sparsevlm" and 0 < n < V:                 # which merges: the rows it returned are the rows that go on
        idx, rows = METHODS[method](tokprune.view_of(model, full, 0, 0, info.get(method)), n)
        assert pruned.x[0, first:first + n].equal(full.x[0, first + idx] if rows is None else rows)
    else:
        assert pruned.x[0, first:first + n].equal(full.x[0, first + pruned.origin[0]])


def test_sparsevlm_merges_where_there_is_room(model, start):
    """Otherwise the test above compares nothing merged."""
    stream = model.run(start, stop=1)
    idx, rows = METHODS["sparsevlm"](tokprune.view_of(model, stream, 0, 0, None), 8)
    assert not torch.equal(rows, stream.x[0, stream.visual[0] + idx])


def test_a_view_shows_the_layer_before_and_the_tokens_that_are_left(checkpoint, model, start, info):
    """Everything in a second-stage View recomputed by hand, for the second of two variants."""
    stream = model.run(prune(model, model.run(start, stop=1), ["random", "divprune"], 7, info=info), stop=2)
    view, b, (first, V) = tokprune.view_of(model, stream, 1, 3, info["info"]), 1, stream.visual
    layer, (H, G, D), rotate = decoder(model).layers[1], heads(model), MODULES[checkpoint].rotate
    before = prune(model, model.run(start, stop=1), "divprune", 7)
    y, rope = layer.input_layernorm(before.x), model.rope(before.pos, torch.float32)
    T = before.x.shape[1]
    q = rotate(layer.self_attn.q_proj(y).view(1, T, H, D).transpose(1, 2), rope)[0]
    k = rotate(layer.self_attn.k_proj(y).view(1, T, G, D).transpose(1, 2), rope)[0]
    scores = (q @ k.repeat_interleave(H // G, 0).transpose(1, 2) / D ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=0, atol=1e-5)     # float32, other batch size
    close(view.keys, k.transpose(0, 1).flatten(1))
    close(view.attention(torch.tensor([3, T - 1])), scores.softmax(-1)[:, [3, T - 1]])
    close(view.x, model.run(before, stop=2).x[0])
    close(view.normed(), decoder(model).norm(view.x))
    assert view.layer == 2 and view.visual == (first, 7) and view.origin.equal(before.origin[0])
    assert view.saliency().equal(start.saliency()[view.origin]) and view.info.equal(info["info"][view.origin])
    assert view.embeds.equal(start.x[0]) and view.embeds_visual == (first, start.visual[1])
    assert view.rng.initial_seed() != tokprune.view_of(model, model.run(start, stop=1), 0, 3, None).rng.initial_seed()


@every_method
def test_sets_are_chosen_in_float32(model, start, info, method):
    """A bfloat16 stream is chosen from as its exact float32 copy is."""
    def cast(stream, dtype):
        kv = [None if kv is None else tuple(t.to(dtype) for t in kv) for kv in stream.cache]
        return replace(stream, x=stream.x.to(dtype), cache=kv, queries=stream.queries.to(dtype),
                       embeds=stream.embeds.to(dtype))

    class Norm:                                             # dart's norm too, on what bfloat16 left of the rows
        final_norm = staticmethod(lambda x: model.final_norm(x.float()))
    low = cast(model.run(start, stop=1), torch.bfloat16)
    for n in (2, 5, 9):
        assert prune(Norm, low, method, n, info=info).origin.equal(prune(Norm, cast(low, torch.float32), method, n, info=info).origin)


@every_method
def test_keeping_all_is_bitwise_the_unpruned_model(model, start, info, method):
    stream = model.run(start, stop=1)
    want, got = model.run(stream), model.run(prune(model, stream, method, start.visual[1], info=info))
    assert got.x.equal(want.x) and all(a.equal(b) for x, y in zip(got.cache, want.cache) for a, b in zip(x, y))


@every_method
def test_same_seed_same_set_and_only_random_depends_on_it(model, start, info, method):
    stream = model.run(start, stop=1)
    sets = [prune(model, stream, method, 5, seed, info).origin[0].tolist() for seed in (1, 1, 2, 3, 4)]
    assert sets[0] == sets[1]
    assert (len({tuple(s) for s in sets}) > 1) == (method == "random")


@every_method
@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_decoding_through_the_ragged_cache_equals_one_teacher_forced_pass(model, start, info, method, layers):
    """Red if a cache, a mask or a decoding position is off after pruning; merged rows are put back as they were."""
    stream, kept = start, []
    for layer, n in zip(layers, (9, 4)):
        stream = prune(model, model.run(stream, stop=layer), method, n, info=info)
        first = stream.visual[0]
        kept.append((stream.origin[0], stream.x[:, first:first + n]))
    stream, logits, tokens = model.run(stream), [], []
    for _ in range(5):
        logits.append(model.logits(stream)[0])
        tokens.append(logits[-1].argmax())
        stream = model.run(model.append(stream, tokens[-1].view(1, 1)))

    answer = decoder(model).embed_tokens(torch.stack(tokens))[None]
    after = (start.next_pos + torch.arange(5)).expand(*start.pos.shape[:-1], 5)
    forced = replace(start, x=torch.cat([start.x, answer], 1), pos=torch.cat([start.pos, after], -1))
    for layer, (origin, rows) in zip(layers, kept):
        forced = model.run(forced, stop=layer)
        forced = keep(forced, torch.isin(forced.origin[0], origin).nonzero()[:, 0])
        forced.x[:, first:first + len(origin)] = rows
    forced = model.run(forced)
    want = model.lm_head(model.final_norm(forced.x[0, -6:-1]))
    torch.testing.assert_close(torch.stack(logits), want, rtol=0, atol=1e-4)       # float32, other shapes of matrix product


@pytest.mark.parametrize("n", [0, 1, 6])
def test_variants_in_one_batch_equal_each_on_its_own(model, start, info, n):
    stream = model.run(start, stop=1)
    methods = list(METHODS)
    batch = prune(model, model.run(prune(model, stream, methods, 9, info=info), stop=2), methods, n, info=info)
    seeds = prune(model, stream, "random", n, [1, 2])
    assert [o.tolist() for o in seeds.origin] == [prune(model, stream, "random", n, seed).origin[0].tolist() for seed in (1, 2)]
    together = model.run(batch)
    for b, method in enumerate(methods):
        alone = model.run(prune(model, model.run(prune(model, stream, method, 9, info=info), stop=2), method, n, info=info))
        assert together.origin[b].equal(alone.origin[0])
        torch.testing.assert_close(together.x[b], alone.x[0], rtol=0, atol=1e-4)   # float32, other batch size
    assert model.decode(together, 6) == [model.decode(model.run(prune(model, model.run(prune(
        model, stream, m, 9, info=info), stop=2), m, n, info=info)), 6)[0] for m in methods]


def test_pruning_leaves_the_stream_it_was_given_untouched(model, start, info):
    stream = model.run(start, stop=1)
    x, cache = stream.x.clone(), [None if kv is None else kv[0].clone() for kv in stream.cache]
    for method in METHODS:
        model.decode(model.run(prune(model, stream, method, 5, info=info)), 3)
    assert stream.x.equal(x) and stream.layer == 1
    assert all(a is None if b is None else a[0].equal(b) for a, b in zip(stream.cache, cache))


def test_a_stream_with_room_goes_on_as_one_without(model, start):
    """Variants that share the cache of the first layers; rows written in place, one and then two, and then room is made."""
    stream = model.run(prune(model, model.run(start, stop=2), ["random", "divprune"], 5))
    roomy, ids = with_room(stream, 3), torch.tensor([[5, 6], [7, 8]])
    held = [k for k, _, _ in roomy.cache]
    for n in (1, 2):
        stream, roomy = (model.run(model.append(s, ids[:, :n])) for s in (stream, roomy))
        torch.testing.assert_close(roomy.x, stream.x, rtol=0, atol=1e-5)
    for (k, _), (room, _, filled), before in zip(stream.cache, roomy.cache, held):
        assert room is before and room.shape == k.shape and filled == k.shape[2]
    stream, roomy = (model.run(model.append(s, ids[:, :1])) for s in (stream, roomy))
    torch.testing.assert_close(roomy.x, stream.x, rtol=0, atol=1e-5)
    assert all(room.shape[2] == 2 * filled - 1 for room, _, filled in roomy.cache)


def test_pruned_tokens_are_not_kept_alive_by_views(model, start):
    """The cache after pruning owns exactly the bytes of what it holds."""
    stream = model.run(prune(model, model.run(start, stop=1), "random", 4))
    for layer, (k, v) in enumerate(stream.cache):
        rows = stream.x.shape[1] if layer else start.x.shape[1]
        _, G, D = heads(model)
        assert k.shape == v.shape == (1, G, rows, D)
        assert v.untyped_storage().nbytes() == k.untyped_storage().nbytes() == G * rows * D * 4


@every_method
def test_methods_that_need_a_layer_say_so_at_layer_0(model, start, info, method):
    if method in NEED_A_LAYER:
        with pytest.raises(InputError, match="cannot act at layer 0"):
            prune(model, start, method, 5, info=info)
    else:
        assert prune(model, start, method, 5, info=info).visual[1] == 5


def test_choosing_twice_at_one_layer_is_refused_where_attention_is_gone(model, start):
    stream = prune(model, model.run(start, stop=1), "random", 9)
    with pytest.raises(AssertionError, match="fastv needs a layer run"):
        prune(model, stream, "fastv", 3)


# ---- information ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def answer(model):
    """Three tokens that the unpruned model likes, so that there is something to lose."""
    text = ""
    for _ in range(3):
        start = model.begin(IMAGE, QUESTIONS[1])
        if text:
            said = model.append(start, torch.tensor([model.answer_ids(text)]))
            start = replace(start, x=torch.cat([start.x, said.x], 1), pos=torch.cat([start.pos, said.pos], -1))
        logits = model.logits(model.run(start))[0]
        text = max((text + chr(c) for c in range(ord("a"), ord("z") + 1)), key=lambda t: logits[model.answer_ids(t)[-1]])
    return text


def naive(model, start, layer, tokens, ids):
    """Each token of the answer its own forward pass, everything before it a prompt, through plain removal at `layer`."""
    total = 0
    for t, y in enumerate(ids):
        stream = start
        if t:
            said = model.append(start, torch.tensor([ids[:t]]))
            stream = replace(start, x=torch.cat([start.x, said.x], 1), pos=torch.cat([start.pos, said.pos], -1))
        stream = keep(model.run(stream, stop=layer), torch.tensor(tokens, dtype=torch.long))
        total += model.logits(model.run(stream)).softmax(-1)[0, y].item()
    return total


@pytest.mark.parametrize("target", ["first", "answer"])
@pytest.mark.parametrize("mode", ["keep-one", "leave-one-out"])
@pytest.mark.parametrize("window, max_batch_tokens", [(1, 10 ** 6), (2, 10 ** 6), (3, 10 ** 6), (3, 150), (3, 1)])
def test_information_equals_the_naive_loop(model, start, answer, window, max_batch_tokens, mode, target):
    """Each window its own forward passes; windows at the edge of the grid are smaller for 3; a bound splits the batches."""
    layers, (rows, cols) = [2, 0], start.grid
    found = tokprune.information(model, IMAGE, QUESTIONS[1], answer, layers, window, mode=mode, target=target,
                                 max_batch_tokens=max_batch_tokens)
    start = model.begin(IMAGE, QUESTIONS[1])
    ids = model.answer_ids(answer)[:1 if target == "first" else None]
    assert len(ids) == (1 if target == "first" else 3) and found.shape == (2, -(-rows // window), -(-cols // window))
    for i, layer in enumerate(layers):
        base = naive(model, start, layer, [] if mode == "keep-one" else [*range(rows * cols)], ids)
        for r in range(found.shape[1]):
            for c in range(found.shape[2]):
                inside = [t for t in range(rows * cols) if t // cols // window == r and t % cols // window == c]
                others = [t for t in range(rows * cols) if t not in inside]
                want = naive(model, start, layer, inside, ids) - base if mode == "keep-one" else base - naive(model, start, layer, others, ids)
                assert found[i, r, c].item() == pytest.approx(want, abs=1e-5)


def test_the_two_modes_and_the_two_targets_differ(model, answer):
    """By more than the tolerance above, which could not tell them apart otherwise."""
    maps = [tokprune.information(model, IMAGE, QUESTIONS[1], answer, [1], mode=mode, target=target)
            for mode in ("keep-one", "leave-one-out") for target in ("first", "answer")]
    assert all((a - b).abs().max() > 3e-5 for i, a in enumerate(maps) for b in maps[:i])


def calls_of_layers(model, work):
    """Every call of every layer seen: its variants, rows, and rows in the cache."""
    calls = []

    def seen(module, args, kwargs):
        calls.append((*args[0].shape[:2], 0 if kwargs["past"] is None else kwargs["past"][0].shape[2]))
    hooks = [layer.register_forward_pre_hook(seen, with_kwargs=True) for layer in decoder(model).layers]
    work()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("mode", ["keep-one", "leave-one-out"])
@pytest.mark.parametrize("window", [2, 3])
def test_information_costs_the_flops_it_says(model, start, window, mode):
    (first, N), config, layers = start.visual, model.config.text, [0, 1, 2]
    calls = calls_of_layers(model, lambda: tokprune.token_information(model, start, "Y", layers, window, mode))
    spent = sum(B * tokprune.flops(config, [T], past) for B, T, past in calls)
    ours, _ = tokprune.information_flops(config, (first, start.x.shape[1] - first - N), start.grid, layers, window, mode)
    assert spent == ours


@pytest.mark.parametrize("mode", ["keep-one", "leave-one-out"])
@pytest.mark.parametrize("bound", [1, 600, 1000])
def test_no_batch_of_windows_is_larger_than_asked(model, start, bound, mode):
    calls = calls_of_layers(model, lambda: tokprune.token_information(model, start, "Y", [0, 1, 2], 2, mode, "first", bound))
    assert all(B == 1 or B * (T + past) <= bound for B, T, past in calls)
    assert any(B > 1 for B, _, _ in calls) == (bound > 1)


def test_information_is_20_times_cheaper_than_the_official_procedure_on_llava_7b():
    """All layers, 2x2 windows of 24x24 tokens; an MME prompt of 35 rows before the image and 30 after."""
    ours, official = tokprune.information_flops(model_llava.TextConfig(), (35, 30), (24, 24), range(1, 32))
    assert official > 20 * ours


@pytest.mark.parametrize("curve, full, tolerance, want", [
    ([0, 50, 99, 100], 100, 0.01, 2), ([0, 50, 98.9, 100], 100, 0.01, 3), ([100, 100], 100, 0.01, 0),
    ([99, 0, 100, 100], 100, 0.01, 2), ([0, 10], 100, 0.01, 2), ([0, 50, 100], 100, 0.6, 1)])
def test_horizon_is_the_first_layer_from_which_dropping_all_is_free(curve, full, tolerance, want):
    assert tokprune.horizon(curve, full, tolerance) == want


def test_tokens_of_a_window_share_its_information():
    windows = torch.tensor([[1., 2.], [3., 4.]])
    assert tokprune.per_token(windows, (3, 4), 2).view(3, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]


# ---- schedules and cost -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, want", [
    ("", []), ("dart@2=252 random@20=38", [(2, "dart", 252), (20, "random", 38)]),
    ("divprune@0:0.5 random@20:.9", [(0, "divprune", 0.5), (20, "random", 0.9)]), ("random@3:1", [(3, "random", 1.0)])])
def test_schedules_parse(text, want):
    assert parse_schedule(text) == want and parse_schedule(tokprune.format_schedule(want)) == want
    assert [type(amount) for _, _, amount in parse_schedule(text)] == [type(amount) for _, _, amount in want]


@pytest.mark.parametrize("text, message", [
    ("dart", "does not parse"), ("dart@2", "does not parse"), ("dart@x:0.5", "does not parse"), ("dart@2:0.5.5", "does not parse"),
    ("dart@-1:0.5", "does not parse"), ("nothing@2:0.5", "unknown method 'nothing'"), ("dart@2:1.5", "want 0..1"),
    ("dart@5:0.5 random@5:0.9", "must ascend"), ("dart@5:0.5 random@2:0.9", "must ascend"), ("fastv@0:0.5", "cannot act at layer 0")])
def test_schedules_that_do_not_parse_or_ascend_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_schedule(text)


@pytest.mark.parametrize("schedule, mean", [
    ("dart@2=252 random@20=38", 192.0), ("divprune@0=284 random@20=38", 191.75), ("dart@1=60 random@20=27", 63.75),
    ("divprune@0=96 random@20=10", 63.75), ("dart@2=260 random@21=0", 190.4), ("dart@1=60 random@26=0", 64.9),
    ("divprune@0=284 random@20=0", 177.5), ("divprune@0=98 random@21=0", 64.3)])
def test_mean_visual_tokens_of_the_papers_schedules(schedule, mean):
    """The eight of the official code on LLaVA-1.5-7B: 576 tokens, 32 layers."""
    assert round(tokprune.mean_visual_tokens(parse_schedule(schedule), 576, 32), 2 if mean % 1 in (0, .75) else 1) == mean


@pytest.mark.parametrize("method, first, kept, few", [("dart", 2, 252, 39), ("divprune", 0, 284, 38)])
def test_a_third_is_divided_as_the_official_code_divides_it(method, first, kept, few):
    """576 tokens, 32 layers, horizon at 20; the official 38 of DART is 39 where the method alone is rounded up."""
    assert tokprune.at_budget(method, 1 / 3, 20, 576, 32)[1] == ((first, method, round(1 - kept / 576, 4)),
                                                                 (20, "random", round(1 - few / 576, 4)))


@pytest.mark.parametrize("N, L, deep", [(576, 32, 20), (64, 24, 17), (72, 28, 27), (2048, 28, 22)])
@pytest.mark.parametrize("budget", [1 / 2, 1 / 3, 1 / 9])
@pytest.mark.parametrize("method", ["dart", "divprune"])
def test_a_combination_never_has_more_tokens_than_the_method_alone(method, budget, N, L, deep):
    """And at most one token a layer fewer than a budget that is met."""
    alone, *others = (tokprune.mean_visual_tokens(s, N, L) for s in tokprune.at_budget(method, budget, deep, N, L))
    assert budget * N <= alone < budget * N + 1 and all(alone - 1 <= mean <= alone for mean in others)


def test_prefill_under_a_schedule_keeps_what_it_says(model, start):
    stream = prefill(model, start, parse_schedule("divprune@0:0.5 random@2=3"))
    V = start.visual[1]
    assert stream.visual[1] == 3 and [k.shape[2] - start.x.shape[1] + V for k, _ in stream.cache] == [V // 2, V // 2, 3]


def test_flops_equal_what_torch_counts(model, start):
    """Of the linear layers exactly; torch counts the whole attention square, we its causal half."""
    def linear(module, rows):
        with FlopCounterMode(display=False) as counter:
            for layer in decoder(model).layers:
                x = torch.zeros(1, rows, model.config.text.hidden_size)
                a = layer.self_attn
                layer.mlp(x), a.q_proj(x), a.k_proj(x), a.v_proj(x), a.o_proj(x)
        return counter.get_total_flops()
    rows, (H, _, D) = start.x.shape[1], heads(model)
    attention = 3 * 2 * rows * rows * H * D
    assert tokprune.flops(model.config.text, [rows] * 3) == linear(model, rows) + attention


def test_answer_under_a_schedule_is_the_decoded_prefill(model, start):
    schedule = parse_schedule("divprune@0=0")
    want = model.decode(prefill(model, start, schedule), 12)[0]
    assert model.answer(IMAGE, QUESTIONS[0], schedule, 12) == want
    assert want != model.answer(IMAGE, QUESTIONS[0], max_new_tokens=12)
