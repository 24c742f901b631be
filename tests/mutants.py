"""Deliberate mistakes, one at a time in a copy of the project: each must turn a test red.

    python tests/mutants.py                         all, a minute or less each
    python tests/mutants.py support/report.py       those in one file

Exits with 1 if a mistake goes unnoticed. The mistakes stand in mutants_*.py.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mutants_models as models
import mutants_support as support
from mutants_qwen3 import QWEN3
from mutants_tokprune import INFORMATION, TOKPRUNE

ROOT = Path(__file__).resolve().parents[1]
MODEL_TESTS = ["test_models.py", "test_contract.py"]
RUN_TESTS = ["test_flags.py", "test_records.py", "test_eval.py", "test_information_program.py",
             "test_runs.py"]
SCORE_TESTS = ["test_scorers.py", "test_official_files.py", "test_answers.py", "test_eval.py"]
# file -> its mistakes, and the tests that have to notice them, the fastest first
MUTANTS = {
    "model_llava.py": (models.LLAVA, ["test_llava.py", *MODEL_TESTS]),
    "model_qwen.py": (models.QWEN, ["test_qwen.py", *MODEL_TESTS]),
    "model_qwen3.py": (QWEN3, ["test_qwen3.py", *MODEL_TESTS]),
    "support/checkpoint.py": (models.CHECKPOINT, ["test_checkpoint.py", "test_broken_checkpoint.py",
                                                  *MODEL_TESTS]),
    "tokprune.py": (TOKPRUNE, ["test_tokprune.py", "test_methods.py", "test_schedules.py"]),
    "information.py": (INFORMATION | support.PROGRAM, ["test_information.py", "test_agreement.py",
                                                       "test_information_program.py"]),
    "eval.py": (support.EVAL, ["test_eval.py", "test_information_program.py", "test_runs.py"]),
    "support/statistics.py": (support.STATISTICS, ["test_statistics.py", "test_agreement.py"]),
    "support/report.py": (support.REPORT, ["test_report.py"]),
    "support/records.py": (support.RECORDS, RUN_TESTS),
    "support/runs.py": (support.RUNS, RUN_TESTS),
    "support/files.py": (support.FILES, RUN_TESTS),
    "support/benchmarks.py": (support.BENCHMARKS, SCORE_TESTS),
    "support/answers.py": (support.ANSWERS, SCORE_TESTS),
}
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "runs")


def red_test(file: str, old: str, new: str, tests: list[str]) -> str:
    """The first test that the mistake turns red; empty if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
        source = (copy / file).read_text()
        assert old in source, f"{old!r} is not in {file} any more"
        (copy / file).write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider",
                   *[f"tests/{test}" for test in tests]]
        try:
            run = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return "none ended within 10 minutes"
    for line in run.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" - ")[0]
    assert run.returncode == 0, f"pytest did not run: {run.stdout[-500:]}{run.stderr[-500:]}"
    return ""


def main(files: list[str]) -> int:
    unnoticed = 0
    for file in files or MUTANTS:
        mistakes, tests = MUTANTS[file]
        red = red_test(file, "", "", tests)
        assert not red, f"{red} is red without a mistake"
        for name, (old, new) in mistakes.items():
            red = red_test(file, old, new, tests)
            print(f"{file}, {name}: {red or 'UNNOTICED'}", flush=True)
            unnoticed += not red
    return unnoticed


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("files", nargs="*", help=f"of {', '.join(MUTANTS)}")
    files = p.parse_args().files
    unknown = set(files) - MUTANTS.keys()
    if unknown:
        p.error(f"{', '.join(unknown)}: want some of {', '.join(MUTANTS)}")
    sys.exit(bool(main(files)))
