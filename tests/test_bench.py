"""bench.py: what is measured is what it says, and every comparison runs on tiny shapes."""
import json

import pytest
import torch

import bench
from support import made_up, runs, timing
from support.checkpoint import load_model
from support.files import read_image
from tokprune import METHODS, InputError, prefill, visual_tokens

TINY = runs.ROOT / "tiny"


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_the_cache_takes_the_bytes_of_the_formula_under_every_method(name):
    """Whole storages are counted: a view that kept pruned rows alive would show."""
    model = load_model(TINY / name, "cpu", torch.float32)
    text = model.config.text
    stream = model.begin(read_image(bench.PICTURE), bench.QUESTION)
    text_rows = stream.x.shape[1] - stream.N
    for method in METHODS:
        if METHODS[method].measure:
            continue
        schedule = [(2, method, 0.5), (10, method, 3)]
        rows = [text_rows + V for V in visual_tokens(schedule, stream.N, model.num_layers)]
        of_a_row = 2 * text.num_key_value_heads * text.head_dim * 4
        assert timing.cache_bytes(prefill(model, stream, schedule)) == sum(rows) * of_a_row, method


def test_the_calls_take_turns_and_the_first_round_warms_up(monkeypatch):
    clock = [0.0]
    order = []
    durations = {"a": iter([9, 1, 3]), "b": iter([9, 5, 8])}
    monkeypatch.setattr(timing, "now", lambda device: clock[0])

    def call(name):
        order.append(name)
        clock[0] += next(durations[name])
    calls = {"a": lambda: call("a"), "b": lambda: call("b")}
    ms = timing.time_in_turns(calls, 2, "cpu")
    assert "".join(order) == "abbaab"
    assert ms == {"a": {"median": 2, "low": 1, "high": 3},
                  "b": {"median": 6.5, "low": 5, "high": 8}}


def test_only_the_device_that_is_timed_is_waited_for(monkeypatch):
    """A bug once: with --device cpu, a question to CUDA opened a context on the first GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    timing.now("cpu")
    timing.now(torch.device("cpu"))
    assert asked == []
    timing.now("cuda:1")
    assert asked == ["cuda:1"]


def test_memory_is_the_most_that_a_call_holds_at_once():
    def call():
        first = torch.zeros(2 ** 20)
        del first
        torch.zeros(2 ** 19)
    assert timing.extra_memory(call, torch.device("cpu")) == 4 * 2 ** 20
    assert timing.extra_memory(lambda: None, torch.device("cpu")) == 0


def test_the_model_at_hand_is_timed_and_the_result_is_the_last_line(tmp_path, capsys):
    bench.main(["--smoke", "--layer", "0,2", "--ratio", "0.5", "--method", "grid,scope", "--json",
                "--device", "cpu", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    rows = {row["name"]: row for row in result["speed"]}
    assert list(rows) == ["unpruned", "none at layer 0", "grid at layer 0", "scope at layer 0",
                          "none at layer 2", "grid at layer 2", "scope at layer 2"]
    assert all(any(line.startswith(f"| {name} |") for line in lines) for name in rows)
    cost = {name: row["gflops"] for name, row in rows.items()}
    assert cost["none at layer 0"] < cost["grid at layer 0"] < cost["grid at layer 2"]
    assert cost["grid at layer 2"] == cost["scope at layer 2"] < cost["unpruned"]
    for row in rows.values():
        assert 0 < row["prefill_ms"]["low"] <= row["prefill_ms"]["high"]
        assert row["decode_ms"]["median"] > 0 and row["peak_bytes"] > 0
        assert (row["select_ms"] > 0) == bool(row["schedule"])


def test_the_verdict_names_the_extremes_and_what_the_flops_promise(capsys):
    def row(name, fast, fewer):
        return {"name": name, "times_as_fast": fast, "share_of_flops_ratio": fast / fewer}
    rows = [row("unpruned", 1, 1), row("none at layer 2", 4, 5), row("grid at layer 2", 2.5, 3),
            row("dart at layer 2", 1.5, 3)]
    schedules = {"unpruned": (), "none at layer 2": ((2, "random", 0),),
                 "grid at layer 2": ((2, "grid", 0.9),), "dart at layer 2": ((2, "dart", 0.9),)}
    bench.print_verdicts(rows, schedules, bench.parse_arguments([]))
    assert capsys.readouterr().out == (
        "Pruning 90% at layer 2 makes prefill 1.5 (dart) to 2.5 (grid) times as fast, 0.50 (dart) "
        "to 0.83 (grid) of what the FLOPs promise; dropping everything makes it 4.0 times as "
        "fast.\n")


def test_an_aim_that_is_missed_is_marked(capsys):
    table = bench.Table(small=False)
    table.add("speed", 0.9, 1.0)
    table.add("memory", 0.9, 1.0, at_most=True)
    assert [row["held"] for row in table.rows] == [False, True]
    assert capsys.readouterr().out.count("MISSED") == 1


def test_every_comparison_runs_on_tiny_shapes(tmp_path, capsys):
    """But the one with transformers, which no test may need."""
    parts = [part for part in bench.PARTS if part != "transformers"]
    bench.main(["--smoke", "--parts", ",".join(parts), "--device", "cpu", "--out", str(tmp_path)])
    capsys.readouterr()
    result = json.loads((tmp_path / "result.json").read_text())
    values = {row["what"]: row["value"] for row in result["found"]}
    assert len(values) == len(result["found"])
    assert (tmp_path / "growth.png").exists()
    assert values["sweep: share of answers that are the same"] == 1
    assert values["information: largest difference from the naive loop"] < 1e-5
    for kind in made_up.CONFIGS:                # the same model twice, on the CPU both times
        assert values[f"{kind}: difference of logits from the CPU's, share of the largest"] == 0


@pytest.mark.parametrize("flags, message", [
    ("--parts sweep --layer 3", "--layer: goes without --parts"),
    ("--made-up-layers 5", "--made-up-layers: goes with --parts"),
    ("--parts nothing", "--parts: unknown 'nothing'; want some of transformers"),
    ("--schedule random@2:0.5 --ratio 0.5", "--schedule: stands for --method, --layer and --ratio"),
    ("--method info", "info: what it needs is measured in other runs"),
    ("--method dart --layer 0", "dart reads the layer before"),
    ("--layer 24", "layer 24 is out of range; this model has layers 0 to 23")])
def test_a_flag_that_cannot_be_used_is_named(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        bench.main([*flags.split(), "--out", str(tmp_path)])
