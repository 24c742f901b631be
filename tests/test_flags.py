"""Bad input is one line that names it, in every program; and what a shell does to a program."""
import re
import shlex
import subprocess
import sys

import pytest

import bench
import demo
import eval as evaluation
import information
from support import runs
from tokprune import InputError

PROGRAMS = {"bench.py": bench, "demo.py": demo, "eval.py": evaluation,
            "information.py": information}
ROOT = runs.ROOT
QWEN = "--model tests/golden/qwen_tied"

# of eval.py, where no program is named
BAD_INPUT = [
    # layers, amounts, methods
    ("--layer 24", "layer 24 is out of range; this model has layers 0 to 23"),
    ("--layer -1", "layer -1 is out of range"),
    ("--layer x", "--layer x: want layers as 20 or 2,10,20 or all or horizon"),
    ("--layer " + 5000 * "9", "want layers as 20"),
    ("--schedule random@2=" + 5000 * "9", "does not parse"),
    ("--limit " + 5000 * "9", "want 1 or more"),
    ("--layer 1.5", "--layer 1.5"),
    ("--ratio 1.1", "--ratio: 1.1, want 0 to 1"),
    ("--ratio nan", "--ratio: nan"),
    ("--ratio x", "--ratio: x"),
    ("--method ''", "unknown method ''"),
    ("--method magic", "unknown method 'magic'; want one of random, grid, fastv"),
    ("--method fastv --layer 0", "fastv reads the layer before"),
    ("--seeds 0", "--seeds: 0"),
    ("--seed 1000000000000", "--seed: 1000000000000"),
    (f"{QWEN} --layer 1 --positions compact --limit 1", "positions compact"),
    # schedules and budgets
    ("--schedule ''", "--schedule: empty"),
    ("--schedule dart@2", "does not parse"),
    ("--schedule dart@horizon3:0.5", "does not parse"),
    ("--schedule fastv@0:0.5", "cannot act at layer 0"),
    ("--schedule random@99=1", "layer 99 is out of range"),
    ("--layer 3 --schedule random@3=1", "want it or them"),
    ("--budget 1/0", "--budget 1/0"),
    ("--budget 2", "--budget 2: want more than 0"),
    ("--budget 1/3 --ratio 0.5", "--budget: takes"),
    ("--budget 1/3 --layer 2,3", "--budget: takes"),
    ("--budget 1/3 --method magic", "unknown method"),
    ("--budget 1/3 --layer 24", "out of range"),
    ("--budget 1/3 --layer 2", "layer 2: random cannot follow dart, which starts at layer 2"),
    ("--budget 1/500 --layer 20", "budget 0.002 does not fit"),
    ("--budget 1/2 --method divprune --layer 5", "budget 0.5 does not fit divprune"),
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
    ("--workers 0", "--workers: 0"),
    ("--prompt-style other", "--prompt-style"),
    ("--prompt-style llava", "there is no TextVQA_Rosetta_OCR"),
    # measuring
    ("--layer horizon --calibrate 5000 --bench mme", "--calibrate: 5000"),
    ("--tolerance 2", "--tolerance: 2"),
    ("--threshold -1", "--threshold: -1"),
    ("--window 0", "--window: 0"),
    ("--max-batch-tokens 0", "--max-batch-tokens: 0"),
    ("--answers mine", "--answers"),
    # files
    ("--plot curve.gif", "--plot curve.gif"),
    ("--plot no/where.png", "--plot no/where.png"),
    ("--plot curve.png --schedule dart@2=9", "--plot: draws score against layer"),
    ("--plot curve.png --budget 1/3", "--plot: draws score against layer"),
    ("--plot /proc/x.png --layer 20,21 --limit 2 --method random --bench mme",
     "/proc/x.png: cannot be written"),
    ("--out /proc/nowhere", "--out /proc/nowhere: cannot be written"),
    ("--out README.md", "--out README.md: cannot be written"),
    # the other programs
    ("information.py --layer 1,99", "layer 99 is out of range"),
    ("information.py --layer horizon", "--layer horizon: want layers as 20"),
    ("information.py --mode both", "--mode"),
    ("information.py --agreement", "want --layer 1 or later"),
    ("information.py --ratio 0.5", "--ratio: no such flag"),
    ("information.py --plot curve.gif", "--plot curve.gif"),
    ("demo.py --image nowhere.png --question x", "nowhere.png: not found; want an image"),
    ("demo.py --image README.md --question x", "cannot be read as an image"),
    ("demo.py --image HALF --question x", "half.jpg: cannot be read as an image"),
    ("demo.py --image cat.jpg", "--image: needs --question"),
    ("demo.py --method info", "--method info: it needs the gold answer"),
    ("demo.py --layer 99", "layer 99 is out of range"),
    ("demo.py --question ''", "--question: is empty"),
    ("bench.py --rounds 0", "--rounds: 0"),
    ("bench.py --method hindsight", "hindsight"),
    ("bench.py --parts nothing", "nothing"),
]


@pytest.fixture
def half_a_picture(tmp_path):
    whole = demo.PICTURE.read_bytes()
    file = tmp_path / "half.jpg"
    file.write_bytes(whole[:len(whole) // 2])
    return file


@pytest.mark.parametrize("command, message", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(command, message, half_a_picture, tmp_path,
                                             monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("HALF", str(half_a_picture)))
    program = evaluation
    if words[0] in PROGRAMS:
        program = PROGRAMS[words.pop(0)]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    if program in (evaluation, information) and "--limit" not in words:
        words += ["--limit", "1"]                       # quick, even where it is not refused
    with pytest.raises(InputError, match=re.escape(message)) as e:
        program.main(words)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("flag, near", [("--layers", "--layer"), ("--ration=0.5", "--ratio"),
                                        ("--bnech", "--bench"), ("--schedules", "--schedule")])
def test_a_flag_that_does_not_exist_is_answered_with_the_nearest(flag, near):
    name = flag.split("=")[0]
    with pytest.raises(InputError) as e:
        evaluation.main([flag, "3"])
    assert str(e.value) == f"{name}: no such flag; did you mean {near}?"


def test_a_flag_like_no_other_is_sent_to_the_help():
    with pytest.raises(InputError, match="^--zzzz: no such flag; see eval.py --help$"):
        evaluation.main(["--zzzz"])
    with pytest.raises(InputError, match="^20: no such flag"):
        evaluation.main(["20"])


def test_no_flag_is_taken_for_a_longer_one():
    """--lim for --limit would work today and mean --limes tomorrow."""
    with pytest.raises(InputError, match="--lim: no such flag; did you mean --limit?"):
        evaluation.main(["--lim", "3"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_a_screen_and_says_what_every_flag_is_for(name, capsys):
    with pytest.raises(SystemExit) as e:
        PROGRAMS[name].main(["--help"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: {name} [flags]"
    assert len(lines) < 50 and max(map(len, lines)) <= 150
    flags = [line for line in lines if line.startswith("  --")]
    assert len(flags) >= 8
    for flag in flags:
        assert re.search(r"\S  +\S", flag) or len(flag) >= 36, f"{flag} has no help"


def test_a_device_gets_the_number_that_torch_wants(monkeypatch):
    """torch.cuda.set_device("cuda") is an error; with torchrun every process has its own GPU."""
    chosen = []
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs.torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(runs.torch, "empty", lambda *_, **__: None)
    for name in (None, "cuda", "cuda:0", "cuda:1"):
        runs.usable_device(name)
    monkeypatch.setattr(runs, "WORLD", 8)
    monkeypatch.setattr(runs, "LOCAL_RANK", 5)
    assert runs.usable_device("cuda") == "cuda:5"
    assert chosen == ["cuda:0", "cuda:0", "cuda:0", "cuda:1", "cuda:5"]
    with pytest.raises(InputError, match="all 8 processes would share this one card"):
        runs.usable_device("cuda:1")


# ---- processes -----------------------------------------------------------------------------------

def test_an_error_leaves_with_code_2_one_line_and_no_traceback():
    done = subprocess.run([sys.executable, "eval.py", "--layer", "99"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "eval.py: error: layer 99 is out of range; this model has layers 0 to " \
                          "23\n"


def test_a_pipe_that_nobody_reads_on_ends_the_program_quietly(tmp_path):
    """As in `eval.py | head -1`."""
    flags = ["--method", "random", "--seeds", "1", "--limit", "1", "--bench", "mme", "--json"]
    run = subprocess.Popen([sys.executable, ROOT / "eval.py", *flags, "--out", tmp_path],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 128 + 13


@pytest.mark.parametrize("error, message", [
    (InputError("--layer x: want a number"), "--layer x: want a number"),
    (KeyboardInterrupt(), "interrupted; what was answered is kept"),
    (MemoryError(), "memory ran out (MemoryError)"),
    (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore"),
     "memory ran out (CUDA out of memory. Tried to allocate 9 GiB)\n")])
def test_what_ends_a_program_is_said_in_one_line(error, message, monkeypatch, capsys):
    def main(argv):
        raise error
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        runs.start(main)
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("eval.py: error: ") and message in said and said.count("\n") == 1


def test_questions_that_failed_make_the_exit_code_1_and_other_errors_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        runs.start(lambda argv: 2)
    assert e.value.code.startswith("eval.py: error: 2 questions failed")     # printed, and code 1
    assert runs.start(lambda argv: 0) is None

    def broken(argv):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        runs.start(broken)
