"""What ends a run, or shares it among processes and machines, changes nothing of what it finds."""
import errno
import json
import multiprocessing
import os
import re
import resource
import runpy
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

ARGV = ["--method", "grid", "--seeds", "1", "--limit", "4", "--max-new-tokens", "3"]
MME = [*ARGV, "--bench", "mme"]


def tables(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|")]


def lines_in(file) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    printed, result = run(evaluation.main, *ARGV, out=folder)
    return SimpleNamespace(tables=tables(printed), result=result, folder=folder,
                           records=lines_in(folder / "answers.jsonl"))


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


# ---- processes -----------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def start(out, before=None, rank="0", **environment):
    """Start eval.py in a process, which calls before() first. A fork has torch, whose import takes
    seconds; the project's own modules are imported anew."""
    def program():
        for name in list(sys.modules):
            if (ROOT / name.split(".")[0]).is_dir() or (ROOT / f"{name}.py").exists():
                del sys.modules[name]
        os.environ.update(environment, RANK=rank)
        sys.argv = ["eval.py", *ARGV, "--out", str(out)]
        sys.stdout = process.stdout.open("w")
        sys.stderr = process.stderr.open("w")
        if before:
            before()
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    process = FORK.Process(target=program, daemon=True)
    process.stdout = out.parent / f"stdout{rank}"
    process.stderr = out.parent / f"stderr{rank}"
    process.start()
    return process


def start_two(folders, before=None):
    """As torchrun does; -> when both have ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(out, before, str(rank), TORCHELASTIC_RUN_ID="x", WORLD_SIZE="2",
                       LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port))
                 for rank, out in enumerate(folders)]
    for process in processes:
        process.join(120)
    return processes


def die_at_the_first_answer():
    """Of the second process."""
    from support import run
    append = run.append

    def append_and_die(file, record):
        append(file, record)
        if run.RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    run.append = append_and_die


def list_files_long_before_they_are_read():
    from support import run
    answer_files = run.answer_files
    merge = run.merge

    def list_and_wait(out):
        files = answer_files(out)
        time.sleep(1 if run.RANK else 0)
        return files

    def wait_and_merge(*args):
        time.sleep(0.3)
        merge(*args)
    run.answer_files = list_and_wait
    run.merge = wait_and_merge


def test_a_process_that_dies_ends_the_run_and_others_find_the_same_as_one(tmp_path, undisturbed):
    """Two processes resume what the dead one and its neighbor have left. One of them lists the
    files of the next benchmark just before the other merges and removes them: once a file that was
    not found."""
    out = tmp_path / "out"
    first, second = start_two([out, out], die_at_the_first_answer)
    assert second.exitcode == -signal.SIGKILL and first.exitcode == 2
    assert f"eval.py: error: {DIED}" in first.stderr.read_text()
    assert len(lines_in(out / "answers.rank1.jsonl")) == 1
    first, second = start_two([out, out], list_files_long_before_they_are_read)
    assert (first.exitcode, second.exitcode) == (0, 0), first.stderr.read_text()
    assert tables(first.stdout.read_text()) == undisturbed.tables
    assert lines_in(out / "answers.jsonl") == undisturbed.records
    assert json.loads((out / "result.json").read_text())["processes"] == 2
    names = {path.name for path in out.iterdir()}
    assert names == {"answers.jsonl", "result.json", "settings.json"}


def test_two_machines_without_a_common_disk_find_the_same_as_one(tmp_path, undisturbed, run,
                                                                 asked):
    """A folder each. Records pass through torch.distributed: the first process has all of them, the
    second its own, from which it could resume."""
    folders = [tmp_path / name for name in "01"]
    first, second = start_two(folders)
    assert (first.exitcode, second.exitcode) == (0, 0), first.stderr.read_text()
    assert tables(first.stdout.read_text()) == undisturbed.tables
    assert lines_in(folders[0] / "answers.jsonl") == undisturbed.records
    own = lines_in(folders[1] / "answers.rank1.jsonl")
    assert 0 < len(own) < len(undisturbed.records) and set(own) < set(undisturbed.records)
    assert not (folders[1] / "result.json").exists() and second.stdout.read_text() == ""
    printed, _ = run(evaluation.main, *ARGV, out=folders[1])
    assert tables(printed) == undisturbed.tables
    assert len(asked) == len(undisturbed.records) - len(own)


@pytest.mark.parametrize("more, said", [
    (["--positions", "compact"], "another process of this run has other settings: positions is "
                                 "'compact', this run's is 'keep'"),
    (["--layer", "x"], DIED)])
def test_processes_that_differ_or_never_begin_end_the_run(more, said, tmp_path):
    """Answers of two settings were mixed in one table; a mistake on one machine left the other
    waiting without a word."""
    def other_flags():
        if os.environ["RANK"] == "1":
            sys.argv += more
    first, second = start_two([tmp_path / "0", tmp_path / "1"], other_flags)
    assert (first.exitcode, second.exitcode) == (2, 2)
    assert said in first.stderr.read_text() and first.stdout.read_text() == ""


# ---- what ends a run -----------------------------------------------------------------------------

@pytest.mark.parametrize("sent, code, want", [
    (signal.SIGKILL, -signal.SIGKILL, ""),
    (signal.SIGTERM, 2, "eval.py: error: stopped by a signal; what was answered is kept, and the "
                        "same command resumes\n")])
def test_a_run_that_a_signal_ends_resumes_and_nothing_is_different(sent, code, want, run, tmp_path,
                                                                   undisturbed):
    out = tmp_path / "out"
    process = start(out, TORCHELASTIC_RUN_ID="x", WORLD_SIZE="1", LOCAL_RANK="0")
    while process.is_alive() and not lines_in(out / "answers.jsonl"):
        time.sleep(0.01)
    os.kill(process.pid, sent)
    process.join()
    assert process.exitcode == code and process.stderr.read_text() == want
    assert 1 <= len(lines_in(out / "answers.jsonl")) < len(undisturbed.records)
    printed, _ = run(evaluation.main, *ARGV, out=out)
    assert tables(printed) == undisturbed.tables
    assert lines_in(out / "answers.jsonl") == undisturbed.records


def test_a_run_resumes_behind_a_record_that_was_cut_off(run, tmp_path, undisturbed, asked):
    """Once the next record was written behind the half one, as one line that nothing could read.
    Copies that lie about are left alone."""
    whole = (undisturbed.folder / "answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    shutil.copy(undisturbed.folder / "settings.json", tmp_path)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    copy = whole.replace(b'"unpruned": 1.0', b'"unpruned": 0.0')
    (tmp_path / "answers_old.jsonl").write_bytes(copy)
    printed, _ = run(evaluation.main, *ARGV, out=tmp_path)
    assert len(asked) == len(lines) - 2 and tables(printed) == undisturbed.tables
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert (tmp_path / "answers_old.jsonl").read_bytes() == copy


def test_a_full_disk_ends_with_one_line_and_what_was_answered_stays(tmp_path, undisturbed):
    """A file may grow to three records' size and no further."""
    room = sum(len(line) + 1 for line in undisturbed.records[:3]) + 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(InputError) as e:
            evaluation.main([*MME, "--out", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = tmp_path / "answers.jsonl"
    assert f"{file}: cannot be written ({os.strerror(errno.EFBIG)})" in str(e.value)
    kept = read_records(tmp_path, "mme").values()
    assert 1 <= len(kept) <= 3
    assert {json.dumps(record) for record in kept} < set(undisturbed.records)


def test_questions_that_run_out_of_memory_are_named_and_asked_again(
        run, started, tmp_path, monkeypatch, undisturbed, asked, capsys):
    """They were scored 0, in a table that looked whole. Those of the same batch are answered and
    kept. One fails while it is answered, two while their image is read."""
    whole = [line for line in undisturbed.records if '"mme"' in line]
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
        assert started(evaluation.main, *MME, "--out", tmp_path) == 2
    printed, said = capsys.readouterr()
    assert not tables(printed) and not (tmp_path / "result.json").exists()
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


def test_images_are_read_ahead_in_order_and_what_half_a_batch_has_answered_is_kept(monkeypatch):
    """The second of a pair cannot be read: the record of the first was lost with it."""
    def read_image(i):
        if i == 31:
            raise InputError("31")
        return -i
    monkeypatch.setattr(support_run, "read_image", read_image)
    model = SimpleNamespace(preprocess=lambda image: image)
    questions = [Question(str(i), i, "", [], "") for i in range(100)]
    pairs = [questions[i:i + 2] for i in range(0, 100, 2)]
    seen = []
    with pytest.raises(InputError, match="31"):
        for pair, images in support_run.read_ahead(model, pairs):
            for question, found in support_run.attempt(lambda _, found: found, pair, images):
                seen.append((question.image, found))
    assert seen == [(i, -i) for i in range(31)]
    for some in ([], pairs[:1], pairs[:15]):
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

@pytest.fixture
def code(tmp_path, monkeypatch):
    """A copy of the code, whose files may be edited."""
    folder = tmp_path / "code"
    shutil.copytree(ROOT / "support", folder / "support")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    (folder / "tiny").mkdir()
    shutil.copy(ROOT / "tiny" / "promise.py", folder / "tiny")
    monkeypatch.setattr(support_run, "ROOT", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def settings(*argv, program="eval.py"):
    """What decides the answers of a run."""
    args = evaluation.parse_arguments([str(arg) for arg in argv])
    args.command = program
    return support_run.settings_of(args, flags.load_model(args), {})


def test_a_run_has_another_folder_only_if_its_answers_may_differ(code):
    """`--json`, or flags in another order, measured everything again; a comment in report.py made
    every folder that there was "a run with other settings"."""
    argv = ["--layer", "20", "--ratio", "0.9"]
    before = settings(*argv)
    for same in ([], ["--ratio", "0.9", "--layer", "20"], [*argv, "--json"],
                 [*argv, "--plot", "b.svg"], [*argv, "--max-batch-tokens", "99"],
                 [*argv, "--batch", "3"], [*argv, "--out", "x"]):
        assert settings(*same) == before, same
    for other in (["--layer", "20", "--ratio", "0.8"], [*argv, "--positions", "compact"],
                  [*argv, "--model", ROOT / "tiny" / "qwen"]):
        assert settings(*other) != before, other
    args = evaluation.parse_arguments(argv)
    folder = support_run.open_folder(args, before)
    assert re.fullmatch("runs/eval-llava-[0-9a-f]{8}", str(folder))
    long = SimpleNamespace(out=None, model=ROOT / ("\u732b" * 85), command="eval.py")
    assert support_run.open_folder(long, before).name.startswith("eval-" + "\u732b" * 33 + "-")
    others = {"support/report.py", "demo.py", "model_qwen.py"}
    for name in (*others, "tokprune.py", "eval.py", "information.py", "model_llava.py",
                 "support/benchmarks.py", "support/files.py", "support/image.py"):
        decides = name not in others
        with (code / name).open("a") as file:
            file.write("# a comment\n")
        after = settings(*argv)
        assert (after != before) == decides and after["checkpoint"] == before["checkpoint"], name
        assert (support_run.open_folder(args, after) != folder) == decides
        before, folder = after, support_run.open_folder(args, after)


@pytest.mark.parametrize("program, decides", [
    ("eval.py", {"eval.py"}), ("information.py", set()), ("plan.py", {"eval.py", "plan.py"}),
    ("tiny/promise.py", {"eval.py", "plan.py", "tiny/promise.py"})])
def test_a_run_is_told_apart_by_the_programs_that_it_answers_by(code, program, decides):
    """promise.py resumed with answers of another plan.py."""
    for name in ("eval.py", "plan.py", "tiny/promise.py"):
        before = settings(program=program)["code"]
        with (code / name).open("a") as file:
            file.write("# a comment\n")
        assert (settings(program=program)["code"] != before) == (name in decides), name


def test_another_ratio_in_the_same_folder_is_refused_in_one_line(undisturbed):
    with pytest.raises(InputError, match="other settings: ratio is 0.9, this run's is 0.5") as e:
        evaluation.main([*ARGV, "--ratio", "0.5", "--out", str(undisturbed.folder)])
    assert "\n" not in str(e.value)


def test_what_lies_beside_weights_and_code_is_not_read(code, tmp_path):
    """A folder called notes.py and an unreadable training_args.bin were a traceback each, .DS_Store
    and an entry that LLaVA does not use another checkpoint."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tiny" / "llava", model)
    before = settings("--model", model)
    (model / ".DS_Store").write_bytes(b"\0")
    (model / "preprocessor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    (model / "generation_config.json").write_text('{"transformers_version": "9"}')
    (model / "training_args.bin").symlink_to("nowhere")
    (model / "a.jsonl").mkdir()
    (code / "notes.py").mkdir()
    (code / "support" / "notes.py").mkdir()
    assert settings("--model", model) == before
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    data = bytearray(whole)
    data[-1] ^= 1
    weights.write_bytes(data)
    assert settings("--model", model)["checkpoint"] != before["checkpoint"]
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')
    weights.write_bytes(whole)
    assert settings("--model", model)["checkpoint"] != before["checkpoint"]


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, monkeypatch):
    """Where a file system has no locks, two runs may write: none is refused for that."""
    args = SimpleNamespace(out=tmp_path)
    other = os.open(tmp_path, os.O_RDONLY)
    support_run.fcntl.flock(other, support_run.fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another run is writing there"):
        support_run.open_folder(args, {})
    os.close(other)
    assert support_run.open_folder(args, {}) == tmp_path

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")
    monkeypatch.setattr(support_run.fcntl, "flock", no_locks)
    assert support_run.open_folder(args, {}) == tmp_path


# ---- what a run says of itself -------------------------------------------------------------------

def test_the_result_says_where_it_comes_from(undisturbed):
    result = undisturbed.result
    assert result["packages"]["torch"] == torch.__version__ and result["python"]
    assert (result["device"], result["dtype"], result["processes"]) == ("cpu", "float32", 1)
    assert len(result["checkpoint"]) == len(result["questions"]["mme"]) == 12
    assert result["command"].startswith("eval.py --method grid --seeds 1")
    assert result["prompts"]["mme"].endswith("using a single word or phrase. ASSISTANT:")


def test_a_copy_inside_another_repository_has_no_commit_of_that_one(tmp_path, monkeypatch):
    """The commit of somebody's thesis was given as the code's."""
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True,
                       capture_output=True)
    (tmp_path / "tokprune").mkdir()
    (tmp_path / "thesis.tex").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "thesis")
    monkeypatch.setattr(support_run, "ROOT", tmp_path / "tokprune")
    assert support_run.commit() == ""
    monkeypatch.setattr(support_run, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", support_run.commit())
    (tmp_path / "thesis.tex").write_text("2")
    assert support_run.commit().endswith(" and changes")
