"""bench.py: what is measured is what it says, for the model at hand and for a published shape."""
import json
from dataclasses import fields, replace

import pytest
import torch

import bench
from information import token_information
from support import timing
from tokprune import InputError, prefill, visual_tokens

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "mrope_section": (1, 1, 2), "num_heads": 4,
         "num_hidden_layers": 3, "depth": 2, "out_hidden_size": 32, "image_size": 84,
         "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}


def small(config):
    names = {field.name for field in fields(config)} & SMALL.keys()
    return replace(config, **{name: SMALL[name] for name in names})


@pytest.fixture(params=bench.SHAPES)
def shape(request, monkeypatch) -> str:
    """The name of a published shape, made small."""
    model_class, config = bench.SHAPES[request.param]
    config = replace(config, text=small(config.text), vision=small(config.vision))
    monkeypatch.setitem(bench.SHAPES, request.param, (model_class, config))
    monkeypatch.setattr(bench, "SIDE", 6)
    return request.param


@pytest.fixture
def model(shape):
    return bench.made_up(shape, 3, "cpu", torch.float32)


# ---- the clock, memory, rates --------------------------------------------------------------------

def test_the_calls_take_turns_and_the_first_round_warms_up(monkeypatch):
    clock = [0.0]
    order = []
    durations = {"a": iter([9, 1, 3]), "b": iter([9, 5, 8])}
    monkeypatch.setattr(timing, "now", lambda device: clock[0])

    def call(name):
        order.append(name)
        clock[0] += next(durations[name])
    ms = timing.time_in_turns({"a": lambda: call("a"), "b": lambda: call("b")}, 2, "cpu")
    assert "".join(order) == "abbaab"
    assert ms == {"a": {"median": 2, "low": 1, "high": 3},
                  "b": {"median": 6.5, "low": 5, "high": 8}}


def test_only_the_device_that_is_timed_is_waited_for(monkeypatch):
    """A bug once: with --device cpu, a question to CUDA opened a context on the first GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    for device in ("cpu", torch.device("cpu"), "cuda:1"):
        timing.now(device)
    assert asked == ["cuda:1"]


def test_memory_is_the_most_that_a_call_holds_at_once():
    def call():
        first = torch.zeros(2 ** 20)
        del first
        torch.zeros(2 ** 19)
    assert timing.extra_memory(call, torch.device("cpu")) == 4 * 2 ** 20


def test_the_floor_of_a_layer_is_its_flops_or_its_weights():
    """By hand, at 10 FLOPs and 4 bytes a second: 50 FLOPs take 5 s, longer than 8 bytes; 8 bytes
    take 2 s, longer than 10 FLOPs."""
    assert timing.floor_ms([50, 10], 8, rate=10, bandwidth=4) == 7000


def test_the_matrix_rate_is_of_random_numbers(monkeypatch):
    """A bug once: a GPU multiplies matrices of ones faster, so that every share came out too low.
    """
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn",
                        lambda *shape, **kind: drawn.append(shape) or randn(8, 8, **kind))
    timing.device_rates(torch.zeros(1))
    assert drawn == [(1024, 1024)]


def test_the_cache_takes_the_bytes_of_the_formula_under_every_method(model):
    """Whole storages are counted: a view that kept pruned rows alive would show."""
    text = model.config.text
    stream = model.begin(bench.noise(model), bench.QUESTION)
    for method in bench.TIMED:
        schedule = [(1, method, 0.5), (2, method, 3)]
        rows = [stream.x.shape[1] - stream.N + V for V in visual_tokens(schedule, stream.N, 3)]
        of_a_row = 2 * text.num_key_value_heads * text.head_dim * 4
        assert timing.cache_bytes(prefill(model, stream, schedule)) == sum(rows) * of_a_row, method


# ---- the program ---------------------------------------------------------------------------------

def test_a_shape_is_timed_under_every_schedule(shape, tmp_path, capsys):
    bench.main(f"--shape {shape} --depth 3 --device cpu --rounds 1 --method grid,scope --layer 0,2 "
               f"--ratio 0.5 --json --out {tmp_path}".split())
    printed = capsys.readouterr().out
    assert f"{shape}, 3 layers; 36 visual tokens" in printed
    rows = {row["name"]: row for row in json.loads(printed.splitlines()[-1])["speed"]}
    assert list(rows) == ["unpruned", "none@0", "grid@0:0.5", "scope@0:0.5", "none@2",
                          "grid@2:0.5", "scope@2:0.5"]
    assert all(f"\n| {name} |" in printed for name in rows)
    promised = {name: row["promised"] for name, row in rows.items()}
    assert promised["none@0"] > promised["grid@0:0.5"] > promised["grid@2:0.5"]
    assert promised["grid@2:0.5"] == promised["scope@2:0.5"] > promised["unpruned"] == 1
    for row in rows.values():
        assert 0 < row["prefill_ms"]["low"] <= row["prefill_ms"]["high"]
        assert row["decode_ms"]["median"] > 0 and row["peak_bytes"] > 0


@pytest.mark.parametrize("shape", ["llava-7b"], indirect=True)
def test_questions_together_are_counted_a_question(model, monkeypatch):
    """The clock shows the rows computed so far: every question has as many."""
    rows = [0]
    run = model.run

    def counted(stream, stop=None):
        rows[0] += len(stream.x) * stream.x.shape[1]
        return run(stream, stop)
    monkeypatch.setattr(model, "run", counted)
    monkeypatch.setattr(timing, "now", lambda device: rows[0])
    monkeypatch.setattr(bench, "device_rates", lambda like: (1, 1))
    stream = model.begin(bench.noise(model), bench.QUESTION)
    one, three = bench.measure(model, stream, [()], [1, 3], 1)["speed"]
    assert [one["name"], three["name"]] == ["unpruned", "unpruned, 3 together"]
    assert one["prefill_ms"]["median"] == three["prefill_ms"]["median"] == stream.x.shape[1]
    assert one["decode_ms"]["median"] == three["decode_ms"]["median"] == 1
    assert one["cache_bytes"] == three["cache_bytes"]


def test_the_verdict_names_the_slowest_and_the_fastest_of_equal_cost(capsys):
    rows = [{"name": name, "times_as_fast": fast, "promised": promised, "gflops": promised,
             "questions": 1} for name, fast, promised in [
        ("unpruned", 1, 1), ("none@2", 4, 5), ("grid@2:0.9", 2.5, 3), ("dart@2:0.9", 1.5, 3)]]
    bench.print_verdicts(rows)
    assert capsys.readouterr().out == (
        "none@2 makes prefill 4.0 times as fast; FLOPs and weights promise 5.0.\n"
        "dart@2:0.9 makes prefill 1.5 times as fast, grid@2:0.9 2.5 times; FLOPs and weights "
        "promise 3.0.\n")


@pytest.mark.parametrize("shape", ["qwen3-8b"], indirect=True)
def test_together_and_one_by_one_find_the_same(model):
    stream = model.begin(bench.noise(model), bench.QUESTION)
    rows = bench.time_sweep(model, stream, [(), ((1, "grid", 0.9),)], 1)
    assert [row["name"] for row in rows] == ["sweep", "information"]
    apart = bench.information_one_by_one(model, stream, "yes", [1])
    together = token_information(model, stream, "yes", [1])
    assert (together.flatten(1) - apart).abs().max() < 1e-5


def test_transformers_computes_the_same_logits(model):
    """Where it is installed: nothing else needs it."""
    pytest.importorskip("transformers")
    pixels = model.preprocess(bench.noise(model))
    found = bench.against_transformers(model, pixels, rounds=1)
    assert len(found["rows"]) == 5 and all(row["ratio"] > 0 for row in found["rows"])
    assert found["difference_of_logits"] < 1e-5


@pytest.mark.parametrize("flags, message", [
    ("--sweep --batch 2", "--batch: not allowed with argument --sweep"),
    ("--batch 1,0", "--batch: 0, want 1 or more"),
    ("--depth 5", "--depth: goes with --shape"),
    ("--shape llava-7b --model tiny/qwen", "--model: goes without --shape"),
    ("--shape llava-7b --depth 2", "layer 2 is out of range; this model has layers 0 to 1"),
    ("--schedule random@2:0.5 --ratio 0.5", "--schedule: stands for --method, --layer and --ratio"),
    ("--method info", "info: what it needs is measured in other runs"),
    ("--method dart --layer 0", "dart reads the layer before"),
    ("--against transformers", "--against transformers: it is not installed")])
def test_a_flag_that_cannot_be_used_is_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        bench.main([*flags.split(), "--out", str(tmp_path)])
