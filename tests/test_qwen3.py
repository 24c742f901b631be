"""What only Qwen3-VL has: DeepStack planes, interleaved M-RoPE."""
from dataclasses import replace

import pytest
import torch
from checkpoints import GOLDEN, load
from samples import images

import model_qwen3
from tokprune import keep


@pytest.fixture(scope="module")
def model():
    return load("qwen3_untied")


@pytest.fixture(scope="module")
def start(model):
    return model.begin(images()["whole"], "What is it?")        # 3 x 6 visual tokens


def test_a_plane_has_the_merger_of_its_place_in_the_list(model):
    """Indexes out of order took the mergers in the order of the blocks, in silence."""
    pixels, grid = model.preprocess(images()["whole"])
    _, want, _ = model.visual(pixels[None], grid)
    tower = model_qwen3.load(GOLDEN / "qwen3_untied", "cpu").visual
    tower.c.deepstack_visual_indexes.reverse()
    tower.deepstack_merger_list = tower.deepstack_merger_list[::-1]
    _, got, _ = tower(pixels[None], grid)
    assert len(got) == 3 and all(map(torch.equal, got, want))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_plane_is_added_after_its_layer_to_the_rows_of_its_own_tokens_alone(model, start, layer):
    """Two variants that keep different tokens, the second time just before the layer. Red if a
    plane is indexed by the rows alive, not by the tokens they were."""
    once = keep(start, torch.tensor([0, 2, 3, 9, 14, 15, 17]))
    pruned = keep(model.run(once, stop=layer), torch.tensor([[0, 2, 3, 5], [1, 2, 4, 6]]))
    got = model.run(pruned, stop=layer + 1).x
    without = model.run(replace(pruned, planes=()), stop=layer + 1).x
    first, n = pruned.visual
    tokens = torch.tensor([[0, 3, 9, 15], [2, 3, 14, 17]])
    want = without[:, first:first + n] + start.planes[layer][0, tokens]
    assert got[:, first:first + n].equal(want)
    assert got[:, :first].equal(without[:, :first])
    assert got[:, first + n:].equal(without[:, first + n:])
    assert len(start.planes) == 3 < model.num_layers - 1        # so that one can prune past them


def test_the_frequencies_of_t_row_and_column_take_turns(model, monkeypatch):
    """mrope_section 4, 2, 2 of 8: frequencies 1 and 4 turn with the row, 2 and 5 with the column,
    0, 3, 6 and 7 with t."""
    monkeypatch.setitem(model._buffers, "inv_freq", torch.ones(8))

    def turned(axis):
        pos = torch.zeros(3, 1, 1)
        pos[axis] = 1
        cos, _ = model.cos_sin(pos, torch.float64)
        return [i for i in range(8) if cos[0, 0, 0, i] != 1]
    assert [turned(0), turned(1), turned(2)] == [[0, 3, 6, 7], [1, 4], [2, 5]]
