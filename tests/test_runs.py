"""What ends a run, or shares it among processes and machines, changes nothing of what it finds."""
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from support import flags, run as support_run
from support.benchmarks import Question, load_benchmark
from support.run import DIED, ROOT, read_records
from tokprune import InputError

ARGV = ["--method", "dart", "--seeds", "2", "--limit", "4"]
MME = [*ARGV, "--bench", "mme"]


def tables(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|")]


def lines_in(file) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """(its tables, its result, its folder)."""
    out = tmp_path_factory.mktemp("undisturbed")
    printed, result = run(evaluation.main, *ARGV, out=out)
    return tables(printed), result, out


@pytest.fixture
def asked(monkeypatch):
    """The ids of the questions that are answered from here on."""
    seen = []
    original = evaluation.answer_questions

    def answer_questions(model, questions, *rest):
        seen.extend(question.id for question in questions)
        return original(model, questions, *rest)
    monkeypatch.setattr(evaluation, "answer_questions", answer_questions)
    return seen


# ---- several processes ---------------------------------------------------------------------------

WRAPPER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import eval as evaluation
from support import run
"""
DIES = WRAPPER + """                        # the second of two, at its first answer
append = run.append
def append_and_die(file, record):
    append(file, record)
    if run.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
run.append = append_and_die
run.start(evaluation.main)
"""
SLOW = WRAPPER + """                        # one lists files, one merges and removes, one reads
answer_files = run.answer_files
def list_and_wait(out):
    files = answer_files(out)
    time.sleep(1 if run.RANK else 0)
    return files
merge = run.merge
def wait_and_merge(*args):
    time.sleep(0.3)
    merge(*args)
run.answer_files = list_and_wait
run.merge = wait_and_merge
run.start(evaluation.main)
"""


def torchrun(program, out, *more, processes=2):
    """Start it; `finish` ends it."""
    command = [sys.executable, "-m", "torch.distributed.run", *more, "--nproc-per-node",
               str(processes), program, *ARGV, "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process) -> tuple[int, str, str]:
    """-> exit code, stdout, stderr."""
    printed, said = process.communicate(timeout=120)
    return process.returncode, printed, said


def test_a_process_that_dies_ends_the_run_and_others_find_the_same_as_one(tmp_path, undisturbed):
    """Two processes resume what the dead one and its neighbor have left. One of them lists the
    files of the next benchmark just before the other merges and removes them: once a file that was
    not found."""
    want, _, folder = undisturbed
    (tmp_path / "dies.py").write_text(DIES)
    (tmp_path / "slow.py").write_text(SLOW)
    out = tmp_path / "out"
    code, _, said = finish(torchrun(tmp_path / "dies.py", out, "--standalone"))
    assert code != 0 and f"dies.py: error: {DIED}" in said
    assert sum(len(lines_in(file)) for file in out.glob("answers*.jsonl")) >= 1
    code, printed, said = finish(torchrun(tmp_path / "slow.py", out, "--standalone"))
    assert code == 0, said
    assert tables(printed) == want
    assert lines_in(out / "answers.jsonl") == lines_in(folder / "answers.jsonl")
    assert json.loads((out / "result.json").read_text())["processes"] == 2
    names = {path.name for path in out.iterdir()}
    assert names == {"answers.jsonl", "result.json", "settings.json"}


def test_two_machines_without_a_common_disk_find_the_same_as_one(tmp_path, undisturbed, run,
                                                                 asked):
    """Two agents of torchrun, a folder each. Records pass through torch.distributed: the first has
    all of them, the second its own, from which it could resume."""
    want, _, folder = undisturbed
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = []
    for node in (0, 1):
        where = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "localhost",
                 "--master-port", str(port)]
        agents.append(torchrun(ROOT / "eval.py", tmp_path / str(node), *where, processes=1))
    (code, printed, said), (other_code, _, other_said) = map(finish, agents)
    assert (code, other_code) == (0, 0), said + other_said
    assert tables(printed) == want
    whole = lines_in(folder / "answers.jsonl")
    assert lines_in(tmp_path / "0" / "answers.jsonl") == whole
    own = lines_in(tmp_path / "1" / "answers.rank1.jsonl")
    assert 0 < len(own) < len(whole) and set(own) < set(whole)
    assert not (tmp_path / "1" / "result.json").exists()
    printed, _ = run(evaluation.main, *ARGV, out=tmp_path / "1")
    assert tables(printed) == want and len(asked) == len(whole) - len(own)


# ---- what ends a run -----------------------------------------------------------------------------

def start_eval(out, **environment):
    command = [sys.executable, ROOT / "eval.py", *ARGV, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env=os.environ | environment)
    while process.poll() is None and not lines_in(out / "answers.jsonl"):
        time.sleep(0.01)
    return process


def test_killed_while_it_answers_and_resumed_nothing_is_different(run, tmp_path, undisturbed):
    want, _, folder = undisturbed
    process = start_eval(tmp_path)
    process.kill()
    process.communicate()
    whole = lines_in(folder / "answers.jsonl")
    assert process.returncode == -signal.SIGKILL
    assert 1 <= len(lines_in(tmp_path / "answers.jsonl")) < len(whole)
    printed, _ = run(evaluation.main, *ARGV, out=tmp_path)
    assert tables(printed) == want and lines_in(tmp_path / "answers.jsonl") == whole


def test_a_stopped_run_says_so_in_one_line(tmp_path):
    """Started as torchrun starts a single process."""
    process = start_eval(tmp_path, TORCHELASTIC_RUN_ID="x", RANK="0", WORLD_SIZE="1",
                         LOCAL_RANK="0")
    process.terminate()
    _, said = process.communicate()
    assert said == ("eval.py: error: stopped by a signal; what was answered is kept, and the same "
                    "command resumes\n")
    assert process.returncode == 2


def test_a_run_resumes_behind_a_record_that_was_cut_off(run, tmp_path, undisturbed, asked):
    """Once the next record was written behind the half one, as one line that nothing could read.
    Copies that lie about are left alone."""
    want, _, folder = undisturbed
    whole = (folder / "answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    shutil.copy(folder / "settings.json", tmp_path)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    copy = whole.replace(b'"unpruned": 1.0', b'"unpruned": 0.0')
    for name in ("answers_old.jsonl", "answers-backup.jsonl"):
        (tmp_path / name).write_bytes(copy)
    printed, _ = run(evaluation.main, *ARGV, out=tmp_path)
    assert len(asked) == len(lines) - 2 and tables(printed) == want
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert (tmp_path / "answers_old.jsonl").read_bytes() == copy


def test_a_full_disk_ends_with_one_line_and_what_was_answered_stays(tmp_path, undisturbed):
    """A file may grow to three records' size and no further."""
    whole = lines_in(undisturbed[2] / "answers.jsonl")
    room = sum(len(line) + 1 for line in whole[:3]) + 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(InputError) as e:
            evaluation.main([*ARGV, "--out", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = tmp_path / "answers.jsonl"
    assert f"{file}: cannot be written ({os.strerror(errno.EFBIG)})" in str(e.value)
    kept = read_records(tmp_path, "mme").values()
    assert 1 <= len(kept) <= 3 and {json.dumps(record) for record in kept} < set(whole)


def test_questions_that_run_out_of_memory_are_named_and_asked_again(
        run, tmp_path, monkeypatch, undisturbed, asked, capsys):
    """They were scored 0, in a table that looked whole. Those of the same batch are answered and
    kept. One fails while it is answered, two while their image is read."""
    whole = [line for line in lines_in(undisturbed[2] / "answers.jsonl") if '"mme"' in line]
    first, kept, *last_two = (json.loads(line)["id"] for line in whole)
    image = {question.id: question.image for question in load_benchmark("mme", ROOT / "tiny")}
    read_image = support_run.read_image
    answer_questions = evaluation.answer_questions

    def no_memory_to_read(file):
        if file == image[last_two[0]]:
            raise MemoryError
        return read_image(file)

    def no_memory_to_answer(model, questions, *rest):
        if first in [question.id for question in questions]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer_questions(model, questions, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(support_run, "read_image", no_memory_to_read)
        patch.setattr(evaluation, "answer_questions", no_memory_to_answer)
        patch.setattr(sys, "argv", ["eval.py", *MME, "--out", str(tmp_path)])
        patch.setattr(support_run.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as e:
            support_run.start(evaluation.main)
    printed, said = capsys.readouterr()
    assert e.value.code == 2 and not tables(printed) and not (tmp_path / "result.json").exists()
    *_, end = said.splitlines()
    assert end.startswith("eval.py: error: mme: memory ran out on 3 of 4 questions, the first is "
                          f"{first} ({image[first]}); want fewer --max-pixels, a smaller "
                          "--max-batch-tokens or another --device")
    for id in (first, *last_two):
        assert f"eval.py: question {id} ({image[id]}): out of memory" in said
    assert lines_in(tmp_path / "answers.jsonl") == [whole[1]] and asked == [kept]
    run(evaluation.main, *MME, "--max-batch-tokens", 9999, out=tmp_path)
    assert sorted(asked) == sorted([kept, first, *last_two])
    assert lines_in(tmp_path / "answers.jsonl") == whole


@pytest.mark.parametrize("error, want", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("shape mismatch"), False)])
def test_out_of_memory_is_told_from_other_errors(error, want):
    assert support_run.is_out_of_memory(error) == want


# ---- records -------------------------------------------------------------------------------------

def record(benchmark, id, answer=""):
    return {"benchmark": benchmark, "id": id, "answers": answer, "scores": {}}


def test_the_files_of_processes_become_one_in_the_order_of_the_questions(tmp_path):
    """Records of another benchmark and of questions that are not asked stay; of two of a question,
    the later file's counts."""
    files = {"answers.jsonl": [record("mme", "2", "old"), record("textvqa", "1")],
             "answers.rank1.jsonl": [record("mme", "2", "new"), record("mme", "7")],
             "answers.rank2.jsonl": [record("mme", "3", "c"), record("mme", "1", "ü\n")]}
    for name, records in files.items():
        for one in records:
            support_run.append(tmp_path / name, one)
    questions = [Question(id, None, "", [], "exact") for id in "1234"]
    found = read_records(tmp_path, "mme")
    assert {id: one["answers"] for id, one in found.items()} == {
        "1": "ü\n", "2": "new", "3": "c", "7": ""}
    support_run.merge(tmp_path, "mme", questions, found)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert list(map(json.loads, lines_in(tmp_path / "answers.jsonl"))) == [
        record("textvqa", "1"), record("mme", "7"), record("mme", "1", "ü\n"),
        record("mme", "2", "new"), record("mme", "3", "c")]


@pytest.mark.parametrize("bad", ["{", "[]", '{"benchmark": "mme", "id": "1", "answers": {}}'])
def test_a_record_that_is_broken_is_named_and_not_asked_again(bad, tmp_path):
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(record('mme', '1'))}\n{bad}\n")
    with pytest.raises(InputError, match=f"line 2 is {re.escape(repr(bad))}"):
        read_records(tmp_path, "mme")


def test_images_are_read_ahead_in_order_and_reading_stops_where_it_fails(monkeypatch):
    def read_image(i):
        if i == 30:
            raise InputError("30")
        return -i
    monkeypatch.setattr(support_run, "read_image", read_image)
    model = SimpleNamespace(preprocess=lambda image: image)
    questions = [Question(str(i), i, "", [], "") for i in range(100)]
    pairs = [questions[i:i + 2] for i in range(0, 100, 2)]
    seen = []
    with pytest.raises(InputError, match="30"):
        for pair, images in support_run.read_ahead(model, pairs):
            seen += support_run.attempt(lambda batch, found: found, pair, images)
    assert [(question.image, found) for question, found in seen] == [(i, -i) for i in range(30)]
    for some in ([], pairs[:1], pairs[:20]):
        assert [pair for pair, _ in support_run.read_ahead(model, some)] == some


def test_progress_shows_the_score_and_the_time_left_on_a_terminal_only(capsys, monkeypatch):
    support_run.progress("mme", 3, 10, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(support_run.time, "time", lambda: 106.0)
    support_run.progress("mme", 3, 10, 100.0, "unpruned 95.0")
    assert capsys.readouterr().err == "\r\x1b[Kmme 3/10  unpruned 95.0  0.5/s  0:00:14 left"
    support_run.progress("mme", 10, 10, 100.0)
    assert capsys.readouterr().err == "\r\x1b[K"


# ---- the folder of a run -------------------------------------------------------------------------

def settings(argv, root, monkeypatch):
    """What decides the answers of a run of the code in that folder."""
    monkeypatch.setattr(support_run, "ROOT", root)
    args = evaluation.parse_arguments(argv)
    data = {"mme": load_benchmark("mme", ROOT / "tiny")}
    return support_run.settings_of(args, flags.load_model(args), data)


@pytest.fixture
def code(tmp_path):
    """A copy of the code, whose files may be edited."""
    folder = tmp_path / "code"
    shutil.copytree(ROOT / "support", folder / "support")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def edit(file):
    file.write_text(file.read_text("utf-8") + "# a comment\n", "utf-8")


def test_a_run_has_another_folder_only_if_its_answers_may_differ(code, tmp_path, monkeypatch):
    """`--json`, or flags in another order, measured everything again; a comment in report.py made
    every folder that there was "a run with other settings"."""
    monkeypatch.chdir(tmp_path)
    argv = ["--layer", "20", "--ratio", "0.9"]
    before = settings(argv, code, monkeypatch)
    for same in (["--ratio", "0.9", "--layer", "20"], [*argv, "--json"],
                 [*argv, "--plot", "b.svg"], [*argv, "--max-batch-tokens", "99"],
                 [*argv, "--batch", "3"], [*argv, "--out", "x"]):
        assert settings(same, code, monkeypatch) == before, same
    for other in (["--layer", "20", "--ratio", "0.8"], [*argv, "--positions", "compact"],
                  [*argv, "--model", str(ROOT / "tiny" / "qwen")]):
        assert settings(other, code, monkeypatch) != before, other
    for name in ("support/report.py", "support/pictures.py", "demo.py", "model_qwen.py"):
        edit(code / name)
    assert settings(argv, code, monkeypatch) == before
    args = evaluation.parse_arguments(argv)
    folder = support_run.open_folder(args, before)
    assert re.fullmatch("runs/eval-llava-[0-9a-f]{8}", str(folder))
    for name in ("tokprune.py", "eval.py", "model_llava.py", "support/benchmarks.py"):
        edit(code / name)
        after = settings(argv, code, monkeypatch)
        assert after["code"] != before["code"], name
        assert after["checkpoint"] == before["checkpoint"]
        assert support_run.open_folder(args, after) != folder
        before = after


def test_another_ratio_in_the_same_folder_is_refused_in_one_line(undisturbed):
    with pytest.raises(InputError, match="other settings: ratio is None, this run's is 0.5") as e:
        evaluation.main([*ARGV, "--ratio", "0.5", "--out", str(undisturbed[2])])
    assert "\n" not in str(e.value)


def test_what_lies_beside_weights_and_code_is_not_read(code, tmp_path, monkeypatch):
    """A folder called notes.py and an unreadable training_args.bin were a traceback each, .DS_Store
    another checkpoint."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tiny" / "llava", model)
    argv = ["--model", str(model)]
    before = settings(argv, code, monkeypatch)
    (model / ".DS_Store").write_bytes(b"\0")
    (model / "training_args.bin").symlink_to("nowhere")
    (model / "a.jsonl").mkdir()
    (code / "notes.py").mkdir()
    (code / "support" / "notes.py").mkdir()
    assert settings(argv, code, monkeypatch) == before
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert settings(argv, code, monkeypatch)["checkpoint"] != before["checkpoint"]


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, monkeypatch):
    """Where a file system has no locks, two runs may write: none is refused for that."""
    holds = ("import fcntl, os, sys, time\n"
             "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
             "print(flush=True)\ntime.sleep(99)")
    other = subprocess.Popen([sys.executable, "-c", holds, tmp_path], stdout=subprocess.PIPE)
    other.stdout.readline()
    args = SimpleNamespace(out=tmp_path)
    with pytest.raises(InputError, match="another run is writing there"):
        support_run.open_folder(args, {})
    other.kill()
    other.communicate()
    assert support_run.open_folder(args, {}) == tmp_path

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")
    monkeypatch.setattr(support_run.fcntl, "flock", no_locks)
    assert support_run.open_folder(args, {}) == tmp_path


# ---- what a run says of itself -------------------------------------------------------------------

def test_the_result_says_where_it_comes_from(undisturbed):
    _, result, _ = undisturbed
    assert result["packages"]["torch"] == torch.__version__ and result["python"]
    assert (result["device"], result["dtype"], result["processes"]) == ("cpu", "float32", 1)
    assert len(result["checkpoint"]) == len(result["questions"]["mme"]) == 12
    assert result["command"].startswith("eval.py --method dart --seeds 2")
    assert result["prompts"]["mme"].endswith("using a single word or phrase. ASSISTANT:")


def test_a_copy_inside_another_repository_has_no_commit_of_that_one(tmp_path, monkeypatch):
    """The commit of somebody's thesis was given as the code's."""
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True,
                       capture_output=True)
    inner = tmp_path / "tokprune"
    inner.mkdir()
    (tmp_path / "thesis.tex").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "thesis")
    monkeypatch.setattr(support_run, "ROOT", inner)
    assert support_run.commit() == ""
    monkeypatch.setattr(support_run, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", support_run.commit())
    (tmp_path / "thesis.tex").write_text("2")
    assert support_run.commit().endswith(" and changes")


def test_questions_are_drawn_by_seed_in_whole_images():
    """mme asks two questions of an image."""
    known = load_benchmark("mme", ROOT / "tiny")
    chosen = {}
    for seed in (0, 1):
        drawn = flags.sample(known, 5, seed)
        assert len(drawn) == 6 and drawn == [question for question in known if question in drawn]
        assert len({question.image for question in drawn}) == 3
        chosen[seed] = {question.id for question in drawn}
    assert chosen[0] != chosen[1]
    assert flags.sample(known, 5, 1) == drawn and flags.sample(known, None, 0) == known
