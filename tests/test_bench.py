"""bench.py: what is measured is what it says, for the model at hand and for a published shape."""
import json
from dataclasses import replace

import pytest
import torch

import bench
import model_llava
import model_qwen
import model_qwen3
from support import timing
from support.checkpoint import load_model
from support.files import read_image
from support.run import ROOT
from tokprune import InputError, prefill, visual_tokens

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "depth": 2}
SMALL = {                                   # instead of 7B width
    "llava-7b": (TEXT | {"num_key_value_heads": 0, "head_dim": 0},
                 {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
                  "num_hidden_layers": 3}),
    "qwen-7b": (TEXT | {"num_key_value_heads": 2, "mrope_section": (2, 3, 3)},
                VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [1]}),
    "qwen3-8b": (TEXT | {"num_key_value_heads": 2, "head_dim": 16, "mrope_section": (2, 3, 3)},
                 VISION | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]})}


@pytest.fixture
def small_shapes(monkeypatch):
    for name, (text, vision) in SMALL.items():
        model_class, config = bench.SHAPES[name]
        config = replace(config, text=replace(config.text, **text),
                         vision=replace(config.vision, **vision))
        monkeypatch.setitem(bench.SHAPES, name, (model_class, config))


def run(tmp_path, *flags) -> dict:
    bench.main([*flags, "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)])
    return json.loads((tmp_path / "result.json").read_text())


# ---- the clock, memory, rates --------------------------------------------------------------------

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


def test_the_floor_of_a_layer_is_its_flops_or_its_weights():
    """By hand, at 10 FLOPs and 4 bytes a second: 50 FLOPs take 5 s, longer than 8 bytes; 8 bytes
    take 2 s, longer than 10 FLOPs."""
    assert timing.floor_ms([50, 10], [8, 8], rate=10, bandwidth=4) == 7000


def test_the_matrix_rate_is_of_random_numbers(monkeypatch):
    """A bug once: a GPU multiplies matrices of ones faster, so that every share came out too low.
    """
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn",
                        lambda *shape, **kind: drawn.append(shape) or randn(8, 8, **kind))
    timing.matrix_rate(torch.zeros(1), rounds=1)
    assert drawn == [(2048, 2048)]


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_the_cache_takes_the_bytes_of_the_formula_under_every_method(name):
    """Whole storages are counted: a view that kept pruned rows alive would show."""
    model = load_model(ROOT / "tiny" / name, "cpu", torch.float32)
    text = model.config.text
    stream = model.begin(read_image(bench.PICTURE), bench.QUESTION)
    text_rows = stream.x.shape[1] - stream.N
    for method in bench.TIMED:
        schedule = [(2, method, 0.5), (10, method, 3)]
        rows = [text_rows + V for V in visual_tokens(schedule, stream.N, model.num_layers)]
        of_a_row = 2 * text.num_key_value_heads * text.head_dim * 4
        assert timing.cache_bytes(prefill(model, stream, schedule)) == sum(rows) * of_a_row, method


# ---- the program ---------------------------------------------------------------------------------

def test_the_model_at_hand_is_timed_and_the_result_is_the_last_line(tmp_path, capsys):
    result = run(tmp_path, "--layer", "0,2", "--ratio", "0.5", "--method", "grid,scope", "--json")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
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
        assert row["share_of_floor"] > 0.999 * row["share_of_matrix_rate"] > 0
        assert (row["select_ms"] > 0) == bool(row["schedule"])


def test_the_verdict_names_the_extremes_and_a_gpu_is_judged_by_its_floor(capsys):
    def row(name, fast, share, floor):
        return {"name": name, "schedule": "", "times_as_fast": fast, "share_of_flops_ratio": share,
                "share_of_floor": floor}
    rows = [row("unpruned", 1, 1, 0.6), row("none at layer 2", 4, 0.8, 0.3),
            row("grid at layer 2", 2.5, 0.83, 0.5), row("dart at layer 2", 1.5, 0.5, 0.4)]
    schedules = {"unpruned": (), "none at layer 2": ((2, "none", 0),),
                 "grid at layer 2": ((2, "grid", 0.9),), "dart at layer 2": ((2, "dart", 0.9),)}
    bench.print_verdicts(rows, schedules, on_gpu=False)
    assert capsys.readouterr().out == (
        "Pruning 90% at layer 2 makes prefill 1.5 (dart) to 2.5 (grid) times as fast, 0.50 (dart) "
        "to 0.83 (grid) of what the FLOPs promise; dropping everything makes it 4.0 times as "
        "fast.\n")
    bench.print_verdicts(rows, schedules, on_gpu=True)
    assert "0.40 (dart) to 0.50 (grid) of what its FLOPs and weights" in capsys.readouterr().out


@pytest.mark.parametrize("name, module", [
    ("llava-7b", model_llava), ("qwen-7b", model_qwen), ("qwen3-8b", model_qwen3)])
def test_a_shape_is_timed_without_a_checkpoint(name, module, tmp_path, small_shapes, capsys):
    result = run(tmp_path, "--shape", name, "--depth", "3", "--method", "grid")
    assert f"{name}, 3 layers" in capsys.readouterr().out
    assert [row["name"] for row in result["speed"]] == ["unpruned", "none at layer 2",
                                                        "grid at layer 2"]
    model = bench.made_up(name, 3, "cpu", torch.bfloat16)
    assert type(model).__module__ == module.__name__ and len(bench.layers_of(model)) == 3
    stream = model.begin(bench.noise(model), bench.QUESTION)
    assert stream.N == 24 * 24 and stream.x.dtype == torch.bfloat16
    assert stream.x.isfinite().all()


def test_together_and_one_by_one_find_the_same(tmp_path, capsys):
    found = run(tmp_path, "--sweep", "--layer", "22", "--method", "grid,fastv")["sweep"]
    assert found["sweep"]["same"] == found["sweep"]["cells"] == 4
    assert found["information"]["layers"] == 1 and found["information"]["difference"] < 1e-5


def test_transformers_computes_the_same_logits(small_shapes, capsys):
    """Where it is installed: nothing else needs it."""
    pytest.importorskip("transformers")
    for name in SMALL:
        model = bench.made_up(name, 3, "cpu", torch.float32)
        found = bench.against_transformers(model, bench.noise(model), bench.QUESTION, rounds=1)
        assert len(found["rows"]) == 5 and all(row["ratio"] > 0 for row in found["rows"])
        assert found["difference_of_logits"] < 1e-5


@pytest.mark.parametrize("flags, message", [
    ("--sweep --schedule random@2:0.5", "--sweep: goes without"),
    ("--depth 5", "--depth: goes with --shape"),
    ("--shape llava-7b --depth 33", "--depth 33: want 1 to 32, as llava-7b has"),
    ("--shape llava-7b --model tiny/qwen", "--model: goes without --shape"),
    ("--shape llava-7b --depth 2", "layer 2 is out of range; this model has layers 0 to 1"),
    ("--schedule random@2:0.5 --ratio 0.5", "--schedule: stands for --method, --layer and --ratio"),
    ("--method info", "info: what it needs is measured in other runs"),
    ("--method dart --layer 0", "dart reads the layer before"),
    ("--layer 24", "layer 24 is out of range; this model has layers 0 to 23")])
def test_a_flag_that_cannot_be_used_is_named(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        bench.main([*flags.split(), "--out", str(tmp_path)])


def test_transformers_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--against transformers: it is not installed"):
        bench.main(["--against", "transformers", "--out", str(tmp_path)])
