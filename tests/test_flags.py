"""Bad input is one line that names it, in every program; and what a shell does to a program."""
import io
import json
import os
import re
import shlex
import sys

import pytest
from checkpoints import copy_of

import bench
import demo
import eval as evaluation
import information
import plan
from support import flags, run
from support.benchmarks import load_benchmark
from tokprune import InputError

PROGRAMS = {"bench.py": bench, "demo.py": demo, "eval.py": evaluation,
            "information.py": information, "plan.py": plan}
ROOT = run.ROOT
QWEN = "--model tests/golden/qwen_tied"

# of eval.py, where no program is named
BAD_INPUT = [
    # layers, amounts, methods
    ("--layer 24", "layer 24 is out of range; this model has layers 0 to 23"),
    ("--layer -1", "layer -1 is out of range"),
    ("--layer x", "--layer x: want layers as 20 or 2,10,20 or all"),
    ("--layer " + 5000 * "9", "want layers as 20"),
    ("--ratio 1.1", "--ratio: 1.1, want 0 to 1"),
    ("--ratio nan", "--ratio: nan"),
    ("--ratio x", "--ratio: x"),
    ("--method magic", "unknown method 'magic'; want one of none, random, grid"),
    ("--method fastv --layer 0", "fastv reads the layer before"),
    ("--seeds 0", "--seeds: 0"),
    ("--seed 1000000000000", "--seed: 1000000000000"),
    (f"{QWEN} --layer 1 --method grid --bench mme --limit 1 --positions compact",
     "positions compact"),
    # schedules
    ("--schedule ''", "--schedule: empty"),
    ("--schedule random@2=" + 5000 * "9", "does not parse"),
    ("--schedule random@99=1", "layer 99 is out of range"),
    ("--layer 3 --schedule random@3=1", "want it or them"),
    # the model
    ("--model nowhere", "nowhere: no such folder"),
    ("--model tests", "config.json: not found"),
    ("--device tpu", "--device tpu: not usable here"),
    ("--device meta", "--device meta: not usable here"),
    ("--device cuda:99", "--device cuda:99: not usable here"),
    ("--dtype int3", "--dtype"),
    ("--min-pixels 5000", "min_pixels is 5000"),
    (f"{QWEN} --layer 1 --min-pixels 5000 --max-pixels 4000", "min_pixels is 5000"),
    ("--max-new-tokens 0", "--max-new-tokens: 0"),
    ("--repetition-penalty 0", "--repetition-penalty: 0"),
    # the questions
    ("--bench vqa", "unknown benchmark 'vqa'; want one of mme, textvqa, scienceqa, pope or a "
                    ".jsonl"),
    ("--bench mme,mme", "two of one name"),
    ("--bench nowhere.jsonl", "nowhere.jsonl: not found"),
    ("--bench scienceqa", "no scienceqa found"),
    ("--data nowhere", "--data nowhere"),
    ("--limit 0", "--limit: 0, want 1 or more"),
    ("--limit x", "--limit: x"),
    ("--prompt-style llava", "there is no TextVQA_Rosetta_OCR"),
    # files
    ("--plot curve.png", "--plot curve.png: want a .svg"),
    ("--plot no/where.svg", "--plot no/where.svg"),
    ("--plot curve.svg --schedule dart@2=9", "--plot: draws score against layer"),
    ("--out /proc/nowhere", "--out /proc/nowhere: cannot be written"),
    ("--out README.md", "--out README.md: cannot be written"),
    # the other programs
    ("information.py --layer 1,99", "layer 99 is out of range"),
    ("information.py --mode both", "--mode"),
    ("information.py --tolerance 2", "--tolerance: 2"),
    ("information.py --ratio 0.5", "--ratio: no such flag"),
    ("information.py --plot curve.gif", "--plot curve.gif: want a .svg"),
    ("demo.py --image nowhere.png --question x", "nowhere.png: not found; want an image"),
    ("demo.py --image README.md --question x", "cannot be read as an image"),
    ("demo.py --image HALF --question x", "half.jpg: cannot be read as an image"),
    ("demo.py --image cat.jpg", "--image: needs --question"),
    ("demo.py --method info", "--method info: it needs the gold answer"),
    ("demo.py --method best", "unknown method 'best'"),
    ("demo.py --layer 0 --method fastv", "fastv reads the layer before"),
    ("demo.py --layer 99", "layer 99 is out of range"),
    ("demo.py --question ' '", "--question: is empty"),
    ("demo.py --question caf\udce9", "--question and --answer: holds half a character: 'caf"),
    ("bench.py --rounds 0", "--rounds: 0"),
    ("plan.py --loss 1", "--loss: 1, want more than 0 and less than 1"),
]


@pytest.mark.parametrize("command, message", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    half = tmp_path / "half.jpg"
    half.write_bytes(demo.PICTURE.read_bytes()[:999])
    words = shlex.split(command.replace("HALF", str(half)))
    program = PROGRAMS[words.pop(0)] if words[0] in PROGRAMS else evaluation
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=re.escape(message)) as e:
        program.main(words)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("flag, said", [
    ("--layers", "did you mean --layer?"), ("--ration=0.5", "did you mean --ratio?"),
    ("--lim", "did you mean --limit?"),                 # would work today and mean --limes tomorrow
    ("--zzzz", "see eval.py --help"), ("20", "see eval.py --help")])
def test_a_flag_that_does_not_exist_is_answered_with_the_nearest(flag, said):
    with pytest.raises(InputError) as e:
        evaluation.main([flag, "3"])
    assert str(e.value) == f"{flag.split('=')[0]}: no such flag; {said}"


def test_information_asks_a_hundred_questions_unless_told():
    assert evaluation.parse_arguments([]).limit is None
    assert information.parse_arguments([]).limit == 100
    assert information.parse_arguments(["--limit", "all"]).limit is None


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_a_screen_and_says_what_every_flag_is_for(name, capsys):
    with pytest.raises(SystemExit) as e:
        PROGRAMS[name].main(["--help"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: {name} [flags]"
    assert len(lines) <= 45 and max(map(len, lines)) <= 150
    shown = [line for line in lines if line.startswith("  --")]
    assert len(shown) >= 8
    for flag in shown:
        assert re.search(r"\S  +\S", flag) or len(flag) >= 36, f"{flag} has no help"


def test_a_device_gets_the_number_that_torch_wants(monkeypatch):
    """torch.cuda.set_device("cuda") is an error; with torchrun every process has its own GPU."""
    chosen = []
    monkeypatch.setattr(flags.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flags.torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(flags.torch, "empty", lambda *_, **__: None)
    for name in (None, "cuda", "cuda:0", "cuda:1"):
        flags.usable_device(name)
    monkeypatch.setattr(flags, "WORLD", 8)
    monkeypatch.setattr(flags, "LOCAL_RANK", 5)
    assert flags.usable_device("cuda") == "cuda:5"
    assert chosen == ["cuda:0", "cuda:0", "cuda:0", "cuda:1", "cuda:5"]
    with pytest.raises(InputError, match="all 8 processes would share this one card"):
        flags.usable_device("cuda:1")


@pytest.mark.parametrize("names, want", [
    ("one.jsonl,UP.JSONL", ["one.jsonl", "UP.JSONL"]), ("a, b.jsonl", ["a, b.jsonl"])])
def test_a_file_of_questions_may_have_a_comma_or_capitals_in_its_name(names, want, tmp_path,
                                                                       monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in want:
        entry = {"id": "1", "image": str(demo.PICTURE), "question": "?"}
        (tmp_path / name).write_text(json.dumps(entry) + "\n")
    args = evaluation.parse_arguments(["--bench", names])
    assert list(flags.load_data(args, gold=False)) == want


@pytest.mark.parametrize("asked, said", [
    ({}, "penalty 1.5 (the folder's is 1)"), ({"repetition_penalty": 1.5}, "penalty 1.5"),
    ({"repetition_penalty": 1.05}, "penalty 1.5 (the folder's is 1.05)")])
def test_a_run_says_if_the_folder_asks_for_another_repetition_penalty(asked, said, tmp_path):
    folder = copy_of("qwen_tied", tmp_path, generation_config=asked)
    args = evaluation.parse_arguments(["--model", str(folder), "--repetition-penalty", "1.5"])
    assert flags.penalty(args) == f"repetition {said}"


def test_a_command_repeats_the_flags_that_are_not_plain():
    """plan.py's line for eval.py scored the built-in benchmark where --data named another."""
    args = plan.parse_arguments(["--data", "my data", "--max-pixels", "9", "--loss", "0.2"])
    found = flags.repeated(args, plan.parse_arguments([]), "model", "max_pixels", "data")
    assert found == ["--max-pixels", "9", "--data", "my data"]


def test_questions_are_drawn_by_seed_in_whole_images():
    """mme asks two questions of an image."""
    known = load_benchmark("mme", ROOT / "tiny")
    drawn, other = (flags.sample(known, 5, seed) for seed in (0, 1))
    assert len(drawn) == 6 and drawn == [question for question in known if question in drawn]
    assert len({question.image for question in drawn}) == 3 and drawn != other
    assert flags.sample(known, 5, 0) == drawn and flags.sample(known, None, 0) == known


# ---- from start to exit code ---------------------------------------------------------------------

@pytest.mark.parametrize("error, message", [
    (InputError("--layer x: want a number"), "--layer x: want a number"),
    (KeyboardInterrupt(), "interrupted; what was answered is kept"),
    (MemoryError(), "memory ran out (MemoryError)"),
    (PermissionError(13, "Permission denied", "/root/hub"),
     "/root/hub: cannot be read or written (Permission denied)"),
    (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore"),
     "memory ran out (CUDA out of memory. Tried to allocate 9 GiB)\n"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "memory ran out (CUDA error: CUBLAS"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
     "memory ran out (DefaultCPUAllocator: can't allocate memory: you tried")])
def test_what_ends_a_program_is_said_in_one_line(error, message, started, capsys):
    def main(argv):
        raise error
    assert started(main) == 2
    said = capsys.readouterr().err
    assert said.startswith("eval.py: error: ") and message in said and said.count("\n") == 1


def test_a_mistake_in_the_program_keeps_its_traceback(started):
    def main(argv):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        started(main)


def test_an_error_leaves_with_code_2_and_one_line_on_a_console_without_its_letters(
        started, capsys, monkeypatch):
    """A console of Windows or of LANG=C has no letter for much: UnicodeEncodeError, a traceback."""
    console = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
    monkeypatch.setattr(sys, "stderr", console)
    assert started(evaluation.main, "--bench", "猫.jsonl") == 2
    console.flush()
    said = console.buffer.getvalue()
    assert said.startswith(b"eval.py: error: \\u732b.jsonl: not found") and said.count(b"\n") == 1
    assert capsys.readouterr().out == ""


def test_a_table_prints_on_such_a_console_and_a_pipe_may_close(started, tmp_path, monkeypatch):
    """The table has a plus-minus sign. `eval.py | head -1` ends quietly."""
    argv = ["--schedule", "none@0", "--limit", "1", "--bench", "mme", "--out", tmp_path]
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert started(evaluation.main, *argv) == 0
    assert b"| mme | score | \\xb1 | perception |" in console.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert started(evaluation.main, *argv) == 128 + 13
    monkeypatch.setattr(sys, "stdout", None)            # closed: >&-
    assert started(evaluation.main, *argv) == 0
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
        assert started(evaluation.main, *argv) == 2
