"""What every test stands on: the CPU, one thread, and the built-in models, each read once."""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

# Before torch is imported, and for every process that a test starts. The recordings are of float32
# on the CPU, and torchrun's processes share this machine: no test means a GPU, whatever is there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"             # small products are no faster on more
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"       # processes that share cores must not spin

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402

from support import checkpoint, run as support_run  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def builtin_models_are_read_once():
    """A program that a test starts in this process gets the model of the one before. What a test
    changes in it, it has to put back."""
    original = checkpoint.load_model
    models = {}

    def load_model(path, device=None, dtype=None, **bounds):
        folder = Path(path).resolve()
        if folder.parent != ROOT / "tiny":
            return original(path, device, dtype, **bounds)
        key = folder, str(device), dtype, tuple(bounds.items())
        if key not in models:
            models[key] = original(path, device, dtype, **bounds)
        return models[key]
    checkpoint.load_model = load_model
    yield
    checkpoint.load_model = original


@pytest.fixture(scope="session")
def run():
    """run(main, *argv, out) -> what the program printed, and the result.json it left in out."""
    def run_program(main, *argv, out):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main([str(arg) for arg in [*argv, "--out", out]])
        return printed.getvalue(), json.loads((Path(out) / "result.json").read_text())
    return run_program


@pytest.fixture
def started(monkeypatch):
    """started(main, *argv) -> the exit code of the program, 0 where it returns."""
    monkeypatch.setattr(support_run.signal, "signal", lambda *_: None)

    def start(main, *argv):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        try:
            support_run.start(main)
        except SystemExit as e:
            return e.code
        return 0
    return start
