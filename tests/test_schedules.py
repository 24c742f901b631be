"""Schedules, the loop over them, and FLOPs."""
import pytest
import torch
from checkpoints import decoder_of, load
from samples import QUESTIONS, images
from torch.utils.flop_counter import FlopCounterMode

import tokprune
from tokprune import InputError, format_schedule, parse_schedule, prefill, prune


@pytest.mark.parametrize("text, want", [
    ("", []), ("dart@2=252 random@20=38", [(2, "dart", 252), (20, "random", 38)]),
    ("divprune@0:0.5 random@20:.9", [(0, "divprune", 0.5), (20, "random", 0.9)]),
    ("random@3:1", [(3, "random", 1.0)]),
    ("dart@2=20 none@17", [(2, "dart", 20), (17, "none", 0)])])
def test_schedules_parse_and_a_ratio_is_never_taken_for_a_count(text, want):
    got = parse_schedule(text)
    assert got == want and parse_schedule(format_schedule(want)) == want
    assert "none@17=" not in format_schedule(want)
    assert [type(amount) for _, _, amount in got] == [type(amount) for _, _, amount in want]


@pytest.mark.parametrize("text, message", [
    ("dart", "does not parse"), ("dart@x:0.5", "does not parse"),
    ("dart@2:0.5.5", "does not parse"), ("dart@-1:0.5", "does not parse"),
    ("nothing@2:0.5", "unknown method 'nothing'"), ("dart@2:1.5", "want 0..1"),
    ("dart@5:0.5 random@5:0.9", "must ascend"), ("dart@5:0.5 random@2:0.9", "must ascend"),
    ("dart@2", "how many tokens stay"), ("none@17:0.9", "none keeps nothing; want none@17"),
    ("none@17=0", "none keeps nothing; want none@17"),
    ("fastv@0:0.5", "cannot act at layer 0")])
def test_schedules_that_do_not_parse_or_ascend_are_named(text, message):
    with pytest.raises(InputError, match=message) as e:
        parse_schedule(text)
    assert "\n" not in str(e.value)


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


def test_lists_that_do_not_fit_the_variants_are_refused_with_both_lengths():
    """`prune(model, stream of 3 variants, ["grid"], 3)` was an IndexError."""
    model = load("llava_grouped")
    three = tokprune.expand(model.begin(images()["whole"], QUESTIONS[0]), 3)
    for methods, seeds, message in (
            (["grid"], 0, "1 methods or seeds for 3 variants"),
            (["grid", "grid"], 0, "2 methods or seeds for 3 variants"),
            ("grid", [0], "1 methods or seeds for 3 variants"),
            ("grid", [0, 1], "2 methods or seeds for 3 variants"),
            (["grid"] * 3, [0, 1], "3 methods and 2 seeds"),
            (["grid"] * 3, [0] * 6, "3 methods and 6 seeds")):
        with pytest.raises(AssertionError, match=message):
            prune(model, three, methods, 3, seeds)


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
