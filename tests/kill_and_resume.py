"""Kills a run with SIGKILL at random moments, starts it again each time, and compares it with a run that nobody disturbed.

    python tests/kill_and_resume.py --times 20 --limit 100

The tables have to be the same to the byte, the answers in all but their milliseconds. Leaves with 1 if they are not.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(out: Path, flags: list[str]):
    return subprocess.Popen([sys.executable, ROOT / "eval.py", *flags, "--out", out], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def finish(out: Path, flags: list[str]) -> tuple[list[str], list[dict]]:
    """The lines of the tables, and the answers without their times."""
    run = start(out, flags)
    printed = run.communicate()[0]
    assert run.returncode == 0, f"the run ended with {run.returncode}"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return ([line for line in printed.splitlines() if line.startswith("|")],
            [{key: value for key, value in line.items() if key not in ("ms", "oracle_ms")} for line in answers])


def kill_and_resume(times: int, limit: int, seed: int) -> tuple[int, bool]:
    """How many runs were killed while they answered, and whether the last one ended as if nothing had happened."""
    flags = ["--method", "dart", "--seeds", "2", "--limit", str(limit)]
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        want = finish(Path(folder, "undisturbed"), flags)
        whole, out, killed = time.time() - began, Path(folder, "killed"), 0
        for i in range(times):
            run, had = start(out, flags), lines_in(out / "answers.jsonl")
            while run.poll() is None and lines_in(out / "answers.jsonl") == had and rng.random() < 0.99:
                time.sleep(0.05)                        # mostly until it answers, now and then sooner
            time.sleep(rng.random() * whole / times)
            run.kill()
            run.communicate()
            now = lines_in(out / "answers.jsonl")
            killed += run.returncode == -9 and now > had
            print(f"killed {i + 1} of {times}: {now} of {len(want[1])} questions answered")
        return killed, finish(out, flags) == want


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--limit", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    killed, same = kill_and_resume(**vars(args))
    print(f"{killed} of {args.times} killed while answering; tables and answers are "
          + ("the same as undisturbed" if same else "DIFFERENT from the undisturbed run's"))
    sys.exit(not same)
