"""tiny/make.py goes on where it stood."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parents[1] / "tiny"


def test_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    """120 steps of the first stage in one go, and stopped between its checkpoint at step 100 and its end."""
    monkeypatch.syspath_prepend(TINY)
    import make
    monkeypatch.setattr(torch, "compile", lambda forward: forward)          # the same sums, without a minute of compiling
    monkeypatch.setattr(make, "TOWER", replace(make.TOWER, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    tokenizer, heads_loss = make.make_tokenizer(), make.LabelHeads.loss

    def train(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(make, "WORK", folder)
        torch.manual_seed(0)
        tower, heads, calls = make.make_model(1, tokenizer).vision_tower, make.LabelHeads(), []

        def loss(pixels, labels):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return heads_loss(heads, tower, pixels, labels)
        module = torch.nn.ModuleList([tower, heads])
        make.train("tower", module, [], loss, 120, 120, 1e-3, 1, tokenizer, torch.device("cpu"))
        return module.state_dict(), len(calls)
    want, steps = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=110)
    got, rest = train(tmp_path / "stopped")
    assert (steps, rest) == (120, 20)
    assert all(want[name].equal(got[name]) for name in want)
