"""Properties of pruning, for every method and three that a fork might add, on small checkpoints."""
import re
from dataclasses import replace

import pytest
import torch
from checkpoints import MODULES, ONE_OF_EACH, decoder_of, greedy, load
from samples import QUESTIONS, images

import eval as evaluation
import information
import tokprune
from tokprune import METHODS, InputError, Method, keep, prune, with_room

IMAGE = images()["whole"]


def every_third(view, n):
    """Fills up from the others where the third of the tokens is too few."""
    order = sorted(range(view.visual[1]), key=lambda i: (i % 3 != 0, i))
    return torch.tensor(sorted(order[:n]))


def merged_into_one(view, n):
    """The first n stay, and the last of them becomes the mean of all."""
    rows = view.x_visual[:n].clone()
    rows[-1] = view.x_visual.mean(0)
    return torch.arange(n), rows


def drawn_segment(view, n):
    start = torch.randint(view.visual[1] - n + 1, (1,), generator=view.rng)
    return start + torch.arange(n)


CHOOSING = [name for name, method in METHODS.items() if not method.keeps_none]
# methods that act on a stream as it is: for tests that need some set of rows, whichever
FREE = [name for name in CHOOSING if not (METHODS[name].needs_layer or METHODS[name].measure)]
DRAWS = next(name for name, method in METHODS.items() if method.draws)
ADDED = {"every-third": Method(every_third, "#008080"),
         "merged": Method(merged_into_one, "#808000", merges=True),
         "segment": Method(drawn_segment, "#800080", draws=True)}


@pytest.fixture(autouse=True)
def added(monkeypatch):
    for name, method in ADDED.items():
        monkeypatch.setitem(METHODS, name, method)


every_method = pytest.mark.parametrize("method", [*CHOOSING, *ADDED])


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def start(model):
    return model.begin(IMAGE, QUESTIONS[0])


@pytest.fixture(scope="module")
def reached(model, start):
    """At the input of layer 1."""
    return model.run(start, stop=1)


@pytest.fixture(scope="module")
def info(start):
    """Made up, of one prompt: of each token, or of each token and each of three answer tokens."""
    g = torch.Generator().manual_seed(0)
    shapes = {"windows": (1, start.N), "tokens": (1, start.N, 3), "attention": (1, start.N, 3)}
    return {name: torch.randn(shapes[method.measure], generator=g)
            for name, method in METHODS.items() if method.measure}


def close(got, want, tolerance=1e-4):
    """float32, another batch size or another shape of matrix product."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@every_method
def test_keeps_exactly_n_visual_tokens_in_order_and_all_text(start, reached, model, info, method):
    """And where every visual token is the same, so that all distances and gains tie. A method that
    merges changes rows where there is room."""
    first, V = start.visual
    tied = replace(reached, x=reached.x.clone())
    tied.x[:, first:first + V] = tied.x[:, first:first + 1]
    for full, counts in ((reached, (0, 1, 2, 5, 8, V - 1, V)), (tied, (3, 8))):
        for n in counts:
            pruned = prune(model, full, method, n, info=info)
            rows = first + pruned.origin[0]
            assert pruned.visual == (first, n) and (pruned.origin.diff() > 0).all()
            assert pruned.x[:, :first].equal(full.x[:, :first])
            assert pruned.x[:, first + n:].equal(full.x[:, first + V:])
            assert pruned.pos[..., first:first + n].equal(full.pos[..., rows])
            assert pruned.next_pos == full.next_pos and pruned.N == V
            want = full.x[0, rows]
            if METHODS[method].merges and 0 < n < V:
                view = tokprune.view_of(model, full, 0, 0, info.get(method))
                idx, merged = METHODS[method](view, n)
                if merged is not None:
                    assert n != 8 or full is tied or not merged.equal(want)
                    want = merged
            assert pruned.x[0, first:first + n].equal(want)


@every_method
def test_sets_are_chosen_in_float32(model, reached, info, method):
    """A bfloat16 stream is chosen from as its exact float32 copy is."""
    def cast(stream, dtype):
        cache = [kv and tokprune.KV(kv.keys.to(dtype), kv.values.to(dtype)) for kv in stream.cache]
        return replace(stream, x=stream.x.to(dtype), cache=cache,
                       queries=stream.queries.to(dtype), embeds=stream.embeds.to(dtype))

    class Norm:                                         # of what bfloat16 left of the rows
        final_norm = staticmethod(lambda x: model.final_norm(x.float()))
    low = cast(reached, torch.bfloat16)
    for n in (2, 9):
        want = prune(Norm, cast(low, torch.float32), method, n, info=info)
        assert prune(Norm, low, method, n, info=info).origin.equal(want.origin)


@every_method
def test_keeping_all_is_bitwise_the_unpruned_model(model, start, reached, info, method):
    want = model.run(reached)
    got = model.run(prune(model, reached, method, start.N, info=info))
    assert got.x.equal(want.x)
    assert all(a.keys.equal(b.keys) and a.values.equal(b.values)
               for a, b in zip(got.cache, want.cache))


@every_method
def test_same_seed_same_set_and_only_what_draws_depends_on_it(model, reached, info, method):
    sets = [tuple(prune(model, reached, method, 5, seed, info).origin[0].tolist())
            for seed in (1, 1, 2, 3, 4)]
    assert sets[0] == sets[1]
    assert (len(set(sets)) > 1) == METHODS[method].draws


@every_method
def test_decoding_through_the_ragged_cache_equals_one_teacher_forced_pass(model, start, info,
                                                                          method):
    """Red if a cache, a mask or a decoding position is off; merged rows are put back unchanged."""
    stream = start
    kept = []
    first = start.visual[0]
    for layer, n in ((1, 9), (2, 4)):
        stream = prune(model, model.run(stream, stop=layer), method, n, info=info)
        kept.append((layer, stream.origin[0], stream.x[:, first:first + n]))
    logits, tokens = greedy(model, model.run(stream), 4)
    answer = model.append(start, tokens[None])
    forced = replace(start, x=torch.cat([start.x, answer.x], 1),
                     pos=torch.cat([start.pos, answer.pos], -1))
    for layer, origin, rows in kept:
        forced = model.run(forced, stop=layer)
        alive = torch.isin(forced.origin[0], origin).nonzero()[:, 0]
        forced = keep(forced, alive)
        forced.x[:, first:first + len(origin)] = rows
    forced = model.run(forced)
    want = [model.logits(forced, row)[0] for row in range(-5, -1)]
    close(logits, torch.stack(want))


def test_variants_in_one_batch_equal_each_on_its_own(model, reached, info):
    def chosen(method):
        twice = model.run(prune(model, reached, method, 9, info=info), stop=2)
        return model.run(prune(model, twice, method, 4, info=info))
    together = chosen(CHOOSING)
    answers = model.decode(together, 4)
    for b, method in enumerate(CHOOSING):
        alone = chosen(method)
        assert together.origin[b].equal(alone.origin[0]), method
        close(together.x[b], alone.x[0])
        assert answers[b] == model.decode(alone, 4)[0]
    seeds = prune(model, reached, DRAWS, 5, [1, 2])
    assert [origin.tolist() for origin in seeds.origin] == [
        prune(model, reached, DRAWS, 5, seed).origin[0].tolist() for seed in (1, 2)]


def test_pruning_leaves_the_stream_it_was_given_untouched(model, reached, info):
    x = reached.x.clone()
    keys = reached.cache[0].keys.clone()
    for method in METHODS:
        model.decode(model.run(prune(model, reached, method, 5, info=info)), 2)
    assert reached.x.equal(x) and reached.layer == 1 and reached.cache[0].keys.equal(keys)
    assert reached.cache[1] is None


def test_a_stream_with_room_goes_on_as_one_without(model, start):
    """Variants that share the first layers' cache; rows written in place, then room is made."""
    stream = model.run(prune(model, model.run(start, stop=2), FREE[:2], 5))
    roomy = with_room(stream, 3)
    ids = torch.tensor([[5, 6], [7, 8]])
    held = [kv.keys_room for kv in roomy.cache]
    for n in (1, 2):
        stream, roomy = (model.run(model.append(s, ids[:, :n])) for s in (stream, roomy))
        close(roomy.x, stream.x)
    assert all(kv.keys_room is room for kv, room in zip(roomy.cache, held))
    stream, roomy = (model.run(model.append(s, ids[:, :1])) for s in (stream, roomy))
    close(roomy.x, stream.x)
    for kv, plain in zip(roomy.cache, stream.cache):
        close(kv.keys, plain.keys)
        assert kv.keys_room.shape[2] == 2 * kv.rows - 1


@every_method
def test_a_method_that_needs_a_layer_or_a_measurement_says_so(model, start, reached, info, method):
    if METHODS[method].needs_layer:
        with pytest.raises(InputError, match="cannot act at layer 0"):
            prune(model, start, method, 5, info=info)
        again = prune(model, reached, FREE[0], 9)
        with pytest.raises(AssertionError, match=f"{method} needs a layer run"):
            prune(model, again, method, 3)
    else:
        assert prune(model, start, method, 5, info=info).visual[1] == 5
    if METHODS[method].measure:
        with pytest.raises(InputError, match=f"{method} needs its .* measured beforehand"):
            prune(model, reached, method, 5)


def test_a_view_shows_the_layer_before_and_the_tokens_that_are_left(request, model, start, reached,
                                                                    info):
    """Everything in a second-stage View recomputed by hand, for the second of two variants."""
    module = MODULES[request.node.callspec.params["model"]]
    stream = model.run(prune(model, reached, FREE[:2], 7), stop=2)
    view = tokprune.view_of(model, stream, 1, 3, info["info"])
    before = prune(model, reached, FREE[1], 7)
    layer = decoder_of(model).layers[1]
    c = model.config.text
    H, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    T = before.x.shape[1]
    y = layer.input_layernorm(before.x)
    rope = model.cos_sin(before.pos, torch.float32)
    a = layer.self_attn
    q = a.q_proj(y).view(1, T, H, D)
    k = a.k_proj(y).view(1, T, G, D)
    if hasattr(a, "q_norm"):                            # Qwen3's
        q = a.q_norm(q)
        k = a.k_norm(k)
    q = module.rotate(q, rope)[0].transpose(0, 1)                               # (H, T, D)
    k = module.rotate(k, rope)[0].transpose(0, 1)
    scores = q @ k.repeat_interleave(H // G, 0).transpose(1, 2) / D ** 0.5
    scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
    close(view.keys, k.transpose(0, 1).flatten(1))
    rows = [view.visual[0] + 1, T - 1]              # a visual row's query is its variant's own
    close(view.attention(torch.tensor(rows)), scores.softmax(-1)[:, rows])
    close(view.x, model.run(before, stop=2).x[0])
    close(view.normed(), decoder_of(model).norm(view.x))
    assert view.layer == 2 and view.visual == (start.visual[0], 7)
    assert view.origin.equal(before.origin[0])
    assert view.saliency().equal(start.saliency()[0, view.origin])
    assert view.info.equal(info["info"][0, view.origin])
    assert view.embeds.equal(start.x[0]) and view.embeds_visual == start.visual
    other = tokprune.view_of(model, reached, 0, 3, None)
    assert view.rng.initial_seed() != other.rng.initial_seed()


def test_none_keeps_nothing_whatever_it_is_asked_for(model, start, reached):
    for stream in (start, reached):
        pruned = prune(model, stream, "none", 5)
        assert pruned.visual == (start.visual[0], 0)
        assert model.run(pruned).x.equal(model.run(prune(model, stream, DRAWS, 0)).x)


def test_an_entry_of_methods_can_be_typed_told_apart_drawn_and_measured():
    for name, method in METHODS.items():
        assert re.fullmatch(r"[\w-]+", name) and re.fullmatch("#[0-9a-f]{6}", method.color), name
        assert method.measure in ("", *information.MEASURES), name
    assert len({method.color for method in METHODS.values()}) == len(METHODS)


def test_an_added_method_stands_in_the_table_and_what_draws_gets_several_seeds(run, tmp_path):
    flags = ["--method", ",".join(ADDED), "--seeds", 2, "--bench", "mme", "--limit", 1]
    printed, result = run(evaluation.main, *flags, out=tmp_path)
    rows = {row["method"]: row for row in result["benchmarks"]["mme"]}
    for name, method in ADDED.items():
        assert rows[name]["seeds"] == (2 if method.draws else 1)
        assert rows[name]["kept"] == 6
        assert f"| {name} |" in " ".join(printed.split())
