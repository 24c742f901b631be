"""The mistakes that mutants.py makes are mistakes still."""
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", MUTANTS)
def test_every_deliberate_mistake_still_applies(file):
    """A line of the source that has changed would let a mistake of the list do nothing."""
    source = (ROOT / file).read_text()
    mistakes, tests = MUTANTS[file]
    gone = [name for name, (old, new) in mistakes.items() if old not in source or old == new]
    assert not gone
    assert all((ROOT / "tests" / test).exists() for test in tests)
