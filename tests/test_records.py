"""The file of a run's records: read, merged, written to; images read ahead; progress."""
import json
import re
import sys

import pytest
import torch

from support import records
from support.benchmarks import Question
from tokprune import InputError


def test_the_files_of_processes_become_one_in_the_order_of_the_questions(tmp_path):
    """Records of another benchmark stay; of two of a question, the later file's counts."""
    def record(benchmark, id, answer):
        return json.dumps({"benchmark": benchmark, "id": id, "answers": answer, "scores": {}})
    lines = {"answers.jsonl": [record("mme", "2", "old"), record("textvqa", "1", "t")],
             "answers.rank1.jsonl": [record("mme", "2", "new")],
             "answers.rank2.jsonl": [record("mme", "3", "c"), record("mme", "1", "a")]}
    for name, content in lines.items():
        (tmp_path / name).write_text("".join(line + "\n" for line in content))
    questions = [Question(id, None, "", [], "exact") for id in "1234"]
    done = records.merge(tmp_path, "mme", questions)
    assert {id: found["answers"] for id, found in done.items()} == {"1": "a", "2": "new", "3": "c"}
    merged = records.read_records(tmp_path / "answers.jsonl")
    assert [(found["benchmark"], found["id"]) for found in merged] == [
        ("textvqa", "1"), ("mme", "1"), ("mme", "2"), ("mme", "3")]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_records_are_written_one_behind_the_other(tmp_path):
    file = tmp_path / "answers.jsonl"
    both = [{"benchmark": "mme", "id": id, "answers": {"unpruned": "ü\n"}, "scores": {}}
            for id in "12"]
    for record in both:
        records.append(file, record)
    assert records.read_records(file) == both


def test_a_record_that_is_broken_is_named_and_not_asked_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    good = json.dumps({"benchmark": "mme", "id": "1", "answers": {}, "scores": {}})
    for bad in ("{", "[]", '{"benchmark": "mme", "id": "1", "answers": {}}'):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(InputError, match=f"line 2 is {re.escape(repr(bad))}"):
            records.read_records(file)
    file.write_text(good + "\n" + good[:30])            # cut off: the run was killed there
    assert len(records.read_records(file)) == 1


def test_a_record_may_be_cut_off_anywhere(tmp_path):
    """Within a letter of several bytes, too."""
    file = tmp_path / "answers.jsonl"
    record = {"benchmark": "mme", "id": "1", "answers": {"unpruned": "Grün 日"}, "scores": {}}
    records.append(file, record)
    records.append(file, record)
    whole = file.read_bytes()
    for end in range(len(whole) // 2, len(whole)):
        file.write_bytes(whole[:end])
        assert records.read_records(file) == [record]


@pytest.mark.parametrize("error, want", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("shape mismatch"), False)])
def test_want_of_memory_is_told_from_other_errors(error, want):
    assert records.is_out_of_memory(error) == want


def test_images_are_read_ahead_in_order_and_reading_stops_where_it_fails():
    def prepare(i):
        if i == 30:
            raise InputError("30")
        return -i
    seen = []
    with pytest.raises(InputError, match="30"):
        for item, prepared in records.ahead(prepare, list(range(100)), 3):
            seen.append((item, prepared()))
    assert seen == [(i, -i) for i in range(30)]
    for items in ([], [1], [1, 2]):
        assert [item for item, _ in records.ahead(prepare, items, 4)] == items


def test_progress_shows_the_score_and_the_time_left_on_a_terminal_alone(capsys, monkeypatch):
    records.progress("mme", 3, 10, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(records.time, "time", lambda: 106.0)
    records.progress("mme", 3, 10, 100.0, "unpruned 95.0")
    assert capsys.readouterr().err == "\r\x1b[Kmme 3/10  unpruned 95.0  0.5/s  0:00:14 left"
    records.progress("mme", 10, 10, 100.0)
    assert capsys.readouterr().err == "\r\x1b[K"
