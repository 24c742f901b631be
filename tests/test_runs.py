"""What ends a run, or shares it among processes, changes nothing of what it finds."""
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import eval as evaluation
import model_llava
import model_qwen
from benchmarks import load_benchmark
from eval import main
from kill_and_resume import kill_and_resume
from tokprune import METHODS, ORACLES, InputError, parse_schedule, visual_tokens

ROOT = Path(__file__).parents[1]
FLAGS = ["--method", "dart", "--seeds", "2", "--limit", "6"]


def timeless(file):
    """The answers without their milliseconds."""
    return [{key: value for key, value in json.loads(line).items() if key not in ("ms", "oracle_ms")} for line in file.read_text().splitlines()]


def tables(printed):
    return [line for line in printed.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that nobody disturbed: (its tables, its folder)."""
    out = tmp_path_factory.mktemp("alone")
    done = subprocess.run([sys.executable, ROOT / "eval.py", *FLAGS, "--out", out], capture_output=True, text=True, check=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stderr == "", "quiet where nobody watches"
    return tables(done.stdout), out


def torchrun(processes, flags, out):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                             ROOT / "eval.py", *flags, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_several_processes_find_the_same_as_one(processes, tmp_path, alone):
    run = torchrun(processes, FLAGS, tmp_path)
    printed, errors = run.communicate()
    assert run.returncode == 0, errors
    assert tables(printed) == alone[0] and timeless(tmp_path / "answers.jsonl") == timeless(alone[1] / "answers.jsonl")
    assert json.loads(printed.splitlines()[-1])["processes"] == processes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "result.json", "settings.json"]


def test_several_processes_measure_the_same_information(tmp_path):
    flags = ["--information", "--layer", "1,20", "--limit", "2"]
    main([*flags, "--out", str(tmp_path / "1")])
    run = torchrun(2, flags, tmp_path / "2")
    assert run.communicate() and run.returncode == 0
    one, two = (dict(np.load(tmp_path / n / "information.npz")) for n in "12")
    assert one.keys() == two.keys() and all(np.allclose(one[key], two[key], rtol=0, atol=1e-6) for key in one)
    assert not list((tmp_path / "2").glob("information.rank*"))


def test_a_process_that_dies_ends_the_run_and_another_number_goes_on(tmp_path, alone):
    """Killed while it answers; two processes are gone on with by three."""
    out = tmp_path / "out"
    run = torchrun(2, ["--method", "dart", "--seeds", "2", "--limit", "30"], out)
    while run.poll() is None and not (out / "answers.rank1.jsonl").exists():
        pass
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if "RANK=1" in (found := environment.read_bytes().decode().split("\0")) and f"TORCHELASTIC_RUN_ID={run_id(run.pid)}" in found:
                os.kill(int(environment.parent.name), signal.SIGKILL)
        except OSError:                                 # it is another's, or gone
            pass
    errors = run.communicate()[1]
    assert run.returncode != 0 and f"eval.py: error: {evaluation.DIED}" in errors
    had = sum(len(file.read_text().splitlines()) for file in out.glob("answers*.jsonl"))
    assert had > 0
    again = torchrun(3, ["--method", "dart", "--seeds", "2", "--limit", "30"], out)
    assert again.communicate() and again.returncode == 0
    lines = timeless(out / "answers.jsonl")
    assert len(lines) >= 60 and len({(line["benchmark"], line["id"]) for line in lines}) == len(lines)
    both = {(line["benchmark"], line["id"]): line for line in lines}
    assert all(both.get((line["benchmark"], line["id"]), line) == line for line in timeless(alone[1] / "answers.jsonl"))


def run_id(pid):
    """Of the processes that a torchrun has started: they are its children."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().decode().split("\0"):
            if entry.startswith("TORCHELASTIC_RUN_ID="):
                return entry.split("=")[1]


def test_killed_at_random_moments_and_resumed_nothing_is_different():
    killed, same = kill_and_resume(times=3, limit=10, seed=1)
    assert same and killed > 0


def test_images_read_ahead_by_any_number_of_threads_give_the_same(capsys, tmp_path, alone):
    for workers in (1, 7):
        main([*FLAGS, "--workers", str(workers), "--out", str(tmp_path / str(workers))])
        assert [line["answers"] for line in timeless(tmp_path / str(workers) / "answers.jsonl")] == [
            line["answers"] for line in timeless(alone[1] / "answers.jsonl")]


def test_reading_ahead_keeps_the_order_and_stops_where_it_fails():
    def work(i):
        if i == 30:
            raise InputError("30")
        return -i
    seen = []
    with pytest.raises(InputError, match="30"):
        for item, done in evaluation.ahead(work, list(range(100)), 3):
            seen.append((item, done()))
    assert seen == [(i, -i) for i in range(30)]
    [(item, done)] = evaluation.ahead(work, [1], 4)
    assert (item, done()) == (1, -1) and list(evaluation.ahead(work, [], 4)) == []


def test_memory_that_runs_out_while_an_image_is_prepared_fails_that_question_alone(tmp_path, monkeypatch):
    original, calls = evaluation.read_image, []

    def fails(path):
        calls.append(path)
        if len(calls) == 1:
            raise MemoryError
        return original(path)
    monkeypatch.setattr(evaluation, "read_image", fails)
    assert main([*FLAGS, "--bench", "mme", "--workers", "1", "--out", str(tmp_path)]) == 1


def test_copies_that_lie_in_the_folder_of_a_run_are_left_alone(capsys, tmp_path):
    main([*FLAGS, "--bench", "mme", "--out", str(tmp_path)])
    want = timeless(tmp_path / "answers.jsonl")
    copy = (tmp_path / "answers.jsonl").read_text().replace('"unpruned": 1.0', '"unpruned": 0.0')
    for name in ("answers_old.jsonl", "answers-backup.jsonl"):
        (tmp_path / name).write_text(copy)
    main([*FLAGS, "--bench", "mme", "--out", str(tmp_path)])
    assert timeless(tmp_path / "answers.jsonl") == want and (tmp_path / "answers_old.jsonl").read_text() == copy


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_question_that_memory_is_too_small_for_is_failed_and_the_others_go_on(error, capsys, tmp_path, monkeypatch, alone):
    """Scored 0 in every row, named, counted; asked again by the same command."""
    questions = [line["id"] for line in timeless(alone[1] / "answers.jsonl") if line["benchmark"] == "mme"]
    original, argv = evaluation.answer_cells, [*FLAGS, "--bench", "mme", "--out", str(tmp_path)]

    def fails(model, question, *rest):
        if question.id == questions[0]:
            raise error
        return original(model, question, *rest)
    monkeypatch.setattr(evaluation, "answer_cells", fails)
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert f"eval.py: mme {questions[0]}: out of memory, failed" in printed.err and "mme, failed answers: unpruned 1" in printed.out
    rows = json.loads(printed.out.splitlines()[-1])["benchmarks"]["mme"]
    assert all(row["failed"] == 1 for row in rows) and len(timeless(tmp_path / "answers.jsonl")) == len(questions) - 1
    monkeypatch.undo()
    assert main(argv) == 0
    assert timeless(tmp_path / "answers.jsonl") == [line for line in timeless(alone[1] / "answers.jsonl") if line["benchmark"] == "mme"]


def test_other_errors_of_the_model_are_not_taken_for_want_of_memory(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("shape mismatch")
    monkeypatch.setattr(evaluation, "answer_cells", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main([*FLAGS, "--out", str(tmp_path)])


def test_a_run_that_fails_for_want_of_memory_leaves_with_1(tmp_path):
    """Decoding runs out of memory at the second question, in a process of its own."""
    program = ("import runpy, sys, eval; sys.argv = ['eval.py', *sys.argv[1:]]\n"
               "import torch, model_llava\n"
               "decode, calls = model_llava.Llava.decode, []\n"
               "def fails(*a):\n    calls.append(1)\n    if len(calls) == 2: raise MemoryError\n    return decode(*a)\n"
               "model_llava.Llava.decode = fails\nrunpy.run_path('eval.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program, *FLAGS, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "eval.py: error: 1 questions failed for want of memory" in done.stderr and tables(done.stdout)


def test_a_full_disk_ends_with_one_line_and_what_was_answered_stays(tmp_path, alone):
    """A file may grow to three lines' size and no further."""
    whole = (alone[1] / "answers.jsonl").read_bytes()
    room = sum(len(line) + 1 for line in whole.split(b"\n")[:3]) + 20
    done = subprocess.run([sys.executable, ROOT / "eval.py", *FLAGS, "--out", tmp_path], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'answers.jsonl'}: cannot be written ({os.strerror(errno.EFBIG)})" in done.stderr
    kept = evaluation.read_answers(tmp_path / "answers.jsonl")
    assert 1 <= len(kept) <= 3
    done = subprocess.run([sys.executable, ROOT / "eval.py", *FLAGS, "--out", tmp_path], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and tables(done.stdout) == alone[0]


def test_a_truncated_image_is_named_and_the_answers_before_it_are_kept(tmp_path):
    data = tmp_path / "OCR"
    data.mkdir()
    for i in range(12):
        Image.new("RGB", (112, 112), (20 * i, 90, 90)).save(data / f"{i:02}.jpg")
        (data / f"{i:02}.txt").write_text("Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n")
    whole = (data / "09.jpg").read_bytes()
    (data / "09.jpg").write_bytes(whole[:len(whole) // 2])
    argv = ["--data", str(tmp_path), "--bench", "mme", "--method", "random", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=re.escape(f"{data / '09.jpg'}: cannot be read as an image")):
        main(argv)
    assert [line["id"] for line in timeless(tmp_path / "out" / "answers.jsonl")] == [f"OCR/{i:02}/{j}" for i in range(9) for j in range(2)]


def test_a_stopped_run_says_so_in_one_line(tmp_path):
    run = subprocess.Popen([sys.executable, ROOT / "eval.py", "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not ((tmp_path / "answers.jsonl").exists() and (tmp_path / "answers.jsonl").stat().st_size):
        pass
    run.terminate()
    assert run.communicate()[1] == "eval.py: error: stopped by a signal; what was answered is kept, and the same command goes on\n"
    assert run.returncode == 2


def test_the_result_says_where_it_comes_from(alone):
    result = json.loads((alone[1] / "result.json").read_text())
    assert result["packages"]["torch"] == torch.__version__ and result["python"] and result["device"] == "cpu" and result["dtype"] == "float32"
    assert {len(result["config_sha256"]), *(len(v) for v in result["shard_headers_sha256"].values())} == {64}
    assert list(result["shard_headers_sha256"]) == ["model.safetensors"] and result["data_sha256"]["mme"]["files"] == 200
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert result["commit"].startswith(commit) and result["command"].startswith("eval.py --method dart")
    assert result["prompts"]["mme"].endswith("Answer the question using a single word or phrase. ASSISTANT:")
    assert all({"schedule", "empty", "unparsed", "failed"} <= row.keys() for rows in result["benchmarks"].values() for row in rows)


def test_a_line_of_answers_says_all_of_a_question(alone):
    line = timeless(alone[1] / "answers.jsonl")[0]
    keys = ["unpruned", "random@0=0 seed 0", "random@20:0.9 seed 0", "random@20:0.9 seed 1", "dart@20:0.9 seed 0"]
    assert all(list(line[part]) == keys for part in ("parsed", "scores", "visual_tokens")) and sorted(line["answers"]) == sorted(keys)
    assert line["visual_tokens"]["dart@20:0.9 seed 0"] == [[0, 64], [20, 6]] and line["visual_tokens"]["random@0=0 seed 0"] == [[0, 0]]
    assert line["parsed"]["unpruned"] in ("yes", "no", None) and re.fullmatch("[0-9a-f]{12}", line["prompt"])


def test_progress_shows_the_score_and_the_time_left_on_a_terminal_alone(capsys, monkeypatch):
    evaluation.progress("mme", 3, 10, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(evaluation.time, "time", lambda: 106.0)
    evaluation.progress("mme", 3, 10, 100.0, "unpruned 95.0")
    assert capsys.readouterr().err == "\r\x1b[Kmme 3/10  unpruned 95.0  0.5/s  0:00:14 left"
    evaluation.progress("mme", 10, 10, 100.0)
    assert capsys.readouterr().err == "\r\x1b[K"


# ---- speed ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_speed_is_told_for_each_method_and_the_cache_is_what_it_has_to_be(name, capsys, tmp_path, monkeypatch):
    """The bytes behind the cache's tensors, whole storages counted: a view that kept pruned rows alive would show."""
    assert evaluation.ROUNDS == 10
    monkeypatch.setattr(evaluation, "ROUNDS", 1)
    main(["--speed", "--model", str(ROOT / "tiny" / name), "--layer", "10", "--ratio", "0.5", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = {row["schedule"]: row for row in json.loads(printed.splitlines()[-1])["speed"]}
    methods = [method for method in METHODS if method not in ORACLES]
    assert list(rows) == ["", "random@0=0", *(f"{method}@10:0.5" for method in methods)]
    module = {"llava": model_llava, "qwen": model_qwen}[name]
    model = module.load(ROOT / "tiny" / name)
    question = load_benchmark("mme", ROOT / "tiny")[0]
    stream = model.begin(evaluation.read_image(question.image), question.prompt)
    N, T, text = stream.visual[1], stream.x.shape[1], model.config.text
    for spec, row in rows.items():
        alive = visual_tokens(parse_schedule(spec), N, model.num_layers)
        assert row["cache_bytes"] == sum(T - N + n for n in alive) * 2 * text.num_key_value_heads * text.head_dim * 4, spec
        assert all(row[part]["low"] <= row[part]["median"] <= row[part]["high"] for part in ("tower_ms", "prefill_ms", "decode_ms"))
        assert row["gflops"] > 0 and 0 < row["share_of_peak"] < 2 and row["select_ms"] >= 0 and row["tokens_per_second"] > 0
    assert printed.count("\n| ") == 1 + len(rows)


def test_the_benchmark_script_runs_on_tiny_shapes(capsys, tmp_path):
    """All but the comparison with transformers, which no test may need, and the sweep, which is slow on purpose."""
    result = bench.main(["--smoke", "--parts", "pruning,information,loading,growth,cuda", "--plot", str(tmp_path / "growth.png")])
    found = {line["what"]: line["value"] for line in result["found"]}
    assert len(found) == len(result["found"]) and (tmp_path / "growth.png").exists()
    assert found["information: largest difference from the naive loop"] < 1e-5
    assert all(found[f"{kind}: difference of logits from the CPU's, share of the largest"] < 0.05 for kind in ("llava", "qwen"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
