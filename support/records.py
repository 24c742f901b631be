"""The records of a run: one JSON line a question, appended as it comes, so that whatever ends a run
loses nothing; what stands there is not worked out again. Processes of torchrun share the questions.
"""
import json
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import read_text, write_text
from tokprune import InputError

RANK = 0                                # number of this process
WORLD = 1                               # how many processes there are
LOCAL_RANK = 0                          # number of this process on its machine, and of its GPU
if "TORCHELASTIC_RUN_ID" in os.environ:             # set by torchrun, with the three below
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
    LOCAL_RANK = int(os.environ["LOCAL_RANK"])

GOES_ON = "what was answered is kept, and the same command goes on"
DIED = f"another process of this run has ended; {GOES_ON}, with as many as you like"


def collect(out: Path, benchmark: str, questions: list, prepare, work, workers: int) -> list:
    """The record of every question, in their order; None where memory ran out.

    work(question, prepare(question)) returns a record: a dict whose "scores" has "unpruned".
    `prepare` runs ahead, in threads. This process works on every WORLD-th question that has no
    record in the folder.
    """
    done = merge(out, benchmark, questions)
    file = out / ("answers.jsonl" if WORLD == 1 else f"answers.rank{RANK}.jsonl")
    mine = [question for question in questions[RANK::WORLD] if question.id not in done]
    began = time.time()
    total = 0.0
    for number, (question, prepared) in enumerate(ahead(prepare, mine, workers), 1):
        about = f"{benchmark} {question.id}"
        record = attempt(lambda: work(question, prepared()), about)
        if record is not None:
            append(file, {"benchmark": benchmark, "id": question.id, **record})
            total += record["scores"]["unpruned"]
        progress(benchmark, number, len(mine), began, f"unpruned {100 * total / number:.1f}")
    done = merge(out, benchmark, questions)
    records = [done.get(question.id) for question in questions]
    if not any(records):
        raise InputError(f"{benchmark}: memory ran out on every question; want fewer pixels, a "
                         "smaller --max-batch-tokens or another device")
    return records


def merge(out: Path, benchmark: str, questions: list) -> dict[str, dict]:
    """The benchmark's records by id. All processes' files become one, in the questions' order."""
    wait()
    if RANK == 0:
        files = [*out.glob("answers.jsonl"), *sorted(out.glob("answers.rank*.jsonl"))]
        records = {}
        for file in files:
            for record in read_records(file):
                records[record["benchmark"], record["id"]] = record
        asked = [(benchmark, question.id) for question in questions]
        others = records.keys() - set(asked)
        order = [key for key in records if key in others]
        order += [key for key in asked if key in records]
        lines = [json.dumps(records[key]) + "\n" for key in order]
        write_text(out / "answers.jsonl", "".join(lines))
        for file in files:
            if file.name != "answers.jsonl":
                file.unlink()
    wait()
    done = {}
    for record in read_records(out / "answers.jsonl"):
        if record["benchmark"] == benchmark:
            done[record["id"]] = record
    return done


def read_records(file: Path) -> list[dict]:
    """The lines of an earlier run. A last one that is cut off is not among them: its question is
    asked again. Raises InputError."""
    lines = read_text(file).split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            complete = {"benchmark", "id", "answers", "scores"} <= record.keys()
        except (json.JSONDecodeError, AttributeError):
            complete = False
        if not complete:
            raise InputError(f"{file}: cannot be read as the answers of an earlier run; line "
                             f"{number} is {line[:60]!r}")
        records.append(record)
    return records


def append(file: Path, record: dict):
    try:
        with file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror}); the answers before are in it, "
                         "and the same command goes on")


def ahead(prepare, items: list, workers: int):
    """Each item and a function that returns prepare(item), in order. Threads prepare the next few
    meanwhile."""
    pool = ThreadPoolExecutor(workers)
    waiting = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(prepare, item)))
            if len(waiting) > 2 * workers:
                ready, future = waiting.popleft()
                yield ready, future.result
        for ready, future in waiting:
            yield ready, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def attempt(work, about: str):
    """What work() returns; None where memory runs out, which is said, and the run goes on."""
    try:
        return work()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    program = Path(sys.argv[0]).name
    print(f"\n{program}: {about}: out of memory, failed", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for it on CUDA alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = "can't allocate memory|out of memory|ALLOC_FAILED"
    return re.search(said, str(error)) is not None


def wait():
    """Until every process of the run is here. Raises InputError if one has died."""
    if WORLD == 1:
        return
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))     # the slowest may be far
        dist.barrier()
    except RuntimeError as e:                           # gloo's message has several lines
        raise InputError(DIED) from e


def progress(what: str, number: int, of: int, began: float, note: str = ""):
    """A line that overwrites itself and is gone at the end. Silent where nobody watches."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return
    line = ""
    if number < of:
        rate = number / (time.time() - began)
        rest = timedelta(seconds=round((of - number) / rate))
        line = f"{what} {number}/{of}  {note}  {rate:.1f}/s  {rest} left"
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
