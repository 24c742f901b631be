"""A run: its folder, the record of each question, appended as it comes so that whatever ends the
run loses nothing, the processes of torchrun, where a result comes from, and the exit code.
"""
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from support import checkpoint
from support.files import read_header, read_image, read_json, read_text, write_text
from support.timing import device_name
from tokprune import InputError

try:
    import fcntl
except ImportError:                                     # Windows has no such locks
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]

from_torchrun = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK = int(from_torchrun.get("RANK", 0))                # number of this process
WORLD = int(from_torchrun.get("WORLD_SIZE", 1))         # how many processes there are
LOCAL_RANK = int(from_torchrun.get("LOCAL_RANK", 0))    # of this process on its machine; its GPU

RESUMES = "what was answered is kept, and the same command resumes"
DIED = f"another process of this run has ended; {RESUMES}, with as many processes as you like"


# ---- the folder of a run -------------------------------------------------------------------------

# flags that decide no answer; model and data, whose contents are hashed instead; device and dtype,
# which are added as they were used
NOT_SETTINGS = {"command", "out", "json", "plot", "device", "dtype", "batch", "max_batch_tokens",
                "tolerance", "threshold", "model", "data"}
ENGINE = ["tokprune.py", "information.py", "support/benchmarks.py", "support/files.py",
          "support/image.py"]


def settings_of(args, model, data: dict) -> dict:
    """Return what decides the answers of a run: flags, precision, pixel bounds, and hashes of the
    code, the checkpoint and the questions."""
    weight = next(model.parameters())
    settings = {name: str(value) if isinstance(value, Path) else value
                for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}
    for bound in ("min_pixels", "max_pixels"):
        settings[bound] = getattr(model.config, bound, None)
    program = args.command.split()[0]
    code = {*ENGINE, f"{type(model).__module__}.py", program}
    if program in ("plan.py", "tiny/promise.py"):
        code |= {"eval.py", "plan.py"}                  # by whose loops they answer
    questions = {name: short_hash([question.identity for question in of_benchmark])
                 for name, of_benchmark in data.items()}
    return settings | {
        "device": weight.device.type, "dtype": str(weight.dtype)[6:],
        "code": short_hash([(ROOT / file).read_text("utf-8") for file in sorted(code)]),
        "checkpoint": short_hash([model.config, sorted(model.eos),
                                  *map(hash_of_ends, checkpoint.files_read(args.model))]),
        "questions": questions}


def hash_of_ends(file: Path) -> str:
    """Hash a file's size and its first and last MiB: reading 14 GB would take a minute."""
    size = file.stat().st_size
    with file.open("rb") as f:
        beginning = f.read(2 ** 20)
        f.seek(max(0, size - 2 ** 20))
        return hashlib.sha256(str(size).encode() + beginning + f.read()).hexdigest()


def short_hash(parts: list) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def open_folder(args, settings: dict) -> Path:
    """Return the folder of this run, by default runs/<program>-<model>-<hash of the settings>.

    Raises InputError if --out holds a run with other settings, or if another run writes there.
    """
    settings = json.loads(json.dumps(settings))
    out = args.out
    if out is None:
        program = Path(args.command.split()[0]).stem
        model = args.model.name.encode()[:100].decode(errors="ignore")
        out = Path("runs") / f"{program}-{model}-{short_hash([settings])[:8]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e})")
    if RANK == 0:
        lock(out)
    file = out / "settings.json"
    if file.exists() or (out / "answers.jsonl").exists():
        check_same(settings, read_json(file), f"--out {out}: holds a run with other settings")
    for other in gather(settings):                      # when every process has looked
        check_same(settings, other, "another process of this run has other settings")
    if RANK == 0:
        write_text(file, json.dumps(settings, indent=1) + "\n")
    barrier()
    if LOCAL_RANK == 0 and not file.exists():           # on a machine with a disk of its own
        write_text(file, json.dumps(settings, indent=1) + "\n")
    return out


def check_same(settings: dict, other: dict, what: str):
    """Raise InputError, which names each setting that differs."""
    differing = [f"{key} is {other.get(key)!r}, this run's is {value!r}"
                 for key, value in settings.items() if other.get(key) != value]
    if differing:
        raise InputError(f"{what}: {', '.join(differing)}")


locked = None                           # the folder that this process writes to, open and locked


def lock(folder: Path):
    """Lock the folder until this process ends. Raises InputError if another run writes there."""
    global locked
    if fcntl is None:
        return
    if locked is not None:
        os.close(locked)
    locked = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {folder}: another run is writing there; want another folder")
    except OSError:                                     # some file systems have no locks
        pass


def provenance(args, model) -> dict:
    """Return the command, versions, commit and machine that a result comes from."""
    packages = {name: version(name) for name in ("safetensors", "tokenizers", "pillow", "numpy")}
    packages["torch"] = torch.__version__               # with its build: +cpu, +cu130
    return {"command": args.command, "python": platform.python_version(), "packages": packages,
            "commit": commit(), "processes": WORLD, "threads": torch.get_num_threads(),
            "device_name": device_name(next(model.parameters()).device)}


def commit() -> str:
    """Return the commit of the code, and whether it was changed since; "" outside its own git."""
    def git(*command):
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return ""                                   # a copy that lies in another repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" and changes" if changed else "")
    except OSError:
        return ""


def write_result(out: Path, result: dict, as_json: bool):
    """Write result.json in the folder of the run; print its path and, with --json, the object."""
    if RANK != 0:
        return
    file = out / "result.json"
    # what is not a finite number, which JSON lacks, becomes null
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    write_text(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"result: {file}")
    if as_json:
        print(json.dumps(result, allow_nan=False))


# ---- records -------------------------------------------------------------------------------------

def collect(out: Path, benchmark: str, questions: list, model, work, at_once) -> list[dict]:
    """Return the record of every question, in their order.

    work(questions, images) returns their records: dicts whose "scores" has "unpruned". It gets
    prompts of equal shape, at most at_once(rows) of them. Of the questions that no process has a
    record of, this one works on every WORLD-th. Raises InputError at the end if memory ran out on
    some; all others have their records by then.
    """
    shapes = {question.id: shape_of(model, question) for question in questions}
    records = read_records(out, benchmark)
    known = gather(set(records))                        # a set of ids a process
    answered = set().union(*known)
    mine = [question for question in questions if question.id not in answered][RANK::WORLD]
    file = out / ("answers.jsonl" if WORLD == 1 else f"answers.rank{RANK}.jsonl")
    remove_half_line(file)
    began = time.time()
    done = 0
    total = 0.0
    for batch, images in read_ahead(model, batches_of_equal_shape(mine, shapes, at_once)):
        for question, record in attempt(work, batch, images):
            record = {"benchmark": benchmark, "id": question.id, **record}
            append(file, record)
            records[question.id] = record
            total += record["scores"]["unpruned"]
        done += len(batch)
        progress(benchmark, done, len(mine), began, f"unpruned {100 * total / done:.1f}")
    known_before = set().union(*known[:RANK])           # another process passes these on
    passed_on = {id: record for id, record in records.items() if id not in known_before}
    records = {}
    for of_process in gather(passed_on):
        records |= of_process
    if RANK == 0:
        merge(out, benchmark, questions, records)
    barrier()                                           # nobody lists files while they are merged
    failed = [question for question in questions if question.id not in records]
    if failed:
        raise InputError(f"{benchmark}: memory ran out on {len(failed)} of {len(questions)} "
                         f"questions, the first is {failed[0].id} ({failed[0].image}); want fewer "
                         f"--max-pixels, a smaller --max-batch-tokens or another --device; "
                         f"{RESUMES} with these")
    return [records[question.id] for question in questions]


def look_at(model, data: dict):
    """Look at every question of a run before the first is answered. Raises InputError, which names
    the one that the model cannot be asked."""
    for questions in data.values():
        for question in questions:
            shape_of(model, question)


def shape_of(model, question) -> tuple:
    """Return the shape of a question's prompt, from the header of its image. Raises InputError."""
    try:
        return model.shape(read_header(question.image).size, question.prompt)
    except InputError as e:
        raise InputError(about(question, e))


def about(question, error: InputError) -> str:
    """Say which question an error is about."""
    return f"{question.where} ({question.image}): {error}"


def batches_of_equal_shape(questions: list, shapes: dict[str, tuple], at_once) -> Iterator[list]:
    """Divide questions into batches that need no padding, in the order of their shapes."""
    for (rows, *_), alike in grouped(questions, lambda question: shapes[question.id]).items():
        size = at_once(rows)
        for i in range(0, len(alike), size):
            yield alike[i:i + size]


def grouped(things, key) -> dict:
    """Return the things of equal key(thing) as a list, by that key; all in their order."""
    groups = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


def read_records(out: Path, benchmark: str) -> dict[str, dict]:
    """Return the records of a benchmark that lie in a folder, by id. Raises InputError."""
    return {record["id"]: record for record, _ in all_records(out)
            if record["benchmark"] == benchmark}


def all_records(out: Path) -> Iterator[tuple[dict, str]]:
    """Yield each record that lies in a folder, and its line. A last line that is cut off is not
    among them: its question is asked again. Raises InputError."""
    for file in answer_files(out):
        for number, line in enumerate(read_text(file).split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                complete = {"benchmark", "id", "answers", "scores"} <= record.keys()
            except (json.JSONDecodeError, AttributeError):
                complete = False
            if not complete:
                raise InputError(f"{file}: cannot be read as the answers of an earlier run; line "
                                 f"{number} is {line[:60]!r}")
            yield record, line + "\n"


def answer_files(out: Path) -> list[Path]:
    return [*out.glob("answers.jsonl"), *sorted(out.glob("answers.rank*.jsonl"))]


def merge(out: Path, benchmark: str, questions: list, records: dict[str, dict]):
    """Make one file of the answers of all processes: other benchmarks' and other questions' lines
    as they are, then these, in the questions' order."""
    ids = {question.id for question in questions}
    lines = [line for record, line in all_records(out)
             if record["benchmark"] != benchmark or record["id"] not in ids]
    lines += [json.dumps(records[question.id]) + "\n" for question in questions
              if question.id in records]
    write_text(out / "answers.jsonl", "".join(dict.fromkeys(lines)))
    for file in out.glob("answers.rank*.jsonl"):
        file.unlink()


def remove_half_line(file: Path):
    """Remove a last line that is cut off, so that the next record begins a line of its own."""
    if file.exists():
        text = read_text(file)
        if not text.endswith("\n"):
            write_text(file, text[:text.rfind("\n") + 1])


def append(file: Path, record: dict):
    try:
        with file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise InputError(f"{file}: cannot be written ({e.strerror}); {RESUMES}")


READERS = 4                             # threads that read images ahead of the model


def read_ahead(model, batches: Iterable[list]):
    """Yield each batch of questions and the futures of their images, preprocessed."""
    def prepare(question):
        return model.preprocess(read_image(question.image))
    pool = ThreadPoolExecutor(READERS)
    waiting = []
    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(prepare, question) for question in batch]))
            if len(waiting) > READERS:
                yield waiting.pop(0)
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def attempt(work, batch: list, images: list):
    """Yield (question, record) of a batch; images: futures. Where memory runs out, or a question
    cannot be worked on, each half is tried on its own; a single question is then left out, which is
    printed, or named by the InputError that it raises."""
    try:
        records = work(batch, [image.result() for image in images])
    except InputError as e:
        if len(batch) == 1:
            raise InputError(about(batch[0], e))
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    else:
        yield from zip(batch, records)
        return
    torch.cuda.empty_cache()                            # nothing where CUDA is not in use
    if len(batch) == 1:
        print(f"\n{Path(sys.argv[0]).name}: question {batch[0].id} ({batch[0].image}): out of "
              "memory", file=sys.stderr)
        return
    half = len(batch) // 2
    yield from attempt(work, batch[:half], images[:half])
    yield from attempt(work, batch[half:], images[half:])


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out: torch has a type of its own for it on CUDA only."""
    message = "can't allocate memory|out of memory|ALLOC_FAILED"
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or re.search(message, str(error)) is not None)


# ---- processes -----------------------------------------------------------------------------------

def gather(value) -> list:
    """Return the value of every process, in the order of their ranks, to each of them. Raises
    InputError if one has died."""
    values = [value] * WORLD
    if WORLD > 1:
        try:
            if not dist.is_initialized():               # the slowest may be days behind
                dist.init_process_group("gloo", timeout=timedelta(days=30))
            dist.all_gather_object(values, value)
        except RuntimeError as e:                       # gloo's message has several lines
            raise InputError(f"{DIED} ({str(e).splitlines()[0][:200]})") from e
    return values


def barrier():
    """Wait for every process of the run. Raises InputError if one has died."""
    gather(None)


def progress(what: str, number: int, of: int, began: float, note: str = ""):
    """Print a line that overwrites itself and is gone at the end; nothing where nobody watches."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return
    line = ""
    if number < of:
        rate = number / (time.time() - began)
        rest = timedelta(seconds=round((of - number) / rate))
        line = f"{what} {number}/{of}  {note}  {rate:.1f}/s  {rest} left"
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---- from start to exit code ---------------------------------------------------------------------

def start(main):
    """Run main(argv), then exit with 0; or with 2 and one line on stderr for input that cannot be
    used, a signal, or memory that ran out."""
    signal.signal(signal.SIGTERM, stop)                 # torchrun sends it when a process has died
    if RANK or sys.stdout is None:                      # one process speaks for all
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or sys.stdout               # None: closed
    for stream in (sys.stdout, sys.stderr):             # a console that lacks a letter gets \u...
        stream.reconfigure(errors="backslashreplace")
    try:
        barrier()               # connect now, so that the others notice if this one ends early
        main(sys.argv[1:])
        sys.stdout.flush()
    except (InputError, KeyboardInterrupt) as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        fail(str(e) or f"interrupted; {RESUMES}")
    except OSError as e:
        if e.filename is None:                          # what is printed; it would be tried again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):              # ... | head: nobody reads on
            sys.exit(128 + signal.SIGPIPE)
        fail(f"{e.filename or 'what is printed'}: cannot be read or written ({e.strerror})")
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        message = str(e).split("\n")[0] or "MemoryError"
        fail(f"memory ran out ({message})")


def fail(message: str):
    """Exit with 2 and this message, as one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def stop(*_):
    # no InputError, which is about a question: what comes next would be tried all the same
    raise KeyboardInterrupt(DIED if WORLD > 1 else f"stopped by a signal; {RESUMES}")
