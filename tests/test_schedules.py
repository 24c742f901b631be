"""Schedules, budgets and FLOPs; the names that schedules are made of."""
import re

import pytest
import torch
from checkpoints import load
from samples import QUESTIONS, images
from torch.utils.flop_counter import FlopCounterMode

import information
import tokprune
from support.made_up import decoder_of
from tokprune import (METHODS, InputError, at_budget, format_schedule, parse_schedule, prefill,
                      prune)


@pytest.mark.parametrize("text, want", [
    ("", []), ("dart@2=252 random@20=38", [(2, "dart", 252), (20, "random", 38)]),
    ("divprune@0:0.5 random@20:.9", [(0, "divprune", 0.5), (20, "random", 0.9)]),
    ("random@3:1", [(3, "random", 1.0)])])
def test_schedules_parse_and_a_ratio_is_never_taken_for_a_count(text, want):
    got = parse_schedule(text)
    assert got == want and parse_schedule(format_schedule(want)) == want
    assert [type(amount) for _, _, amount in got] == [type(amount) for _, _, amount in want]


@pytest.mark.parametrize("text, message", [
    ("dart", "does not parse"), ("dart@2", "does not parse"), ("dart@x:0.5", "does not parse"),
    ("dart@2:0.5.5", "does not parse"), ("dart@-1:0.5", "does not parse"),
    ("nothing@2:0.5", "unknown method 'nothing'"), ("dart@2:1.5", "want 0..1"),
    ("dart@5:0.5 random@5:0.9", "must ascend"), ("dart@5:0.5 random@2:0.9", "must ascend"),
    ("fastv@0:0.5", "cannot act at layer 0")])
def test_schedules_that_do_not_parse_or_ascend_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_schedule(text)


@pytest.mark.parametrize("schedule, mean", [
    ("dart@2=252 random@20=38", 192.0), ("divprune@0=284 random@20=38", 191.75),
    ("dart@1=60 random@20=27", 63.75), ("divprune@0=96 random@20=10", 63.75),
    ("dart@2=260 random@21=0", 190.4), ("dart@1=60 random@26=0", 64.9),
    ("divprune@0=284 random@20=0", 177.5), ("divprune@0=98 random@21=0", 64.3)])
def test_mean_visual_tokens_of_the_papers_schedules(schedule, mean):
    """The eight of the official code on LLaVA-1.5-7B, with as many digits as are published."""
    digits = 2 if mean % 1 in (0, 0.75) else 1
    got = tokprune.mean_visual_tokens(parse_schedule(schedule), 576, 32)
    assert round(got, digits) == mean


@pytest.mark.parametrize("amount, N, kept", [(0.9, 64, 6), (0.0, 64, 64), (1.0, 64, 0),
                                             (0, 64, 0), (1, 64, 1), (100, 64, 64)])
def test_an_int_is_how_many_are_kept_and_a_float_the_share_that_leaves(amount, N, kept):
    assert tokprune.number_kept(amount, N) == kept


def test_tokens_that_left_do_not_come_back():
    schedule = parse_schedule("divprune@0=9 random@2=12 random@3:0.9")
    assert tokprune.visual_tokens(schedule, 60, 5) == [9, 9, 9, 6, 6]


@pytest.mark.parametrize("method, first, kept, past", [("dart", 2, 252, 39),
                                                       ("divprune", 0, 284, 38)])
def test_a_third_is_divided_as_the_official_code_divides_it(method, first, kept, past):
    """576 tokens, 32 layers; its 38 for DART is 39 where the method alone is rounded up."""
    schedule = at_budget(method, 1 / 3, 20, 576, 32)[1]
    found = [(layer, name, tokprune.number_kept(amount, 576)) for layer, name, amount in schedule]
    assert found == [(first, method, kept), (20, "random", past)]


@pytest.mark.parametrize("N", [64, 576, 16384])
def test_a_budget_is_kept_to_the_token_and_its_schedule_can_be_typed(N):
    """Qwen sees an image as 16,384 tokens at most."""
    for n in range(1, N, 1 if N < 1000 else 7):
        ratio = tokprune.fraction_removed(n, N)
        assert tokprune.number_kept(ratio, N) == n
        assert parse_schedule(tokprune.format_schedule([(2, "dart", ratio)]))[0][2] == ratio


@pytest.mark.parametrize("budget, first", [(1 / 9, 1), (1 / 5, 1), (1 / 4, 2), (1 / 3, 2)])
def test_two_whole_layers_are_at_most_a_quarter_of_the_budget(budget, first):
    """Of 32 layers, a ninth is 3.6 whole ones; 2 fit a quarter of it from 8 on, a budget of 1/4."""
    schedules = at_budget("dart", budget, 20, 576, 32)
    assert [schedule[0][0] for schedule in schedules] == [first] * 3


@pytest.mark.parametrize("method, budget, layer, message", [
    ("dart", 1 / 3, 2, "random cannot follow dart, which starts at layer 2"),
    ("dart", 1 / 32, 20, "does not fit dart from layer 1 on"),
    ("divprune", 1 / 1000, 20, "keep 1 alone, 1 and 0, 1 and 0, of 576 tokens"),
    ("divprune", 0.9, 20, "768 and 104, 830 and 0, of 576 tokens")])
def test_a_budget_that_does_not_fit_is_refused(method, budget, layer, message):
    with pytest.raises(InputError, match=message):
        at_budget(method, budget, layer, 576, 32)


@pytest.mark.parametrize("N, L, layer", [(576, 32, 20), (72, 28, 27), (2048, 28, 22)])
@pytest.mark.parametrize("budget", [1 / 2, 1 / 9])
@pytest.mark.parametrize("method", ["dart", "divprune"])
def test_a_combination_never_has_more_tokens_than_the_method_alone(method, budget, N, L, layer):
    """And at most one token a layer fewer than a budget that is met."""
    alone, *others = (tokprune.mean_visual_tokens(schedule, N, L)
                      for schedule in at_budget(method, budget, layer, N, L))
    assert budget * N <= alone < budget * N + 1
    assert all(alone - 1 <= mean <= alone for mean in others)


def test_prefill_under_a_schedule_keeps_what_it_says():
    """A ratio is of the 16 tokens at first, however many are alive."""
    model = load("llava_grouped")
    start = model.begin(images()["whole"], QUESTIONS[0])
    schedule = parse_schedule("divprune@0:0.5 random@2:0.75")
    stream = prefill(model, start, schedule, seed=2, positions="compact")
    text = start.x.shape[1] - 16
    assert [kv.keys.shape[2] - text for kv in stream.cache] == [8, 8, 4]
    half = model.run(prune(model, start, "divprune", 8, positions="compact"), stop=2)
    want = prune(model, half, "random", 4, seed=2, positions="compact")
    assert stream.origin.equal(want.origin)
    assert stream.next_pos == want.next_pos == text + 4
    assert stream.x.equal(model.run(want).x)


def test_flops_equal_what_torch_counts():
    """Of the linear layers exactly; torch counts the whole attention square, we its causal half."""
    model = load("qwen_untied")
    c = model.config.text
    rows = 40
    with FlopCounterMode(display=False) as counter:
        for layer in decoder_of(model).layers:
            x = torch.zeros(1, rows, c.hidden_size)
            layer.mlp(x)
            for projection in "qkvo":
                getattr(layer.self_attn, f"{projection}_proj")(x)
    attention = 2 * rows * rows * c.num_attention_heads * c.head_dim
    want = counter.get_total_flops() + model.num_layers * attention
    assert tokprune.flops(c, [rows] * model.num_layers) == want


def test_flops_behind_a_cache_are_what_the_whole_costs_less_what_is_in_it():
    c = load("qwen_untied").config.text
    whole = tokprune.flops(c, [40, 30])
    assert tokprune.flops(c, [25, 15], past=15) == whole - tokprune.flops(c, [15, 15])


def test_an_entry_of_methods_can_be_typed_drawn_and_measured():
    for name, method in METHODS.items():
        assert re.fullmatch(r"[\w-]+", name) and re.fullmatch("#[0-9a-f]{6}", method.color), name
        assert method.measure in ("", *information.MEASURES), name
