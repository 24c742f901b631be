"""What ends a run, or shares it among processes, changes nothing of what it finds."""
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import eval as evaluation
from kill_and_resume import kill_and_resume, tables, timeless
from support import records, runs
from support.benchmarks import load_benchmark
from tokprune import InputError

ROOT = runs.ROOT
FLAGS = ["--method", "dart", "--seeds", "2", "--limit", "4"]
MME = [*FLAGS, "--bench", "mme"]


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """A run that nobody disturbed: (its tables, its result, its folder)."""
    out = tmp_path_factory.mktemp("alone")
    printed, result = run(evaluation.main, *FLAGS, out=out)
    return tables(printed), result, out


def of_benchmark(file, benchmark):
    return [record for record in timeless(file) if record["benchmark"] == benchmark]


# ---- several processes ---------------------------------------------------------------------------

def torchrun(processes, program, flags, out):
    """-> exit code, stdout, stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), program, *flags, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_dies_ends_the_run_and_others_find_the_same_as_one(tmp_path, alone):
    """The second of two is killed at its first answer, and three processes go on."""
    want, _, folder = alone
    dying = tmp_path / "dying.py"
    dying.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import eval as evaluation
from support import records, runs
append = records.append
def append_and_die(file, record):
    append(file, record)
    if records.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
records.append = append_and_die
runs.start(evaluation.main)
""")
    out = tmp_path / "out"
    code, _, said = torchrun(2, dying, FLAGS, out)
    assert code != 0 and f"dying.py: error: {records.DIED}" in said
    assert 1 <= sum(len(timeless(file)) for file in out.glob("answers*.jsonl"))
    code, printed, said = torchrun(3, ROOT / "eval.py", FLAGS, out)
    assert code == 0, said
    assert tables(printed) == want
    assert timeless(out / "answers.jsonl") == timeless(folder / "answers.jsonl")
    assert json.loads((out / "result.json").read_text())["processes"] == 3
    names = {path.name for path in out.iterdir()}
    assert names == {"answers.jsonl", "result.json", "settings.json"}


# ---- what ends a run -----------------------------------------------------------------------------

def test_killed_while_it_answers_and_resumed_nothing_is_different(tmp_path, alone):
    want, _, folder = alone
    undisturbed = want, timeless(folder / "answers.jsonl")
    killed, same = kill_and_resume(1, FLAGS, seed=1, folder=tmp_path, want=undisturbed)
    assert same and killed == 1


def test_a_stopped_run_says_so_in_one_line(tmp_path):
    """Started as torchrun starts a single process."""
    alone = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    command = [sys.executable, ROOT / "eval.py", "--method", "random", "--out", tmp_path]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           env=os.environ | alone)
    file = tmp_path / "answers.jsonl"
    while run.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.02)
    run.terminate()
    _, said = run.communicate()
    assert said == ("eval.py: error: stopped by a signal; what was answered is kept, and the same "
                    "command goes on\n")
    assert run.returncode == 2


def test_a_run_goes_on_where_it_stood_and_refuses_other_settings(run, tmp_path, alone, monkeypatch):
    """Cut off in the middle of the third record; copies that lie about are left alone."""
    want, result, folder = alone
    whole = (folder / "answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    (out / "answers.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    copy = whole.replace(b'"unpruned": 1.0', b'"unpruned": 0.0')
    for name in ("answers_old.jsonl", "answers-backup.jsonl"):
        (out / name).write_bytes(copy)
    asked = []
    original = evaluation.answer_cells

    def answer_cells(model, stream, question, *rest):
        asked.append(question.id)
        return original(model, stream, question, *rest)
    monkeypatch.setattr(evaluation, "answer_cells", answer_cells)
    printed, again = run(evaluation.main, *FLAGS, out=out)
    assert len(asked) == len(lines) - 2 and tables(printed) == want
    assert again["benchmarks"] == result["benchmarks"]
    assert timeless(out / "answers.jsonl") == timeless(folder / "answers.jsonl")
    assert (out / "answers_old.jsonl").read_bytes() == copy
    with pytest.raises(InputError, match="other settings: positions is 'keep', this run's is "
                                         "'compact'"):
        evaluation.main([*FLAGS, "--positions", "compact", "--out", str(out)])
    (out / "settings.json").unlink()
    with pytest.raises(InputError, match="settings.json: not found"):
        evaluation.main([*FLAGS, "--out", str(out)])


def test_two_runs_do_not_write_to_one_folder(tmp_path, monkeypatch):
    """The lock goes with its process, however that ends."""
    hold = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path; from support import runs
runs.hold(Path({str(tmp_path)!r})); print("held", flush=True); sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    args = SimpleNamespace(out=tmp_path)
    with pytest.raises(InputError, match="another run is writing there"):
        runs.open_folder(args, {})
    other.kill()
    other.communicate()
    assert runs.open_folder(args, {}) == tmp_path

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")
    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    assert runs.open_folder(args, {}) == tmp_path


def test_a_full_disk_ends_with_one_line_and_what_was_answered_stays(tmp_path, alone):
    """A file may grow to three records' size and no further."""
    want, _, folder = alone
    whole = (folder / "answers.jsonl").read_bytes()
    room = sum(len(line) + 1 for line in whole.split(b"\n")[:3]) + 20
    argv = [*FLAGS, "--out", str(tmp_path)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(InputError) as e:
            evaluation.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = os.strerror(errno.EFBIG)
    assert f"{tmp_path / 'answers.jsonl'}: cannot be written ({reason})" in str(e.value)
    kept = records.read_records(tmp_path / "answers.jsonl")
    assert 1 <= len(kept) <= 3
    assert [record["id"] for record in kept] == [
        record["id"] for record in timeless(folder / "answers.jsonl")[:len(kept)]]


def test_a_truncated_image_is_named_and_the_answers_before_it_are_kept(tmp_path):
    data = tmp_path / "OCR"
    data.mkdir()
    for i in range(5):
        Image.new("RGB", (112, 112), (40 * i, 90, 90)).save(data / f"{i}.jpg")
        (data / f"{i}.txt").write_text("Is it red? Please answer yes or no.\tYes\n"
                                       "Is it blue? Please answer yes or no.\tNo\n")
    bad = data / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:-40])         # its header is right
    argv = ["--data", str(tmp_path), "--bench", "mme", "--schedule", "random@0=0", "--out",
            str(tmp_path / "out")]
    with pytest.raises(InputError, match=re.escape(f"{bad}: cannot be read as an image")):
        evaluation.main(argv)
    ids = [record["id"] for record in timeless(tmp_path / "out" / "answers.jsonl")]
    assert ids == [f"OCR/{i}/{j}" for i in range(3) for j in range(2)]


# ---- want of memory ------------------------------------------------------------------------------

def test_a_question_that_memory_is_too_small_for_is_failed_and_the_others_go_on(
        run, tmp_path, monkeypatch, alone, capsys):
    """One while it is answered, one while its image is read: scored 0 in every row, named, counted,
    and asked again by the same command."""
    want = of_benchmark(alone[2] / "answers.jsonl", "mme")
    answered = evaluation.answer_cells
    read = evaluation.read_image

    def answer_cells(model, stream, question, *rest):
        if question.id == want[0]["id"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answered(model, stream, question, *rest)
    reads = []

    def read_image(file):
        reads.append(file)
        if len(reads) == len(want):
            raise MemoryError
        return read(file)
    monkeypatch.setattr(evaluation, "answer_cells", answer_cells)
    monkeypatch.setattr(evaluation, "read_image", read_image)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    printed, result = run(evaluation.main, *MME, "--workers", 1, out=tmp_path)
    said = capsys.readouterr().err
    for record in (want[0], want[-1]):
        assert f"eval.py: mme {record['id']}: out of memory, failed" in said
    assert "mme, failed answers: unpruned 2" in printed and result["failed"] == 2
    assert {row["failed"] for row in result["benchmarks"]["mme"]} == {2}
    lost = 100 * sum(want[i]["scores"]["unpruned"] for i in (0, -1)) / len(want)
    whole = alone[1]["benchmarks"]["mme"][0]["score"]
    assert result["benchmarks"]["mme"][0]["score"] == pytest.approx(whole - lost)
    monkeypatch.undo()
    assert evaluation.main([*MME, "--out", str(tmp_path)]) == 0
    assert timeless(tmp_path / "answers.jsonl") == want


def test_a_run_without_memory_for_any_question_is_refused(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError
    monkeypatch.setattr(evaluation, "answer_cells", fails)
    with pytest.raises(InputError, match="mme: memory ran out on every question"):
        evaluation.main([*MME, "--out", str(tmp_path)])


# ---- what a run says of itself -------------------------------------------------------------------

def test_the_result_says_where_it_comes_from(alone):
    _, result, _ = alone
    assert result["packages"]["torch"] == torch.__version__ and result["python"]
    assert (result["device"], result["dtype"], result["processes"]) == ("cpu", "float32", 1)
    assert len(result["config_sha256"]) == len(result["data_sha256"]["mme"]["sha256"]) == 64
    assert list(result["shard_headers_sha256"]) == ["model.safetensors"]
    assert result["data_sha256"]["mme"]["files"] == 200
    if (ROOT / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        assert result["commit"].startswith(head)
    assert result["command"].startswith("eval.py --method dart --seeds 2")
    assert result["prompts"]["mme"].endswith("using a single word or phrase. ASSISTANT:")
    for rows in result["benchmarks"].values():
        assert all({"schedule", "empty", "unparsed", "failed"} <= row.keys() for row in rows)


def test_questions_are_drawn_by_seed_in_whole_images():
    """mme asks two questions of an image."""
    known = load_benchmark("mme", ROOT / "tiny")
    chosen = {}
    for seed in (0, 1):
        drawn = runs.sample(known, 5, seed)
        assert len(drawn) == 6 and drawn == [q for q in known if q in drawn]
        assert len({question.image for question in drawn}) == 3
        chosen[seed] = {question.id for question in drawn}
    assert chosen[0] != chosen[1]
    assert runs.sample(known, 5, 1) == drawn and runs.sample(known, None, 0) == known


def test_another_method_under_the_same_name_is_not_taken_for_the_old_one(tmp_path, monkeypatch):
    """The settings of a run, and so its default folder, depend on the code and the questions."""
    args = evaluation.parse_arguments([])
    model = runs.load_model(args)
    questions = load_benchmark("mme", ROOT / "tiny")
    before = runs.settings_of(args, model, {"mme": questions})
    assert runs.settings_of(args, model, {"mme": questions}) == before
    fewer = runs.settings_of(args, model, {"mme": questions[1:]})
    assert fewer["questions"] != before["questions"] and fewer["code"] == before["code"]
    (tmp_path / "support").mkdir()
    (tmp_path / "tokprune.py").write_text((ROOT / "tokprune.py").read_text() + "\n")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    after = runs.settings_of(args, model, {"mme": questions})
    assert after["code"] != before["code"] and after["checkpoint"] == before["checkpoint"]
    monkeypatch.chdir(tmp_path)
    assert runs.open_folder(args, before) != runs.open_folder(args, after)
