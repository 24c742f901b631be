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
    monkeypatch.setitem(make.STAGES, "tower", (120, 120, 1e-3, 1))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", make.attention)       # `train` puts it there for good
    tokenizer, heads_loss = make.make_tokenizer(), make.LabelHeads.loss

    def train(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(make, "WORK", folder)
        torch.manual_seed(0)
        tower, heads, calls = make.make_llava(1, tokenizer).vision_tower, make.LabelHeads(), []

        def loss(grid, pixels, labels):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return heads_loss(heads, tower, pixels, labels)
        module = torch.nn.ModuleList([tower, heads])
        make.train("tower", module, [], loss, tokenizer, torch.device("cpu"))
        return module.state_dict(), len(calls)
    want, steps = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=110)
    got, rest = train(tmp_path / "stopped")
    assert (steps, rest) == (120, 20)
    assert all(want[name].equal(got[name]) for name in want)


@pytest.mark.parametrize("make_model", ["make_llava", "make_qwen"])
def test_doubled_layers_compute_nearly_the_same(make_model, monkeypatch):
    """To first order: where the branches add little, what doubling changes is a small part of even that."""
    monkeypatch.syspath_prepend(TINY)
    import make
    tokenizer = make.make_tokenizer() if make_model == "make_llava" else make.make_qwen_tokenizer()
    torch.manual_seed(0)
    model = getattr(make, make_model)(2, tokenizer).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers." in name and "tower" not in name:
            p /= 100
    deep = make.double(model, getattr(make, make_model)).eval().requires_grad_(False)
    scene = make.draw_scene(make.random.Random(0), test=False)
    streams = [m.run(m.begin(scene.image, "What does the red word say?")) for m in (model, deep)]
    added = (streams[0].x - streams[0].embeds).norm()
    assert deep.num_layers == 4 and (streams[0].x - streams[1].x).norm() < 0.1 * added


def test_a_packed_question_has_the_loss_it_has_alone(monkeypatch):
    """Packing many questions behind one image changes nothing: same ids, same positions, same logits, for both models."""
    monkeypatch.syspath_prepend(TINY)
    import make
    for make_model, tokenizer, stage in ((make.make_llava, make.make_tokenizer(), "last"), (make.make_qwen, make.make_qwen_tokenizer(), "qwen-deep")):
        torch.manual_seed(0)
        model = make_model(2, tokenizer).eval().requires_grad_(False)
        grid, pixels, ids, pos, block, targets = make.Scenes(stage, 1, tokenizer)[0]
        loss = make.answer_loss(model, grid.tolist(), pixels, ids, pos, block, targets)
        alone = []
        for number in range(1, block.max() + 1):
            rows = (block[0] == 0) | (block[0] == number)
            part = [t[..., rows] for t in (ids, pos, block, targets)]
            asked = (part[3] != -100).sum()
            alone.append((make.answer_loss(model, grid.tolist(), pixels, *part) * asked, asked))
        assert len(alone) > 3
        torch.testing.assert_close(loss, sum(a for a, _ in alone) / sum(n for _, n in alone), rtol=1e-4, atol=1e-4)
