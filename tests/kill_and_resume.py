"""Kills a run with SIGKILL at random moments, starts it again each time, and compares what comes of
it with a run that nobody disturbed.

    python tests/kill_and_resume.py --times 20 --limit 100

The tables have to be the same to the byte, the records in all but their milliseconds. Exits with 1
if they are not.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--method", "dart", "--seeds", "2"]


def start(out: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, ROOT / "eval.py", *flags, "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def tables(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|")]


def timeless(file: Path) -> list[dict]:
    """The records of a run without their milliseconds."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        record.pop("ms", None)
    return records


def finish(out: Path, flags: list[str]) -> tuple[list[str], list[dict]]:
    """The tables that a run to its end prints, and its records."""
    run = start(out, flags)
    printed, _ = run.communicate()
    assert run.returncode == 0, f"the run ended with {run.returncode}"
    return tables(printed), timeless(out / "answers.jsonl")


def kill_once(out: Path, flags: list[str], rng: random.Random) -> bool:
    """Whether it died of the signal, with answers written meanwhile."""
    run = start(out, flags)
    file = out / "answers.jsonl"
    had = lines_in(file)
    waits = rng.random() < 0.8                          # until it answers; else it dies sooner
    while waits and run.poll() is None and lines_in(file) == had:
        time.sleep(0.02)
    time.sleep(rng.random())
    run.kill()
    run.communicate()
    return run.returncode == -9 and lines_in(file) > had


def kill_and_resume(times: int, flags: list[str], seed: int, folder: Path,
                    want: tuple | None = None) -> tuple[int, bool]:
    """How many runs were killed while they answered, and whether the last one ended as if nothing
    had happened. want: what `finish` returned of an undisturbed run, if there was one."""
    rng = random.Random(seed)
    want = want or finish(folder / "undisturbed", flags)
    killed = 0
    for i in range(times):
        killed += kill_once(folder / "killed", flags, rng)
        answered = lines_in(folder / "killed" / "answers.jsonl")
        print(f"killed {i + 1} of {times}: {answered} of {len(want[1])} questions answered")
    return killed, finish(folder / "killed", flags) == want


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--limit", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS, "--limit", str(args.limit)]
        killed, same = kill_and_resume(args.times, flags, args.seed, Path(folder))
    verdict = "the same as" if same else "DIFFERENT from"
    print(f"{killed} of {args.times} killed while answering; tables and records are {verdict} the "
          "undisturbed run's")
    sys.exit(not same)
